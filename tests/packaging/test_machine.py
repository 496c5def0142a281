"""The tests are the same on a machine with GPUs as on one without."""

import os
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def test_tests_hide_the_gpus_of_a_machine_from_themselves_and_their_children():
    ask = "import os, sys; assert 'torch' not in sys.modules; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}], check=True)"
    command = f"import runpy; runpy.run_path({str(CONFTEST)!r})\n{ask}\n{child}"
    done = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(done.stdout.split()) == ["''", "''"], "of the tests, of a child"
