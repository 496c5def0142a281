"""Processes that run checks side by side, what is timed alone; every result is on disk as soon as it is there."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from leanlight import runs
from leanlight.benchmarks.gpu.checks import document, entry, markdown, merged, without_places, without_value
from leanlight.contracts.files import atomic_write

WORKER = "leanlight.benchmarks.gpu.worker"
Messages = queue.Queue[tuple["Worker", str | None]]


@dataclass
class Documents:
    """``gpu.json`` of every group, written anew after each check.

    Args:
        folder: of all results; a group's document is ``folder/group/gpu.json``.
        facts: gives date, code and machine; asked once, when the first line comes.
        merge: whether lines of an earlier document stay, where this run has none and machine and code are the same.
        told: called with group and line after each check.
    """

    folder: Path
    facts: Callable[[], Mapping[str, Any]]
    merge: bool = False
    told: Callable[[str, dict[str, Any]], None] = lambda group, line: None
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _before: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    @cached_property
    def _facts(self) -> Mapping[str, Any]:
        return self.facts()

    def add(self, group: str, line: dict[str, Any]) -> None:
        """Take a line; write the document of its group and the page beside it."""
        path = self.folder / group / "gpu.json"
        if group not in self._before:
            self._before[group] = read(path) if self.merge else None
        self.lines.setdefault(group, []).append(line)
        content = merged(self._before[group], document(group, self._facts, self.lines[group]))
        atomic_write(path, json.dumps(content, indent=2) + "\n")
        atomic_write(path.with_suffix(".md"), markdown(content))
        self.told(group, line)


def read(path: Path) -> dict[str, Any] | None:
    """A document, or None where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("kind") == "gpu" else None


class Worker:
    """A process with checks to run, started anew for the rest when it dies under one.

    Args:
        groups: whose checks.
        folder: for run folders and the log.
        cores: threads of its CPU work.
        only: names of checks; all by default.
        alone: those that are timed, or the others.
        device: what is checked.
        command: starts a worker; the task follows as JSON.
    """

    def __init__(
        self,
        groups: Sequence[str],
        folder: Path,
        cores: int,
        only: Sequence[str] = (),
        alone: bool = False,
        device: str = "cuda",
        command: Sequence[str] = (sys.executable, "-m", WORKER),
    ) -> None:
        self.groups, self.cores, self.command = groups, cores, command
        self.task: dict[str, Any] = {"groups": list(groups), "only": list(only), "alone": alone, "device": device}
        self.task |= {"folder": str(folder), "done": []}
        self.log = folder / f"{'alone' if alone else groups[0]}.log"
        self.may_begin = not alone
        self.left: list[list[str]] | None = None  # [group, name, what]; None before the process has said it
        self.begun = False
        self.process: subprocess.Popen[str] | None = None

    def start(self, messages: Messages) -> None:
        """Start the process for what is left. messages: takes its lines, and None at its end."""
        self.begun = False
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*self.command, json.dumps(self.task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env=environment(self.cores),
            )
        threading.Thread(target=self._read, args=(self.process, messages), daemon=True).start()
        if self.may_begin:
            self.begin()

    def _read(self, process: subprocess.Popen[str], messages: Messages) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            messages.put((self, line))
        process.wait()
        messages.put((self, None))

    def begin(self) -> None:
        """Let the process run its checks once it has imported everything."""
        self.may_begin = True
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has died; its end is on the way as a message
                self.process.stdin.write("begin\n")
                self.process.stdin.close()

    def stop(self) -> None:
        """Kill the process and all it has started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def take(self, message: Mapping[str, Any], documents: Documents) -> None:
        """Take a message of the process."""
        if "listed" in message:
            self.left = message["listed"]
        elif "begun" in message:
            self.begun = True
        else:
            assert self.left is not None
            self.left = [item for item in self.left if item[:2] != message["done"]]
            self.task["done"].append(message["done"])
            documents.add(message["done"][0], message["line"])

    def ended(self, documents: Documents) -> bool:
        """Note the check under which the process has died; whether some are left for another one."""
        if self.left is None:
            self.left = [[group, "start", "its checks can be listed"] for group in self.groups]
        if not self.left:
            return False
        # One that dies before its first check would die again.
        lost, self.left = (self.left[:1], self.left[1:]) if self.begun else (self.left, [])
        for group, name, what in lost:
            documents.add(group, entry(name, what, "failed", without_value(self._last_words())))
            self.task["done"].append([group, name])
        return bool(self.left)

    def _last_words(self) -> str:
        assert self.process is not None
        words = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        return without_places(f"its process ended with {self.process.returncode}: {' | '.join(words)}")

    def give_up(self, documents: Documents) -> None:
        """Stop; what is left was not run."""
        self.stop()
        left = (
            [[group, "start", "its checks can be listed"] for group in self.groups] if self.left is None else self.left
        )
        for group, name, what in left:
            documents.add(group, entry(name, what, "not_run", without_value("the limit of time was reached")))


def environment(cores: int) -> dict[str, str]:
    """What a worker sees: the caller's search path behind the project, its share of the cores, repeatable cuBLAS."""
    path = os.pathsep.join([str(runs.PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(max(1, cores)))
    # Read when cuBLAS starts, so before any run asks for it.
    return {**os.environ, **threads, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def run(beside: Sequence[Worker], alone: Worker | None, documents: Documents, deadline: float) -> None:
    """Run all workers; what is not done at the deadline is marked as not run.

    Args:
        beside: run at the same time.
        alone: runs when they have ended; it starts with them and waits.
        documents: take the results.
        deadline: ``time.monotonic()`` at which everything is stopped.
    """
    messages: Messages = queue.Queue()
    running = [*beside, *([alone] if alone else [])]
    try:
        for worker in running:
            worker.start(messages)
        while running and time.monotonic() < deadline:
            if running == [alone] and alone is not None and not alone.may_begin:
                alone.begin()
            try:
                worker, message = messages.get(timeout=max(0.01, min(1.0, deadline - time.monotonic())))
            except queue.Empty:
                continue
            if message is not None:
                worker.take(json.loads(message), documents)
            elif worker.ended(documents):
                worker.start(messages)
            else:
                running.remove(worker)
    finally:
        for worker in running:
            worker.give_up(documents)
