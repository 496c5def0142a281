"""Settings of every test: one thread, no GPU, W&B offline and silent, no colours or terminal width of the machine."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.update(
    WANDB_MODE="offline", WANDB_SILENT="true", OMP_NUM_THREADS="1", MPLBACKEND="Agg", COLUMNS="200", NO_COLOR="1"
)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: a fit in a test, or in its child, trains on the CPU
ROOT = Path(__file__).parent.parent


def pytest_configure(config):
    """What earlier stages make for the smallest configs lies in one folder for all processes of the session."""
    if not hasattr(config, "workerinput"):
        os.environ["LEANLIGHT_TEST_INPUTS"] = tempfile.mkdtemp(prefix="leanlight-inputs-")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["LEANLIGHT_TEST_INPUTS"])


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def leanlight(tmp_path):
    """Run the command line in a process of its own, in `tmp_path`; returns the completed process."""

    def call(*args, env=None, check=False, timeout=240):
        return subprocess.run(
            [sys.executable, "-m", "leanlight", *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=check,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        )

    return call


# Shells start background jobs with Ctrl-C ignored, and children would inherit that; some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
