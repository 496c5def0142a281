"""Timing that stands noise, and measurements as documents that can be compared."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from leanlight import runs
from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write
from leanlight.results.format import MISSING, show_machine

if TYPE_CHECKING:
    from torch import Tensor

Better = Literal["higher", "lower"]

#: For a Trainer whose steps are timed: nothing is logged, shown or kept.
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Args:
        value: median of the repetitions.
        unit: of value, low and high.
        better: which way is good; None for a mere fact.
        low: lower quartile of the repetitions.
        high: upper quartile.
        n: number of repetitions.
    """

    value: float
    unit: str
    better: Better | None
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Target:
    """A bound that a figure should keep.

    Args:
        figure: name of the figure.
        bound: ``figure <= bound`` where lower is better, ``>=`` where higher is.
        text: what it means.
    """

    figure: str
    bound: float
    text: str


@dataclass
class Measurement:
    """What a method's benchmark returns.

    Args:
        settings: shapes, sizes, threads, names: what a reader must know to repeat it.
        figures: by name ``part/what``.
        targets: bounds on figures.
        checks: statements that were verified in the run (equal pixels, equal weights).
        missing: figures that could not be taken, with the reason.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperStep:
    """A training step at the paper's shapes.

    A method's benchmark offers them by ``paper_steps(device, quick) -> {name: function that makes one}``; `make gpu`
    times each.

    Args:
        run: one step: forward, backward, optimiser.
        samples: of a step.
        compile: lets the compiler take the step over, from its next run on; None where nothing is compiled.
        mixed: whether the method allows bf16-mixed.
    """

    run: Callable[[], object]
    samples: int
    compile: Callable[[], object] | None = None
    mixed: bool = True


def network_step(network: Any, loss: Callable[[], Any], samples: int) -> PaperStep:
    """The usual step of one network, with SGD.

    Args:
        network: on its device.
        loss: of a batch, by a forward pass of the network.
        samples: of the batch.
    """
    import torch

    optimizer = torch.optim.SGD(network.train().parameters(), lr=0.01)
    now = [loss]

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        now[0]().backward()
        optimizer.step()

    def compile_loss() -> None:
        now[0] = torch.compile(loss)

    return PaperStep(run, samples, compile_loss)


def summarise(samples: Sequence[float], unit: str, better: Better | None = "lower") -> Figure:
    """Median and quartiles of repeated measurements.

    Args:
        samples: at least one.
        unit: of the samples.
        better: which way is good; None for a mere fact.
    """
    ordered = sorted(samples)
    low, high = (
        (statistics.quantiles(ordered, n=4, method="inclusive")[i] for i in (0, 2)) if len(ordered) > 1 else ordered * 2
    )
    return Figure(statistics.median(ordered), unit, better, low, high, len(ordered))


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 10, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each candidate in each of `rounds` rounds, after `warmup` rounds that do not count.

    Every round runs each candidate once and starts with another one, so that a machine that slows down for a while
    slows all alike; compare candidates by their ratios within a round. On a GPU a candidate ends when the device has
    finished.

    Args:
        candidates: name → what to time.
        rounds: samples of each candidate.
        warmup: rounds before the first that counts.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize()
            begin = time.perf_counter()
            candidates[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block PyTorch computes on one thread of the CPU."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def within(found: Tensor | None, expected: Tensor | None, tolerance: float) -> bool:
    """Whether two tensors differ by at most `tolerance` of the largest number in the second."""
    assert found is not None
    assert expected is not None
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Quotients of samples that were taken side by side."""
    return [a / b for a, b in zip(over, under, strict=True)]


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def document(method: str, measured: Measurement, quick: bool) -> dict[str, Any]:
    """The measurement with what it was taken on, ready for JSON.

    Args:
        method: whose benchmark it is.
        measured: what it returned.
        quick: whether it ran at tiny sizes, so that its figures mean nothing.
    """
    commit, dirty = runs.commit()
    return {
        "kind": "benchmark",
        "method": method,
        "quick": quick,
        "commit": commit,
        "dirty": dirty,
        "code": _code(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": runs.machine(),
        "settings": measured.settings,
        "figures": {name: asdict(figure) for name, figure in measured.figures.items()},
        "targets": [
            {**asdict(target), "met": _met(target, measured.figures[target.figure])}
            for target in measured.targets
            if target.figure in measured.figures
        ],
        "checks": measured.checks,
        "missing": measured.missing,
    }


def _code() -> dict[str, Any]:
    """Hash and names of the project's files that decide these figures: those of runs, and the benchmark's own."""
    modules = [module for name, module in sys.modules.items() if name.startswith("leanlight.benchmarks.")]
    benchmarks = (Path(str(module.__file__)).resolve().relative_to(runs.PROJECT).as_posix() for module in modules)
    digest, files = runs.code_version([*runs.code_version()[1], *benchmarks])
    return {"hash": digest, "files": files}


def is_current(content: Mapping[str, Any]) -> bool:
    """Whether a document was measured, at full size, by the code that is here now."""
    code = content.get("code")
    return code is not None and not content["quick"] and runs.code_version(code["files"])[0] == code["hash"]


def passed(content: Mapping[str, Any]) -> bool:
    """Whether every target of a document is met and every check has held."""
    return all(target["met"] for target in content["targets"]) and all(content["checks"].values())


def _met(target: Target, figure: Figure) -> bool:
    return figure.value >= target.bound if figure.better == "higher" else figure.value <= target.bound


def read(path: Path | str) -> dict[str, Any]:
    """A document as `document` made it; UserError when the file is missing or something else."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"benchmark: cannot read {path} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"benchmark: {path} is not JSON ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or content.get("kind") != "benchmark":
        raise UserError(f"benchmark: {path} is not a file that `leanlight benchmark` wrote")
    return content


@dataclass(frozen=True)
class Difference:
    """A figure in two documents.

    Args:
        name: of the figure.
        unit: of both values.
        before: median in the first document.
        after: median in the second.
        ratio: after over before.
        verdict: ``same`` when the quartile ranges overlap, empty for a mere fact.
    """

    name: str
    unit: str
    before: float
    after: float
    ratio: float
    verdict: Literal["better", "worse", "same", ""]


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[Difference], list[str], list[str]]:
    """Differences of the figures in both, names only in `before`, names only in `after`."""
    old, new = before["figures"], after["figures"]
    common = [_difference(name, old[name], new[name]) for name in old if name in new]
    return common, [name for name in old if name not in new], [name for name in new if name not in old]


def _difference(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference:
    verdict: Literal["better", "worse", "same", ""] = "same"
    if new["better"] is None:
        verdict = ""
    elif new["low"] > old["high"] or new["high"] < old["low"]:
        verdict = "better" if (new["value"] > old["value"]) == (new["better"] == "higher") else "worse"
    ratio = new["value"] / old["value"] if old["value"] else math.nan
    return Difference(name, new["unit"], old["value"], new["value"], ratio, verdict)


def warnings_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Reasons why two documents should not be compared figure by figure."""
    found = []
    if before["method"] != after["method"]:
        found.append(f"different methods: {before['method']} and {after['method']}")
    for key in sorted({*before["machine"], *after["machine"]}):
        pair = before["machine"].get(key), after["machine"].get(key)
        if pair[0] != pair[1]:
            found.append(f"machine differs in {key}: {pair[0]} and {pair[1]}")
    for key in sorted({*before["settings"], *after["settings"]}):
        pair = before["settings"].get(key), after["settings"].get(key)
        if pair[0] != pair[1]:
            found.append(f"settings differ in {key}: {pair[0]} and {pair[1]}")
    return found


def markdown(content: Mapping[str, Any]) -> str:
    """A document as a page: figures, targets, checks, settings, machine."""
    lines = [f"# Benchmark of {content['method']}", "", "| figure | median | quartiles | unit |", "|---|---:|---:|---|"]
    for name, figure in content["figures"].items():
        spread = show_spread(figure) or MISSING
        lines.append(f"| {name} | {show_value(figure['value'])} | {spread} | {figure['unit']} |")
    lines.append("")
    for target in content["targets"]:
        value = show_value(content["figures"][target["figure"]]["value"])
        lines.append(f"- **{'met' if target['met'] else 'missed'}**: {target['text']}: {value}")
    lines += [f"- **{'checked' if held else 'FAILED'}**: {text}" for text, held in content["checks"].items()]
    lines += [f"- **not measured**: {name}: {why}" for name, why in content["missing"].items()]
    settings = ", ".join(f"{name} {value}" for name, value in content["settings"].items())
    lines += ["", f"Settings: {settings}.", "", f"Machine: {show_machine(content['machine'])}."]
    lines += [
        "",
        f"Commit `{content['commit'][:12]}`, {content['date']}, by `leanlight benchmark {content['method']}`.",
    ]
    return "\n".join(lines) + "\n"


def write_pages(*folders: Path) -> list[Path]:
    """Write a page beside each benchmark in folders of results; return the pages."""
    pages = []
    for path in sorted(path for folder in folders for path in folder.glob("*/benchmark.json")):
        pages.append(path.with_suffix(".md"))
        atomic_write(pages[-1], markdown(read(path)))
    return pages


def show_value(value: float) -> str:
    """Four significant digits, without an exponent where a reader can do without."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def show_spread(figure: Mapping[str, Any]) -> str:
    """Lower to upper quartile of a figure in a document; empty for a single measurement."""
    return f"{show_value(figure['low'])} to {show_value(figure['high'])}" if figure["n"] > 1 else ""


def _label(content: Mapping[str, Any]) -> str:
    return f"{content['commit'][:8] or 'no commit'}{' + changes' if content['dirty'] else ''}"


def print_document(content: Mapping[str, Any], console: Console) -> None:
    """Show a measurement as a table, then its targets, checks and gaps."""
    table = Table(title=f"{content['method']}, {_label(content)}", title_justify="left")
    table.add_column("figure")
    for column in ("median", "quartiles"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    for name, figure in content["figures"].items():
        table.add_row(name, show_value(figure["value"]), show_spread(figure), figure["unit"])
    console.print(table)
    for target in content["targets"]:
        mark = "met" if target["met"] else "MISSED"
        console.print(
            f"{mark}: {target['text']}: {show_value(content['figures'][target['figure']]['value'])}", highlight=False
        )
    for text, passed in content["checks"].items():
        console.print(f"{'checked' if passed else 'FAILED'}: {text}", highlight=False)
    for name, reason in content["missing"].items():
        console.print(f"not measured: {name}: {reason}", highlight=False, markup=False)


def print_comparison(before: Mapping[str, Any], after: Mapping[str, Any], console: Console) -> None:
    """Show two measurements side by side, with what only one of them has.

    Args:
        before: document of the first.
        after: document of the second.
        console: where to.
    """
    common, only_before, only_after = compare(before, after)
    table = Table(title=f"{after['method']}: {_label(before)} → {_label(after)}", title_justify="left")
    table.add_column("figure")
    for column in ("before", "spread", "after", "spread", "after/before"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    table.add_column("verdict")
    colour = {"better": "green", "worse": "red"}
    for item in common:
        style = colour.get(item.verdict)
        cells = [item.name]
        for content in (before, after):
            figure = content["figures"][item.name]
            cells += [show_value(figure["value"]), show_spread(figure)]
        table.add_row(*cells, f"{item.ratio:.3f}", item.unit, item.verdict, style=style)
    console.print(table)
    for name in only_before:
        console.print(f"only before: {name}", highlight=False, markup=False)
    for name in only_after:
        console.print(f"only after: {name}", highlight=False, markup=False)
    for text in warnings_of(before, after):
        console.print(f"note: {text}", highlight=False, markup=False)


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MB.

    From /proc where there is one: ``ru_maxrss`` starts at the size of the process that launched this one.
    """
    peak = _status_mb("VmHWM")
    if peak is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def private_memory_mb() -> float | None:
    """Resident memory of this process that is no page of a file, in MB; None without /proc.

    The kernel takes pages of files back where it needs room, and counts them to whoever has read them last.
    """
    return _status_mb("RssAnon")


def _status_mb(name: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**10
