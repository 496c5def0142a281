"""A process that runs checks, and writes a line of JSON for each as soon as it is done."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

from leanlight.benchmarks.gpu.checks import Check, Found, outcome, without_places


def main(task: dict[str, Any]) -> int:
    """Run the checks of a task, in their order.

    It first writes the list of its checks; then, before each check, its name and after it its line: so the parent
    knows which one a process has died under.

    Args:
        task: ``groups``; ``only``: names of checks, empty for all; ``alone``: those that are timed, or the others;
            ``done``: [group, name] of those to leave out; ``folder`` for runs; ``device``. It starts when a line comes
            on stdin, after all imports.
    """
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what training prints belongs to the log
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and runs listen
    import torch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    def wanted(group: str, check: Check) -> bool:
        named = not task["only"] or any(check.name == x or check.name.startswith(f"{x}/") for x in task["only"])
        return named and check.alone == task["alone"] and [group, check.name] not in task["done"]

    listed = [(group, check) for group in task["groups"] for check in found(group, task) if wanted(group, check)]
    listed.sort(key=lambda item: item[1].name.endswith("/compile"))  # these take longest, and promise nothing
    _tell(report, {"listed": [[group, check.name, check.what] for group, check in listed]})
    sys.stdin.readline()
    for group, check in listed:
        _tell(report, {"begun": [group, check.name]})
        # As in the suite's runs: TF32 rounds to 10 bits, which no comparison of 1e-4 survives.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        line = outcome(check)
        _tell(report, {"done": [group, check.name], "line": line})
        if "CUDA error" in line["why"]:
            return 1  # nothing works any more in this process
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def found(group: str, task: dict[str, Any]) -> list[Check]:
    """The checks of a group; where they cannot be listed, one that says why, so that other groups are not lost."""
    try:
        from leanlight.benchmarks.gpu.suite import checks

        return list(checks(group, Path(task["folder"]) / group, task["device"]))
    except Exception as error:  # whatever keeps a method's benchmark from being imported here
        reason = error

    def start() -> Found:
        raise reason

    name = "timed checks" if task["alone"] else "checks"
    return [Check(group, name, "its checks can be listed", start, task["alone"])]


def _tell(report: TextIO, message: dict[str, Any]) -> None:
    report.write(without_places(json.dumps(message)) + "\n")
    report.flush()


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
