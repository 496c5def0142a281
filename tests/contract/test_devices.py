"""Every method runs on a GPU, shown without one: `tests/support/mock_gpu` refuses what CUDA refuses and counts.

The device changes the process that registers it, so tests with it run in processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mock_gpu import why_unavailable

SUPPORT = Path(__file__).parents[1] / "support"

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())


def python(folder, *words):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_the_device_does_what_cuda_does(tmp_path):
    python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", SUPPORT / "mock_gpu" / "checks.py")
