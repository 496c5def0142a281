"""Start runs from one process that has imported what all of them need: imports are a third of a short run.

``python -m leanlight.results.forker DESCRIPTOR`` is that process. It imports, waits for commands at a socket, and forks
for each. A second process between it and the run tells how the run ended, since only a parent learns that.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module

from leanlight.import_path import order_path
from leanlight.locks import RunLock, held_for_child

_BYTES = 4  # of a process id or an exit code in the pipe
_LONGEST = 2**20  # bytes of a command


class Forked:
    """A run that a `Forker` has started, with what is used of `subprocess.Popen`.

    Args:
        pipe: tells the process id, and the exit code when the run has ended.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self.returncode: int | None = None
        told = os.read(pipe, _BYTES)
        if not told:
            os.close(pipe)
            raise ChildProcessError("the process that starts runs has ended; what it said stands above")
        self.pid = int.from_bytes(told, "little")

    def poll(self) -> int | None:
        """The exit code, the negative signal that killed it, or None while it runs."""
        return self._told(0)

    def wait(self) -> int:
        """Wait for the end; the exit code."""
        code = self._told(None)
        assert code is not None
        return code

    def _told(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._pipe], [], [], timeout)[0]:
            told = os.read(self._pipe, _BYTES)
            os.close(self._pipe)
            # Nothing is told only when the process between was killed, and the run with it for all we know.
            self.returncode = int.from_bytes(told, "little", signed=True) if told else -signal.SIGKILL
        return self.returncode


class Forker:
    """Starts runs as forks of a process that has imported Lightning.

    For Linux and runs without a GPU: what has asked for CUDA devices must not fork.

    Args:
        env: environment of all runs; libraries read numbers of threads from it when they are imported.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None  # begins with the first run

    def _begin(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                env=self._env,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start(self, arguments: Sequence[str], log: int, lock: RunLock) -> Forked:
        """Start ``leanlight ARGUMENTS``.

        Args:
            arguments: of the program.
            log: descriptor of the file that its output goes to.
            lock: of its run folder, under which it works.
        """
        if self._process is None:
            self._begin()
        ours, theirs = os.pipe()
        with suppress(BrokenPipeError):  # it has ended, as `Forked` then says
            text = json.dumps([list(arguments), str(lock.path)]).encode()
            socket.send_fds(self._requests, [text], [log, lock.fd, theirs])
        os.close(theirs)
        return Forked(ours)

    def close(self) -> None:
        """End the process; its runs go on."""
        if self._process:
            self._requests.close()
            self._process.wait()


def _serve(requests: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes between
    while True:
        text, descriptors, _, _ = socket.recv_fds(requests, _LONGEST, 3)
        if not text:
            return
        if not os.fork():
            requests.close()
            _watch(*json.loads(text), *descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(arguments: list[str], lock_path: str, log: int, lock: int, pipe: int) -> None:
    """Fork the run and tell how it ends; returns in neither process but by an exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    run = os.fork()
    if not run:
        os.setsid()
        os.write(pipe, os.getpid().to_bytes(_BYTES, "little"))  # only now can its group be signalled
        os.close(pipe)
        os.environ |= held_for_child(lock, lock_path)
        _run(arguments, log)
    os.close(lock)  # the run's own hold is the one that counts
    code = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
    with suppress(BrokenPipeError):  # whoever started the run has ended
        os.write(pipe, code.to_bytes(_BYTES, "little", signed=True))
    os._exit(0)


def _run(arguments: list[str], log: int) -> None:
    """Be ``python -m leanlight ARGUMENTS``; raises SystemExit."""
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    random.seed()  # not that of the other runs
    sys.argv = ["leanlight", *arguments]
    runpy.run_module("leanlight", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    order_path()
    import_module("leanlight.experiment")
    with socket.socket(fileno=int(sys.argv[1])) as incoming:
        _serve(incoming)
