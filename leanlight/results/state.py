"""What to do about a run that may already be there: take it, go on with it, or start it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leanlight.contracts.errors import UserError
from leanlight.runs import code_version, read_summary

Action = Literal["reuse", "resume", "start", "diverged"]


@dataclass(frozen=True)
class Decision:
    """action: what to do. stale: the code has changed since the run that is reused. why: for the reader."""

    action: Action
    why: str
    stale: bool = False


def decide(run_dir: Path, identity: str, *, fresh: bool = False, rerun_stale: bool = False) -> Decision:
    """Decide about the run folder `run_dir` that should hold the run with configuration hash `identity`.

    Only a finished run of this very configuration is reused. An unfinished one goes on from its last checkpoint, its
    last predictions or the finished parts of its work, unless the code has changed: half a run of each version would be
    a result of neither. A diverged run of the same code would diverge again, so it is not repeated.

    Args:
        run_dir: the folder, which may not exist.
        identity: what `leanlight.runs.config_hash` gives.
        fresh: start anew whatever is there.
        rerun_stale: start anew what has finished with other code.
    """
    summary = read_summary(run_dir)
    if fresh:
        return Decision("start", "asked for anew")
    if summary is None:
        return Decision("start", "not run yet")
    if summary.get("config_hash") != identity:
        return Decision("start", "the folder holds another configuration")
    changed, status = is_stale(summary), summary.get("status")
    if status == "finished":
        if changed and rerun_stale:
            return Decision("start", "code changed since it ran")
        return Decision("reuse", "finished, but the code has changed since" if changed else "finished", stale=changed)
    if changed:
        return Decision("start", f"{status}, and the code has changed since")
    if status == "diverged":
        return Decision("diverged", str(summary.get("error") or "diverged"))
    if _command(summary) == "predict":
        if any(path.is_file() for path in (run_dir / "artifacts" / "predictions").rglob("*")):
            return Decision("resume", f"{status}, with predictions")
        return Decision("start", f"{status}, without predictions")
    if any((run_dir / "artifacts").glob("*/.parts")):
        return Decision("resume", f"{status}, with finished parts")
    if (run_dir / "checkpoints" / "last.ckpt").is_file():
        return Decision("resume", f"{status}, with a checkpoint")
    return Decision("start", f"{status}, without a checkpoint to go on from")


def _command(summary: dict[str, Any]) -> str:
    return str((summary.get("command") or ["fit"])[0])


def resume_words(run_dir: Path) -> tuple[str, str, str]:
    """Arguments of `leanlight` that go on with a run that `decide` wants resumed."""
    return _command(read_summary(run_dir) or {}), "--resume", str(run_dir)


def clear(run_dir: Path, runs_root: Path) -> None:
    """Remove what stands in the way of a fresh start; UserError rather than touch anything outside the runs root."""
    root = runs_root.resolve()
    place = run_dir.resolve()
    if root not in place.parents:
        raise UserError(f"{run_dir}: lies outside the runs root {runs_root}; nothing there is removed")
    shutil.rmtree(place, ignore_errors=True)


def is_stale(summary: dict[str, Any]) -> bool:
    """Whether the project files that a run imported have changed since."""
    files = summary.get("code_files")
    return files is None or code_version(files)[0] != summary.get("code_hash")
