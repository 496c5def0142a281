"""One writer a run folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leanlight.contracts.errors import UserError

_HELD = "LEANLIGHT_LOCK"  # environment of a child: the descriptor and path of a lock that was taken for it


class RunLock:
    """Keeps two processes from writing into one run folder.

    The file ``.<run id>.lock`` stands beside the folder, since a fresh start removes the folder itself. It is locked
    (flock) while its owner lives, and says who that is. What a dead process of this machine left is taken over. A
    process of another machine cannot be looked at, so its lock is refused until it is removed; but a job that SLURM
    requeued takes over what it left on another node.

    Limits: on a file system without flock a number that the system gave to another process counts as the owner, and
    two machines that take a lock within a moment may both get it.

    Args:
        run_dir: the run folder, which need not exist.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.resolve()
        self.path = self.run_dir.with_name(f".{self.run_dir.name}.lock")
        self.fd = -1
        self._adopted = False

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock, or the one that the parent process took for this one.

        Args:
            wait: until another process of this machine lets go; else return False at once.

        Raises:
            UserError: `wait`, but the lock is of another machine, which may never let go.
        """
        fd, _, path = os.environ.get(_HELD, "").partition(":")
        if path == str(self.path):
            del os.environ[_HELD]
            self.fd, self._adopted = int(fd), True
            os.set_inheritable(self.fd, False)
        elif not self._lock(wait):
            return False
        elif self._is_held_elsewhere():
            os.close(self.fd)
            if wait:
                raise UserError(self.busy())
            return False
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        owner["since"] = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, json.dumps(owner).encode(), 0)
        return True

    def _lock(self, wait: bool) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(self.fd)
                return False
            except OSError:
                return True  # a file system without flock: the owner's name has to do
            with suppress(FileNotFoundError):  # its owner has removed it since we opened it
                if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                    return True
            os.close(self.fd)

    def _is_held_elsewhere(self) -> bool:
        """Whether the owner that the file names may be at work although flock has let us in."""
        owner = self.owner()
        if not owner or (owner["job"] is not None and owner["job"] == os.environ.get("SLURM_JOB_ID")):
            return False
        if owner["host"] != socket.gethostname():
            return True
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # again: whether this file system knows it
        except OSError:
            return _lives(owner["pid"])
        return False

    def owner(self) -> dict[str, Any]:
        """host, pid, SLURM job and begin of the process that has or had the lock; empty for none."""
        try:
            return dict(json.loads(self.path.read_bytes()))
        except (OSError, ValueError):
            return {}

    def busy(self) -> str:
        """Who works in the folder, and what helps."""
        owner = self.owner()
        what = f"{self.run_dir}: another process works in this run folder"
        if not owner:
            return f"{what}; wait for it"
        if owner["host"] == socket.gethostname():
            return f"{what} (process {owner['pid']}, since {owner['since']}); wait for it"
        return (
            f"{what} (process {owner['pid']} on {owner['host']}, since {owner['since']}); wait for it, or, if it has "
            f"died there, remove {self.path}"
        )

    def for_child(self) -> dict[str, str]:
        """Environment of a child that shall work under this lock; it also needs `fd` (``pass_fds``)."""
        return held_for_child(self.fd, str(self.path))

    def release(self) -> None:
        """Let go; what was taken for this process by its parent is the parent's to remove."""
        if not self._adopted:
            self.path.unlink(missing_ok=True)
        os.close(self.fd)


def held_for_child(fd: int, path: str) -> dict[str, str]:
    """Environment of a process that has the lock at `path` from its parent, as descriptor `fd`."""
    return {_HELD: f"{fd}:{path}"}


@contextmanager
def locked(run_dir: Path, waiting: Callable[[], None] | None = None) -> Iterator[RunLock]:
    """Work in a run folder that nobody else may write into meanwhile.

    Args:
        run_dir: the run folder, which need not exist.
        waiting: wait for another process of this machine, and call this first.

    Raises:
        UserError: somebody else works there, or the folder above cannot be written.
    """
    lock = RunLock(run_dir)
    try:
        free = lock.acquire()
        if not free and waiting is not None:
            waiting()
            free = lock.acquire(wait=True)
    except OSError as error:
        raise UserError(f"trainer.default_root_dir: cannot write {lock.path.parent} ({error.strerror})") from error
    if not free:
        raise UserError(lock.busy())
    try:
        yield lock
    finally:
        lock.release()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
