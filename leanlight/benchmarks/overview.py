"""All methods in one table of performance, and what a step of each consists of, read from the measured JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from leanlight.benchmarks.core import read, show_spread, show_value
from leanlight.benchmarks.gpu.launch import read as read_gpu
from leanlight.contracts.files import atomic_write
from leanlight.registry import methods
from leanlight.results.format import MISSING
from leanlight.results.markdown import escape, markdown_table

Document = Mapping[str, Any]
PAGE = "performance.md"


@dataclass(frozen=True)
class Shown:
    """Which figures of a benchmark stand for its method; patterns as of file names.

    Args:
        step: time or speed of its step; the last figure that fits.
        memory: what the step takes; empty where it is not measured. The last figure that fits.
        parts: what its step consists of, and what it costs beside it.
    """

    step: str
    memory: str = ""
    parts: tuple[str, ...] = ()


SHOWN = {
    "classifier": Shown(
        "step/leanlight/bare",
        "memory/fit_peak_rss",
        ("step/leanlight/*", "step/lightning/outside", "pipeline/in_memory", "pipeline/times_torchvision"),
    ),
    "esvae": Shown(
        "batch_64/ours", "memory/ours", ("layers/*", "system/share_of_step", "lightning/*", "batch_64/times_*")
    ),
    "at_bptt": Shown(
        "*window_40/exact/step",
        "*window_40/exact/memory",
        ("*window_40/*/step", "*window_40/*/memory", "*window_40/lowrank/refresh", "replicas/*"),
    ),
    "adq": Shown(
        "class_of_5000/ten_bins",
        "class_of_5000/peak_memory",
        ("class_of_*/ten_bins", "growth/slope", "kernel_*/factorised", "60000_items/*", "features/*"),
    ),
    "dda": Shown("inversion/ours", "pool/peak_large", ("inversion/*", "student/*", "samples/*", "synthesis/*")),
    "dsqn": Shown("update/dsqn_T64", parts=("update/*", "environment/*", "end_to_end/*")),
    "sfedca": Shown("cnn_100_clients/sequential", parts=("*_100_clients/*", "*_50_clients/sequential_over_plain")),
    "sfedhifi": Shown("resnet18_p1.0/training", parts=("resnet18_p0.25/*", "resnet18_p1.0/*")),
    "spike_nvpt": Shown("step/spike", "memory/spike", ("step/*", "prefix/*", "probe/speedup", "lightning/*")),
    "hid": Shown(
        "step/stamp_paper",
        "50000_items/training_memory",
        ("step/*", "graphs/*_ours", "metrics/share_of_scoring", "softmax/*_over_whole", "*_items/*", "lightning/*"),
    ),
    "tical": Shown(
        "sequences/tical", parts=("vectors/*", "sequences/*", "nearest/product", "lists/written", "lightning/*")
    ),
    "falcon_eye": Shown(
        "encoding/step",
        parts=("encoding/*_share", "training/speedup", "padding/*", "answers/*_speedup", "endpoint/*", "lightning/*"),
    ),
}


@dataclass(frozen=True)
class Value:
    """A figure as it is shown. text: with its unit."""

    name: str
    text: str


@dataclass(frozen=True)
class Ratio:
    """A figure with a bound.

    Args:
        name: of the figure.
        text: its value with unit.
        bound: ``≥ 10``.
        met: whether it keeps the bound.
    """

    name: str
    text: str
    bound: str
    met: bool


@dataclass(frozen=True)
class Row:
    """What was measured of a method on one machine.

    Args:
        method: name of its folder of results.
        page: name of the page with all figures, inside that folder.
        steps: time or speed of its step; on a GPU one for each of the paper's shapes.
        memory: as many, or none.
        ratios: figures with a bound.
        processor: what it was measured on.
        date: day.
    """

    method: str
    page: str
    steps: list[Value]
    memory: list[Value]
    ratios: list[Ratio]
    processor: str
    date: str

    @property
    def met(self) -> str:
        """``2 of 3``; a dash without bounds."""
        return f"{sum(ratio.met for ratio in self.ratios)} of {len(self.ratios)}" if self.ratios else MISSING


def row_of(document: Document) -> Row:
    """The row of a document of `leanlight benchmark`."""
    figures, shown = document["figures"], SHOWN.get(document["method"], Shown(""))
    ratios = []
    for target in document["targets"]:
        sign = "≥" if figures[target["figure"]]["better"] == "higher" else "≤"
        value = _value(target["figure"], figures[target["figure"]])
        ratios.append(Ratio(value.name, value.text, f"{sign} {show_value(target['bound'])}", target["met"]))
    step, memory = (
        [_value(name, figures[name]) for name in _fitting(figures, pattern)[-1:]]
        for pattern in (shown.step, shown.memory)
    )
    return Row(document["method"], "benchmark.md", step, memory, ratios, *_origin(document))


def gpu_row_of(document: Document) -> Row:
    """The row of a document of `make gpu`: what it has timed, and which speeds keep their bounds."""
    steps, memory, ratios = [], [], []
    for check in document["checks"]:
        part, _, name = check["name"].partition("/")
        figures = check["figures"]
        if part == "speed" and "/" not in name and "steps/s" in figures:
            steps.append(Value(name, f"{show_value(figures['steps/s'])} steps/s"))
            memory.append(Value(name, f"{show_value(figures['peak GPU memory (MiB)'])} MiB"))
        if check["tolerance"] == "at least" and check["verdict"] in ("passed", "failed"):
            bound = f"≥ {show_value(check['expected'])}"
            ratios.append(Ratio(check["name"], f"{show_value(check['value'])} x", bound, check["verdict"] == "passed"))
    return Row(document["method"], "gpu.md", steps, memory, ratios, *_origin(document))


def _origin(document: Document) -> tuple[str, str]:
    machine = document["machine"]
    return ", ".join(machine["gpus"] or [machine["cpu"]]), document["date"][:10]


def _fitting(figures: Iterable[str], *patterns: str) -> list[str]:
    return [name for name in figures if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _value(name: str, figure: Mapping[str, Any]) -> Value:
    return Value(name, f"{show_value(figure['value'])} {figure['unit']}".rstrip())


def read_rows(folder: Path) -> list[Row]:
    """A row for each measurement in a folder of results: the methods in the registry's order, then what they share."""
    order = [*methods()]
    found = sorted(
        {path.parent for name in ("benchmark.json", "gpu.json") for path in folder.glob(f"*/{name}")},
        key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name),
    )
    rows = []
    for place in found:
        if (place / "benchmark.json").is_file():
            rows.append(row_of(read(place / "benchmark.json")))
        if (document := read_gpu(place / "gpu.json")) is not None:
            rows.append(gpu_row_of(document))
    return [row for row in rows if row.steps or row.ratios]


