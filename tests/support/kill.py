"""Kill commands at moments of a test's choice, as a power cut would."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def start(folder, *arguments, **environment):
    """Start a command of the suite in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "leanlight", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kill(process, folder):
    """Kill a command and all that it started: stages of a pipeline are in process groups of their own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    for child in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() == os.readlink(child / "cwd").encode():
                os.kill(int(child.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


def kill_when(process, folder, condition):
    """Kill a command once `condition` holds; AssertionError when it ends before."""
    while not condition():
        assert process.poll() is None, f"it ended before: {process.stderr.read().decode()[-2000:]}"
        time.sleep(0.001)
    kill(process, folder)


def finish(process, timeout=600):
    """Wait for a command that must end well."""
    _, error = process.communicate(timeout=timeout)
    assert process.returncode == 0, error.decode()[-3000:]


def run_dir(folder):
    """The only run below `folder`, whose id is ``a``."""
    (found,) = folder.glob("runs/*/*/a")
    return found


def rows(folder):
    """Lines of that run's ``metrics.csv`` so far; 0 before there is one."""
    found = list(folder.glob("runs/*/*/a/metrics.csv"))
    return found[0].read_bytes().count(b"\n") if found else 0
