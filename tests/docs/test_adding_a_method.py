"""The page that teaches how to add methods works as written: its files are written, its commands run, in order."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(900)  # a dozen runs
def test_the_page_builds_a_working_method(tmp_path):
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "leanlight").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m leanlight "$@"\n')
    (bin_dir / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for script in bin_dir.iterdir():
        script.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{work}"}
    ran = 0
    for language, name, text in BLOCK.findall((ROOT / "docs" / "adding_a_method.md").read_text()):
        if name:
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text(text)
        elif language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, f"{text}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
            ran += 1
    assert ran == 6
    assert (work / "runs/mixup/digits/first/summary.json").is_file()
    assert "mixup_helps" in (work / "mixup_results.json").read_text()
    assert (work / "site" / "index.html").is_file()
    for run in ("first", "installed"):  # without an optimiser, and yet checkpoints and a best one
        assert {path.name for path in (work / f"runs/gaussian/digits/{run}/checkpoints").iterdir()} >= {
            "last.ckpt",
            "best.ckpt",
        }
        metrics = json.loads((work / f"runs/gaussian/digits/{run}/summary.json").read_text())["metrics"]
        assert metrics["test/accuracy"] > 0.9
