"""One benchmark at two commits, in turn, so that a machine that slows down for a while slows both."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from leanlight.benchmarks.children import measure_in_child
from leanlight.benchmarks.core import compare, print_comparison
from leanlight.contracts.errors import UserError


def compare_commits(method: str, revisions: Sequence[str], rounds: int, quick: bool, console: Console) -> None:
    """Measure A, B, A, B, … and show what differs by more than the rounds of each do.

    Args:
        method: whose benchmark.
        revisions: two names of commits in the git checkout that the working directory belongs to.
        rounds: measurements of each.
        quick: tiny sizes.
        console: where to.
    """
    commits = [_commit(revision) for revision in revisions]
    labels = [f"{revision} ({commit[:8]})" for revision, commit in zip(revisions, commits, strict=True)]
    found: list[list[dict[str, Any]]] = [[], []]
    with _worktrees(commits) as trees:
        sides = [*zip(labels, trees, found, strict=True)]
        for label, tree, _ in sides:
            _check_suite(tree, label)
        for number in range(rounds):
            for label, tree, taken in sides:
                console.print(f"round {number + 1} of {rounds}: {label}", highlight=False, markup=False)
                taken.append(_measure(method, quick, tree, label))
    before, after = (_merged(documents) for documents in found)
    print_comparison(before, after, console)
    differences = [item for item in compare(before, after)[0] if item.verdict]
    beyond = [f"{item.name} ({item.verdict})" for item in differences if item.verdict != "same"]
    text = f"{len(beyond)} of {len(differences)} differences exceed the noise"
    console.print(": ".join([text, *([", ".join(beyond)] if beyond else [])]), highlight=False, markup=False)


def _check_suite(tree: Path, label: str) -> None:
    """Without a suite in `tree` Python would find the one that is installed, and measure that twice."""
    if not (tree / "leanlight" / "__main__.py").is_file():
        raise UserError(f"--commits: {label} has no leanlight/__main__.py, so there is nothing to measure")


def _measure(method: str, quick: bool, tree: Path, label: str) -> dict[str, Any]:
    try:
        return measure_in_child(method, quick, tree, quiet=True)
    except UserError as error:
        raise UserError(f"--commits: {label}: {error}") from error


def _merged(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A document of a commit's rounds: medians over them, and the widest spread: every round's quartiles lie in it."""
    figures = {}
    for name, last in documents[-1]["figures"].items():
        rounds = [each["figures"][name] for each in documents if name in each["figures"]]
        value = statistics.median(figure["value"] for figure in rounds)
        low, high = min(figure["low"] for figure in rounds), max(figure["high"] for figure in rounds)
        figures[name] = {**last, "value": value, "low": low, "high": high, "n": sum(each["n"] for each in rounds)}
    return {**documents[-1], "figures": figures}


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except OSError as error:
        raise UserError(f"--commits: cannot run git ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"--commits: git {arguments[0]}: {' '.join(error.stderr.split())}") from error


def _commit(revision: str) -> str:
    try:
        return _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    except UserError as error:
        expected = f"expected two commits of the git checkout that {Path.cwd()} belongs to, got {revision!r}"
        raise UserError(f"--commits: {expected} ({str(error).removeprefix('--commits: ')})") from None


@contextmanager
def _worktrees(commits: Sequence[str]) -> Iterator[list[Path]]:
    """The files of each commit in a folder of its own, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="leanlight-commits-") as folder, ExitStack() as stack:
        trees = [Path(folder) / str(number) for number in range(len(commits))]
        for tree, commit in zip(trees, commits, strict=True):
            _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
            stack.callback(_git, "worktree", "remove", "--force", str(tree))
        yield trees
