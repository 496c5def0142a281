"""A benchmark in a process of its own: memory and end are its own, and its code may be another commit's."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from leanlight.benchmarks.core import read
from leanlight.contracts.errors import UserError
from leanlight.results.launch import command
from leanlight.runs import PROJECT


def measure_in_child(method: str, quick: bool, project: Path = PROJECT, quiet: bool = False) -> dict[str, Any]:
    """What `leanlight benchmark METHOD` writes; UserError with the process's last words when it writes nothing.

    Args:
        method: whose benchmark.
        quick: tiny sizes.
        project: folder whose code is measured.
        quiet: keep what the process prints to itself.
    """
    with tempfile.TemporaryDirectory(prefix="leanlight-benchmark-") as folder:
        output, log = Path(folder) / "benchmark.json", Path(folder) / "log"
        words = command("benchmark", method, "--output", str(output), *(["--quick"] if quick else []))
        path = os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])])
        # As -P of `command`, for the processes that a benchmark starts itself: a checkout that one stands in would
        # come before `project`.
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        with open(log, "w") as errors:
            shown = subprocess.DEVNULL if quiet else None
            code = subprocess.run(words, env=environment, stdout=shown, stderr=errors, check=False).returncode
        if output.is_file():
            return read(output)
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code < 0:
        raise UserError(f"killed by {signal.Signals(-code).name}")
    raise UserError(lines[-1].removeprefix("leanlight: error: ") if lines else f"exit code {code}, nothing written")