# -- as Markdown


def performance_table(rows: Sequence[Row], link: str = "") -> str:
    """One line for each row. link: what stands before a method's folder in links to its page."""
    header = ["Method", "Processor", "Date", "Step", "Memory", "Targets met", "Ratios and bounds"]
    body = []
    for row in rows:
        ratios = [
            f"`{ratio.name}` {escape(ratio.text)} ({ratio.bound}), {'met' if ratio.met else '**missed**'}"
            for ratio in sorted(row.ratios, key=lambda ratio: ratio.met)
        ]
        cells = ["<br>".join(lines) or MISSING for lines in (_lines(row.steps), _lines(row.memory), [row.met], ratios)]
        name = f"[{escape(row.method)}]({link}{row.method}/{row.page})"
        body.append([name, escape(row.processor), row.date, *cells])
    return markdown_table(header, body, right=len(header))


def _lines(values: Sequence[Value]) -> list[str]:
    return [f"`{value.name}` {escape(value.text)}" for value in values]


def performance_page(folder: Path) -> str:
    """The page of all measurements in a folder of results; empty where there is none."""
    if not (rows := read_rows(folder)):
        return ""
    head = (
        "One line for each method and machine: the step that stands for it, what that takes, and every figure with a "
        "bound, the missed first. A method's own page has all its figures, with quartiles, and says what they are."
    )
    foot = (
        "Figures of different processors are not to be compared. `leanlight report --all` makes this page of what "
        "`leanlight benchmark --all` and `make gpu` have measured."
    )
    return "\n\n".join(["# Performance", head, performance_table(rows), foot]) + "\n"


def write_performance(*folders: Path) -> list[Path]:
    """Write the page into each folder of results that has a measurement; return the pages."""
    pages = {folder / PAGE: text for folder in folders if (text := performance_page(folder))}
    for page, text in pages.items():
        atomic_write(page, text)
    return list(pages)


def parts_table(document: Document) -> str:
    """What a method's step consists of, then its missed targets, as Markdown.

    Args:
        document: of `leanlight benchmark`.
    """
    figures = document["figures"]
    names = _fitting(figures, *SHOWN[document["method"]].parts)
    rows = [
        [f"`{name}`", show_value(figures[name]["value"]), show_spread(figures[name]), escape(figures[name]["unit"])]
        for name in names
    ]
    missed = [target for target in document["targets"] if not target["met"]]
    lines = [
        f"- **missed**: {escape(target['text'])}: {escape(_value(target['figure'], figures[target['figure']]).text)}"
        for target in missed
    ]
    processor, date = _origin(document)
    return "\n\n".join(
        [
            markdown_table(["Figure", "Median", "Quartiles", "Unit"], rows),
            "\n".join(lines) or "No target is missed.",
            f"{escape(processor)}, {date}.",
        ]
    )


# -- on the terminal


def print_overview(rows: Sequence[Row], failed: Mapping[str, str], console: Console) -> None:
    """Show a line for each row, then what could not be measured.

    Args:
        rows: in their order.
        failed: method → why.
        console: where to.
    """
    table = Table(title="Performance", title_justify="left")
    for column in ("method", "step", "memory", "met"):
        table.add_column(column)
    table.add_column("missed", no_wrap=True)
    table.add_column("processor")
    for row in rows:
        missed = [f"{ratio.name} {ratio.text} ({ratio.bound})" for ratio in row.ratios if not ratio.met]
        texts = ["\n".join(f"{value.name} {value.text}" for value in values) for values in (row.steps, row.memory)]
        style = "red" if missed else None
        table.add_row(row.method, *texts, row.met, "\n".join(missed), row.processor, style=style)
    console.print(table)
    for method, why in failed.items():
        console.print(f"failed: {method}: {why}", highlight=False, markup=False, style="red")
