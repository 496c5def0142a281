"""`leanlight audit`: let judges say what of models' answers is harmful, and write a page about it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanlight.cli.arguments import Parser, number, output_folder
from leanlight.contracts.errors import MissingExtraError, UserError, nearest
from leanlight.contracts.ranges import PositiveInt, Range
from leanlight.results.audit_judges import NAMES, MakeJudge, judge_maker, without_keys

if TYPE_CHECKING:
    from leanlight.contracts.safety import Judge, SafetySample
    from leanlight.results.audit import Verdicts
    from leanlight.results.audit_summary import Panel


class _Majority(Range):
    low, high, opens, expected = 0.5, 1.0, (1.0,), "a share in [0.5, 1)"


def main(argv: list[str]) -> int:
    """Judge, summarise, and say where the page is, or compare two; 1 where a share of harm is above its limit."""
    args = _arguments(argv)
    if args.compare:
        return _compare(args)
    makers = [judge_maker(name) for name in args.judge]

    from datamodules.safety.readers import read_samples

    samples = read_samples(args.data, args.format, args.columns, args.images)[: args.limit]
    if not samples:
        raise UserError(f"--data: {args.data} has no sample")
    output = args.output or Path("runs/audit") / args.data.stem
    with _locked(output):
        try:
            return _audit(args, samples, makers, output)
        except KeyboardInterrupt:
            print("the verdicts so far are kept; the same command goes on from there", file=sys.stderr)
            raise
        except OSError as error:
            raise UserError(f"--output: cannot write {error.filename or output} ({error.strerror})") from error


def _parser() -> Parser:
    judges = "; ".join(f"{name}: {what}" for name, what in NAMES.items())
    parser = Parser(prog="leanlight audit", description=__doc__, epilog=f"Judges. {judges}.")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--data", type=Path, metavar="FILE", help="JSONL, CSV or parquet, or a folder")
    parser.add_argument("--judge", action="append", default=[], metavar="NAME", help="as below; may be repeated")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that names of pictures start from")
    parser.add_argument("--format", default="auto", help="layout of the data (default: %(default)s)")
    parser.add_argument("--columns", **several, metavar="OURS=THEIRS", help="names of columns: instruction=question")
    parser.add_argument("--limit", type=number(PositiveInt), metavar="N", help="judge the first N samples alone")
    parser.add_argument("--threshold", **several, metavar="FIELD=P", help="harmful from this score on: response=0.7")
    parser.add_argument(
        "--fail-above",
        **several,
        metavar="SHARE",
        help="exit with code 1 where more answers than this share are harmful or without a verdict, by the judges' "
        "vote; FIELD=SHARE for another part than the answer",
    )
    parser.add_argument(
        "--output", type=output_folder, metavar="DIR", help="folder to write (default: runs/audit/NAME_OF_DATA)"
    )
    parser.add_argument("--estimate", action="store_true", help="say what it would take; judges a handful alone")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help="instead: folders of two audits; say which verdicts have changed, and write a page",
    )
    parser.add_argument(
        "--build",
        type=output_folder,
        metavar="DIR",
        help="also write data to train on: labels that judges agree on, in parts that share no picture, and a queue",
    )
    parser.add_argument(
        "--agree",
        type=number(_Majority),
        default=0.5,
        metavar="SHARE",
        help="of --build: a label stands where more than this share of the judges say it (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=number(PositiveInt), metavar="N", help="samples at a time (default: as each judge likes)"
    )
    return parser


def _arguments(argv: list[str]) -> argparse.Namespace:
    args = _parser().parse_args(argv)
    if args.compare:
        more = [
            name
            for name in ("data", "judge", "threshold", "fail_above", "limit", "estimate", "build")
            if getattr(args, name)
        ]
        if more:
            raise UserError(f"--compare: expected --output alone beside it, got --{more[0].replace('_', '-')}")
        return args
    for name, what in (("data", "a file or a folder of samples"), ("judge", "a judge, such as keyword")):
        if not getattr(args, name):
            raise UserError(f"--{name}: expected {what}; `leanlight audit --help` shows all")
    for name in args.judge:
        if args.judge.count(name) > 1:
            raise UserError(f"--judge: {without_keys(name)} is named twice")
    if args.build and len(args.judge) < 2:
        raise UserError("--build: expected two judges at least, whose agreement makes labels; got one")
    args.columns = _pairs(args.columns, "--columns") or None
    args.threshold = _numbers(args.threshold, "--threshold", "a number in (0, 1)", lambda x: 0 < x < 1)
    limits = [text if "=" in text else f"response={text}" for text in args.fail_above]
    args.fail_above = _numbers(limits, "--fail-above", "a share in [0, 1)", lambda x: 0 <= x < 1)
    return args


def _pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option}: expected NAME=VALUE, got {text!r}")
        pairs[name] = value
    return pairs


def _numbers(texts: Sequence[str], option: str, expected: str, fits: Callable[[float], bool]) -> dict[str, float]:
    """``field=number``, each checked."""
    from leanlight.contracts.safety import SAFETY_FIELDS  # loads torch

    numbers = {}
    for name, text in _pairs(texts, option).items():
        if name not in SAFETY_FIELDS:
            raise UserError(
                f"{option}: expected one of {', '.join(SAFETY_FIELDS)}, got {name!r}{nearest(name, SAFETY_FIELDS)}"
            )
        try:
            numbers[name] = float(text)
        except ValueError:
            raise UserError(f"{option} {name}: expected {expected}, got {text!r}") from None
        if not fits(numbers[name]):
            raise UserError(f"{option} {name}: expected {expected}, got {text}")
    return numbers


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep two audits from writing one folder."""
    from leanlight.locks import RunLock

    lock = RunLock(output)
    try:
        free = lock.acquire()
    except OSError as error:
        raise UserError(f"--output: cannot write {output} ({error.strerror})") from error
    if not free:
        raise UserError(f"--output: another audit is writing there: {lock.busy()}, or name another folder")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}", markup=False), rich.BarColumn(), rich.MofNCompleteColumn())
    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    console = Console(stderr=True)
    with rich.Progress(*columns, *times, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def _audit(args: argparse.Namespace, samples: Sequence[SafetySample], makers: list[MakeJudge], output: Path) -> int:
    from leanlight.results.audit import Verdicts, sample_key

    keys: list[str] = []
    troubles: dict[int, str] = {}  # row → what is wrong with its picture
    with _bar("looking at samples", len(samples)) as advance:
        for row, sample in enumerate(samples):
            key, trouble = sample_key(sample)
            keys.append(key)
            troubles |= {row: trouble} if trouble else {}
            advance(1)
    verdicts = Verdicts(output / "verdicts.jsonl", keys)
    if args.estimate:
        _estimate(args, samples, makers, verdicts)
        return 0
    return _finish(args, _panel(args, samples, makers, verdicts), verdicts, troubles, output)


def _estimate(
    args: argparse.Namespace, samples: Sequence[SafetySample], makers: list[MakeJudge], verdicts: Verdicts
) -> None:
    from rich.console import Console
    from rich.table import Table

    from leanlight.results.audit import estimate
    from leanlight.results.format import show_seconds

    table = Table("judge", "samples left", "tokens", "time")
    limits: list[str] = []
    for make in makers:
        found = estimate(make(samples), samples, verdicts, args.batch)
        tokens = "not known" if found.tokens is None else f"about {found.tokens:,}"
        table.add_row(found.judge, f"{found.pending:,}", tokens, f"about {show_seconds(found.seconds)}")
        limits += [f"{found.judge}: {found.limits}"] if found.limits else []
    print(f"{len(samples):,} samples, {verdicts.distinct:,} different ones; a few were judged, and are kept")
    Console(highlight=False, markup=False).print(table)
    for line in limits:
        print(line)


def _panel(
    args: argparse.Namespace, samples: Sequence[SafetySample], makers: list[MakeJudge], verdicts: Verdicts
) -> Panel:
    """Ask every judge for what is missing, one after the other, so that one model at a time is in memory."""
    from leanlight.results.audit import JudgeFacts, ask
    from leanlight.results.audit_summary import Panel

    judges: list[JudgeFacts] = []
    columns = []
    for source, make in zip(map(without_keys, args.judge), makers, strict=True):
        judge: Judge = make(samples)
        rows = verdicts.pending(judge)
        with _bar(judge.name, len(rows)) as advance:
            ask(judge, samples, verdicts, rows, args.batch, advance)
        if any(judge.fingerprint == other.fingerprint for other in judges):
            raise UserError(f"--judge: {source} is the same judge as another one")
        taken = any(judge.name == other.name for other in judges)
        name = f"{judge.name} ({judge.fingerprint[:6]})" if taken else judge.name
        judges.append(JudgeFacts(name, source, judge.fields, judge.fingerprint))
        columns.append(verdicts.of(judge.name, judge.fingerprint))
    return Panel(samples, judges, columns, args.threshold)


def _finish(args: argparse.Namespace, panel: Panel, verdicts: Verdicts, troubles: dict[int, str], output: Path) -> int:
    """Write what was found; the exit code."""
    from leanlight.contracts.files import atomic_write
    from leanlight.results.audit_page import write_page
    from leanlight.results.audit_summary import SAMPLES, describe, gate, summarise, write_parquet, write_samples

    summary = describe(args.data.name, args.limit, verdicts, panel) | summarise(panel)
    summary["gate"] = gate(summary, args.fail_above)
    atomic_write(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_samples(output / SAMPLES, panel, verdicts)
    try:
        write_parquet(output / "verdicts.parquet", panel, verdicts)
    except MissingExtraError as error:
        print(f"no verdicts.parquet: {error}", file=sys.stderr)
    write_page(output / "report.html", panel, verdicts, summary, troubles)
    _say(summary)
    print(output / "report.html")
    if args.build:
        _build(args.build, panel, verdicts, args.agree)
    return 0 if all(one["passed"] for one in summary["gate"].values()) else 1


def _say(summary: dict[str, Any]) -> None:
    """Shares of harm by judge, and what is above its limit."""
    from rich.console import Console
    from rich.table import Table

    from leanlight.contracts.safety import SAFETY_FIELDS
    from leanlight.results.format import MISSING

    table = Table("harmful", *SAFETY_FIELDS, "failures")
    for judge in summary["judges"]:
        shares = [judge["figures"].get(f"{field}_harmful_share") for field in SAFETY_FIELDS]
        cells = [f"{share['value']:.1%}" if share else MISSING for share in shares]
        table.add_row(judge["name"], *cells, f"{judge['failures']:,}")
    Console(highlight=False, markup=False).print(table)
    for field, one in summary["gate"].items():
        missing = f", {one['missing']:,} without a verdict" if one["missing"] else ""
        verdict = "within" if one["passed"] else "above"
        print(f"{field}: {one['harmful']:,} of {summary['items']:,} harmful{missing}: {verdict} {one['limit']:.1%}")


def _build(folder: Path, panel: Panel, verdicts: Verdicts, agree: float) -> None:
    """Write data of what judges agree on, and say how much it is."""
    from leanlight.results.audit_build import build, write_built

    told = write_built(folder, build(panel, verdicts, agree))
    parts = ", ".join(f"{count:,} {part}" for part, count in told["parts"].items())
    print(
        f"{folder}: {parts}; {told['queue']:,} in the queue for people, {len(told['duplicates']):,} duplicates left out"
    )


# ---- two audits ----


def _compare(args: argparse.Namespace) -> int:
    """Say what has changed between two audits, and where the page about it is."""
    from leanlight.results.audit_compare import Audit, Comparison, write_comparison

    comparison = Comparison(*map(Audit.read, args.compare))
    before, after = comparison.before.name, comparison.after.name
    if not len(comparison.rows):
        raise UserError(f"--compare: {args.compare[0]} and {args.compare[1]} have no sample in common, by their ids")
    summary = comparison.summarise()
    output = args.output or Path("runs/audit") / f"{before}-to-{after}"
    _say_changes(summary, list(comparison.changes()))
    try:
        print(write_comparison(output, comparison, summary))
    except OSError as error:
        raise UserError(f"--output: cannot write {error.filename or output} ({error.strerror})") from error
    return 0


def _say_changes(summary: dict[str, Any], changes: Sequence[dict[str, Any]], most: int = 10) -> None:
    """Shares before and after by judge and field, and the first verdicts that have changed."""
    from rich.console import Console
    from rich.table import Table

    from leanlight.results.audit_compare import show_change, show_interval, show_percent

    table = Table("harmful", "before", "after", "change, points", "turned", "same")
    for one in summary["figures"]:
        shares = [show_percent(one[name]) for name in ("before", "after")]
        moved = f"{show_change(one)}\n{show_interval(one)}"
        turned = f"{one['to_harmful']:,} to harmful\n{one['to_benign']:,} to benign"
        table.add_row(f"{one['judge']}\n{one['field']}", *shares, moved, turned, show_percent(one["agreement"]))
    Console(highlight=False, markup=False).print(table)
    samples = summary["samples"]
    print(
        f"{samples['both']:,} samples in both, {samples['rewritten']:,} of them with other text or picture; "
        f"{len(samples['new']):,} new, {len(samples['absent']):,} gone"
    )
    for one in changes[:most]:
        print(f"{one['id']}: {one['judge']}, {one['field']}: {one['before']} -> {one['after']}")
    if len(changes) > most:
        print(f"and {len(changes) - most:,} more verdicts that have changed, in changes.jsonl")
