"""A check, what it finds, and the document that a method's checks make."""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from leanlight import runs
from leanlight.results.format import MISSING, show_machine

Verdict = Literal["passed", "failed", "not_run"]
Value = float | int | str | None
_VERSIONS = ("torch", "triton", "lightning", "torchmetrics", "spikingjelly", "numpy")
_SOURCES = ("leanlight", "lit_modules", "datamodules", "callbacks")


class NotRun(Exception):
    """A check that does not apply here; its text says why, in one line."""


@dataclass(frozen=True)
class Found:
    """What a check has found.

    Args:
        value: measured.
        expected: what it is compared with.
        tolerance: how far apart they may be, a number or words.
        passed: whether that holds.
        why: more in words, where it does not hold.
        figures: further figures, name with unit → value.
    """

    value: Value
    expected: Value
    tolerance: Value
    passed: bool
    why: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


def near(
    value: float, expected: float, tolerance: float, why: str = "", figures: Mapping[str, float] | None = None
) -> Found:
    """Passed where the two differ by at most `tolerance`; never for a value that is not finite."""
    return Found(value, expected, tolerance, abs(value - expected) <= tolerance, why, figures or {})


def at_least(value: float, bound: float, why: str = "", figures: Mapping[str, float] | None = None) -> Found:
    """Passed where the value reaches the bound."""
    return Found(value, bound, "at least", value >= bound, why, figures or {})


@dataclass(frozen=True)
class Check:
    """One promise.

    Args:
        method: whose it is; ``nn`` for what methods share.
        name: a word or a path of words, its key in the document.
        what: the promise, in one line.
        measure: finds out; raises `NotRun` where it does not apply.
        alone: timed, so that nothing else may run beside it.
    """

    method: str
    name: str
    what: str
    measure: Callable[[], Found]
    alone: bool = False


def outcome(check: Check) -> dict[str, Any]:
    """Run a check; whatever it raises is a failure of this check alone."""
    begin = time.perf_counter()
    try:
        found = check.measure()
        verdict: Verdict = "passed" if found.passed else "failed"
    except (NotRun, ModuleNotFoundError) as reason:  # a package that only some checks need may be missing
        found, verdict = without_value(str(reason)), "not_run"
    except Exception as error:  # of any part of the suite, on hardware that no test has seen
        found, verdict = without_value(last_lines(error)), "failed"
    return entry(check.name, check.what, verdict, found, time.perf_counter() - begin)


def without_value(why: str) -> Found:
    """What is known of a check that did not come to its end."""
    return Found(None, None, None, False, why)


def entry(name: str, what: str, verdict: Verdict, found: Found, seconds: float = 0.0) -> dict[str, Any]:
    """A check's line of the document."""
    return {
        "name": name,
        "what": what,
        "expected": _plain(found.expected),
        "value": _plain(found.value),
        "tolerance": _plain(found.tolerance),
        "verdict": verdict,
        "why": found.why,
        "seconds": round(seconds, 2),
        "figures": {name: _plain(value) for name, value in found.figures.items()},
    }


def _plain(value: Value) -> Value:
    """JSON has no nan: as text it stands out."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def last_lines(error: BaseException, frames: int = 3) -> str:
    """An error with the last places of the project that it came through, without folders of this machine."""
    own = [
        f"{os.path.relpath(frame.filename, runs.PROJECT)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.abspath(frame.filename).startswith(str(runs.PROJECT)) and "site-packages" not in frame.filename
    ]
    text = without_places("\n".join(str(error).strip().splitlines()[:6]))
    return f"{type(error).__name__}: {text}" + (f" (at {' < '.join(reversed(own[-frames:]))})" if own else "")


def without_places(text: str) -> str:
    """Text without the names of this machine's folders."""
    text = text.replace(f"{runs.PROJECT}/", "").replace(os.path.expanduser("~"), "~")
    return re.sub(r"/[^\s'\"]*/(site-packages|dist-packages|leanlight-gpu-[^/\s]+)/", "", text)


def document(method: str, facts: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``gpu.json`` of a method holds.

    Args:
        method: a method's name, or ``nn``.
        facts: of `facts`.
        checks: lines of `entry`.
    """
    return {"kind": "gpu", "method": method, **facts, "checks": list(checks)}


def facts() -> dict[str, Any]:
    """Date, code and machine of a run. Never host, user or path."""
    commit, dirty = runs.commit()
    import torch

    sources = [path for folder in _SOURCES for path in (runs.PROJECT / folder).rglob("*.py")]
    code, _ = runs.code_version(path.relative_to(runs.PROJECT).as_posix() for path in sources)
    machine = runs.machine() | {package: _version(package) for package in _VERSIONS}
    machine |= {"cuda": torch.version.cuda, "driver": _driver()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "code": code,
        "machine": machine,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def merged(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> dict[str, Any]:
    """A document with the lines of an earlier one that it does not have, where machine and code are the same."""
    same = before is not None and all(before.get(key) == after[key] for key in ("kind", "machine", "code"))
    if before is None or not same:
        return dict(after)
    again = {line["name"] for line in after["checks"]}
    return {**after, "checks": [line for line in before["checks"] if line["name"] not in again] + after["checks"]}


def markdown(content: Mapping[str, Any]) -> str:
    """A document as a page."""
    counts = {v: sum(line["verdict"] == v for line in content["checks"]) for v in ("passed", "failed", "not_run")}
    lines = [
        f"# {content['method']} on a GPU",
        "",
        f"{counts['passed']} checks passed, {counts['failed']} failed, {counts['not_run']} not run.",
        "",
        "| check | verdict | value | expected | tolerance | seconds |",
        "|---|---|---:|---:|---|---:|",
    ]
    for line in content["checks"]:
        cells = [show(line[key]) for key in ("value", "expected", "tolerance")]
        verdict = line["verdict"].replace("_", " ")
        name = f"{line['what']} (`{line['name']}`)"
        lines.append(f"| {name} | {verdict} | {' | '.join(cells)} | {line['seconds']:.1f} |")
    more = [line for line in content["checks"] if line["figures"]]
    if more:
        lines += ["", "| check | figures |", "|---|---|"]
        lines += [f"| `{line['name']}` | {show_figures(line['figures'])} |" for line in more]
    reasons = [line for line in content["checks"] if line["why"]]
    lines += ["", *(f"- `{line['name']}`: {' '.join(line['why'].split())}" for line in reasons)] if reasons else []
    machine = content["machine"]
    versions = f"CUDA {machine['cuda']}, driver {machine['driver']}, triton {machine['triton']}"
    lines += ["", f"Machine: {show_machine(machine)}, {versions}."]
    clean = content["commit"] and not content["dirty"]
    commit = f"Commit `{content['commit'][:12]}`" if clean else f"Code `{content['code'][:12]}`"
    lines += ["", f"{commit}, {content['date']}, by `make gpu`."]
    return "\n".join(lines) + "\n"


def show_figures(figures: Mapping[str, Value]) -> str:
    """Figures on one line."""
    return ", ".join(f"{name} {show(value)}" for name, value in figures.items())


def show(value: Value) -> str:
    """A value for people."""
    if value is None or isinstance(value, str):
        return value or MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
