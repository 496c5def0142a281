"""What the README shows runs."""

import re
import subprocess
import sys
from pathlib import Path

from leanlight.configs_path import find_config

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_python_example_trains_and_tests(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "test/accuracy" in done.stdout


def test_every_config_it_names_exists():
    names = re.findall(
        r"(?:--config|reproduce|run) ((?:classifier|esvae|at_bptt|sfedca|sfedhifi|dsqn|trainer)/[\w/]+)", README
    )
    assert len(names) > 5
    for name in names:
        assert find_config(name).is_file(), name
