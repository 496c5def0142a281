"""Child processes of the suite: start, interrupt and collect them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanlight.locks import RunLock
from leanlight.results.forker import Forked, Forker

Child = subprocess.Popen[Any] | Forked
GRACE_S = 60.0  # an interrupted run gets this long to write its checkpoint
_BUSY = 75  # exit code of a job whose run folder another process works in (EX_TEMPFAIL)


def command(*arguments: str) -> list[str]:
    """Return the command that runs ``leanlight ARGUMENTS`` with this Python.

    -P keeps Python from putting the working directory first on the path, where a user's `callbacks/` or `datamodules/`
    would hide the suite's.
    """
    return [sys.executable, "-P", "-m", "leanlight", *arguments]


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(jobs: int = 1, device: str | None = None) -> dict[str, str]:
    """Environment of one of `jobs` processes side by side: its share of the cores, its GPU.

    A number of threads that was set before stands: by the user, or by `reproduce` for its pipelines. A library
    without one gets that of ``OMP_NUM_THREADS``: with more threads than OpenMP has, MKL's spin while they wait.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // jobs))
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    return {**limits, **os.environ, **({} if device is None else {"CUDA_VISIBLE_DEVICES": device})}


def visible_gpus() -> list[str]:
    """GPUs of this process, as ``CUDA_VISIBLE_DEVICES`` calls them: indices, or UUIDs and MIG parts if it does so.

    They are counted without a CUDA context, which would take memory of each.
    """
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(index) for index in range(count)])[:count]


def signal_group(process: Child, number: signal.Signals) -> None:
    """Send a signal to a child and everything it started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        process.poll()


def stop(processes: Sequence[Child]) -> None:
    """Interrupt children, so that they write their checkpoints; kill those that have not ended after `GRACE_S`."""
    for process in processes:
        if process.poll() is None:
            signal_group(process, signal.SIGINT)
    deadline = time.monotonic() + GRACE_S
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:  # also when the user presses Ctrl-C once more
        for process in processes:
            if process.poll() is None:
                signal_group(process, signal.SIGKILL)
                process.wait()


@contextmanager
def terminations_interrupt() -> Iterator[None]:
    """Let SIGTERM and a closed terminal act like Ctrl-C, so that children are stopped cleanly then too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_in_foreground(arguments: Sequence[str], env: Mapping[str, str], lock: RunLock) -> int:
    """Run a child that writes to this terminal; return its exit code. Ctrl-C stops it cleanly and is raised on."""
    env = {**env, **lock.for_child()}
    process = subprocess.Popen(arguments, env=env, start_new_session=True, pass_fds=[lock.fd])
    try:
        return process.wait()
    except BaseException:
        stop([process])
        raise


@dataclass
class Job:
    """One child process in one run folder.

    Args:
        key: how messages call it.
        run_dir: the run folder, which is locked while the child lives.
        log: where the child's output goes.
        prepare: called once the folder is locked; returns the command, or None when nothing is left to do.
    """

    key: str
    run_dir: Path
    log: Path
    prepare: Callable[[], list[str] | None]
    started: float = field(default=0.0, init=False)
    lock: RunLock = field(init=False)

    def __post_init__(self) -> None:
        self.lock = RunLock(self.run_dir)

    def start(self, env: Mapping[str, str], forker: Forker | None = None) -> Child | int:
        """Start the child, by `forker` if there is one; return it, or an exit code when there is none to start.

        Who gets a child calls `end` after it.
        """
        if not self.lock.acquire():
            return _BUSY
        process: Child | None = None
        try:
            arguments = self.prepare()
            if arguments is None:
                return 0
            self.started = time.monotonic()
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "wb") as log:
                if forker and arguments[: len(program := command())] == program:
                    process = forker.start(arguments[len(program) :], log.fileno(), self.lock)
                    return process
                process = subprocess.Popen(
                    arguments,
                    env={**env, **self.lock.for_child()},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=[self.lock.fd],
                )
            return process
        finally:
            if process is None:
                self.lock.release()

    def end(self) -> None:
        """The child has ended."""
        self.lock.release()


def run_jobs(
    jobs: Iterable[Job],
    workers: int,
    devices: Sequence[str] = (),
    *,
    started: Callable[[Job], None] = lambda job: None,
    watched: Callable[[Job, Child], None] = lambda job, process: None,
    ended: Callable[[Job, int], None] = lambda job, code: None,
) -> None:
    """Run all jobs, at most `workers` side by side, each slot on its device; one that fails does not stop the others.

    On Ctrl-C the running children are stopped cleanly; it is raised on.

    Args:
        jobs: in order of their start; each is asked for when a slot is free for it.
        workers: processes side by side.
        devices: GPUs as ``CUDA_VISIBLE_DEVICES`` names them, dealt out to the slots; none: every job sees all.
        started: told of each start.
        watched: told of each running child ten times a second.
        ended: told of each end with its exit code.
    """
    waiting, running, asking = iter(jobs), dict[int, tuple[Job, Child]](), True
    # For as many runs as there are slots imports take no longer side by side; what may use a GPU must not be forked.
    few = isinstance(jobs, Sized) and len(jobs) <= workers
    forks = not few and sys.platform == "linux" and not visible_gpus()
    forker = Forker(environment(workers)) if forks else None
    try:
        while asking or running:
            for slot in (slot for slot in range(workers) if slot not in running):
                if (job := next(waiting, None)) is None:
                    asking = False
                    break
                env = environment(workers, devices[slot % len(devices)] if devices else None)
                process = job.start(env, forker)
                if isinstance(process, int):
                    ended(job, process)
                else:
                    running[slot] = job, process
                    started(job)
            for slot, (job, process) in list(running.items()):
                watched(job, process)
                code = process.poll()
                if code is not None:
                    del running[slot]
                    job.end()
                    ended(job, code)
            time.sleep(0.1 if running else 0)
    except BaseException:
        stop([process for _, process in running.values()])
        for job, _ in running.values():
            job.end()
        raise
    finally:
        if forker:
            forker.close()


def why_failed(job: Job, code: int, lines: int = 6) -> str:
    """Exit code and the last lines of a job's log."""
    if code == _BUSY:
        return f"{job.lock.busy()} and run the command again"
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    text = job.log.read_text(errors="replace") if job.log.is_file() else ""
    tail = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-lines:]
    return "\n".join([how, *tail])
