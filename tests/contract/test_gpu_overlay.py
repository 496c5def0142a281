"""`--config trainer/gpu` alone starts every method, on the device for tests that have no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mock_gpu import why_unavailable

from leanlight.registry import METHODS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
def test_the_overlay_alone_starts_every_method(tmp_path):
    """In a process of its own, since the device changes the one that registers it."""
    support = ROOT / "tests" / "support"
    done = subprocess.run(
        [sys.executable, str(support / "overlay_run.py"), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(support)])},
        capture_output=True,
        text=True,
    )
    started = [line.removeprefix("started ") for line in done.stdout.splitlines() if line.startswith("started ")]
    assert started == [f"{name}: 0" for name in METHODS], done.stderr[-3000:]
