"""What the terminal shows while and after a table is reproduced."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from leanlight.results.format import columns, show_measured, show_number, show_seconds
from leanlight.results.launch import Job

VERDICT_STYLE = {"reproduced": "green", "not_reproduced": "red", "inconclusive": "yellow", "not_tested": "dim"}


class CellProgress:
    """A bar over cells with the time that is left, and a line for each running cell; plain lines without a terminal."""

    def __init__(self, total: int, console: Console | None = None, what: str = "cells") -> None:
        self.console = console or Console()
        self.total, self.done = total, 0
        self._lines: dict[str, Any] = {}
        self._begin = time.monotonic()
        self._bar: Progress | None = None
        if self.console.is_terminal and total:
            fields = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("state", "left"))
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TimeElapsedColumn(),
                *fields,
            )
            self._bar = Progress(*columns, console=self.console)
            self._all = self._bar.add_task(what, total=total, state=f"0/{total}", left="")

    def __enter__(self) -> CellProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def started(self, job: Job) -> None:
        """A cell starts."""
        if self._bar:
            self._lines[job.key] = self._bar.add_task(f"  {job.key}", total=None, state="running", left="")
        else:
            self.say(f"start {job.key}")

    def ended(self, job: Job, outcome: str) -> None:
        """A cell has ended."""
        self.done += 1
        took = time.monotonic() - job.started if job.started else 0.0
        left = (time.monotonic() - self._begin) / self.done * (self.total - self.done)
        estimate = f"about {show_seconds(left)} left" if left else ""
        if self._bar:
            if job.key in self._lines:
                self._bar.remove_task(self._lines.pop(job.key))
            self._bar.update(self._all, advance=1, state=f"{self.done}/{self.total}", left=estimate)
            self.say(f"{job.key}: {outcome} in {show_seconds(took)}")
        else:
            self.say(f"[{self.done}/{self.total}] {job.key}: {outcome} in {show_seconds(took)}  {estimate}".rstrip())

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        self.console.print(Text(text), soft_wrap=True)
        sys.stdout.flush()


def print_document(document: Mapping[str, Any], console: Console | None = None) -> None:
    """Show rows and verdicts of a finished table."""
    console = console or Console()
    table = Table(title=Text(document["title"]), title_justify="left")
    table.add_column("row")
    shown = columns(document)
    for metric in shown.values():
        table.add_column(Text(metric["label"]), justify="right")
    table.add_column("n", justify="right")
    table.add_column("seconds", justify="right")
    for row in document["rows"]:
        cells = [show_measured(row["metrics"].get(name), metric) for name, metric in shown.items()]
        mark = " (stale)" if row["stale"] else ""
        table.add_row(Text(row["label"] + mark), *cells, str(len(row["seeds"])), show_number(row["wall_s"], 0))
    console.print(table)
    for claim in document["claims"]:
        verdict = claim["verdict"]
        line = Text(f"{verdict.replace('_', ' '):<15}", style=VERDICT_STYLE[verdict])
        console.print(line.append(f"{claim['text']}  [{claim['evidence']['why']}]", style="default"), soft_wrap=True)


def print_plan(lines: Sequence[tuple[str, str, str, str]], console: Console | None = None) -> None:
    """Show what would be done: cell, action, reason, run folder."""
    console = console or Console()
    for key, action, why, place in lines:
        console.print(Text(f"{action:<8} {key:<28} {why}  {place}"), soft_wrap=True)
