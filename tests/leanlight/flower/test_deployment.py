"""A SuperLink and two SuperNodes on loopback run a federation, and leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

MARK = "LEANLIGHT_TEST_OF_FLOWER"
# Flower starts a process for each message to a node: here two that train, and one that sends its weights.
ROUNDS = (
    '[{"class_path": "callbacks.FederatedRounds", "init_args": {"participants": 1, "candidates": 2, '
    '"selector": {"class_path": "lit_modules.sfedca.CreditSelection"}}}]'
)
CONFIG = [
    "--trainer.max_epochs=1",
    f"--trainer.callbacks={ROUNDS}",
    "--data.clients=12",
    "--run.wandb=disabled",
    "--run.id=run",
    "--run.test=none",
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def marked(mark):
    """Processes that inherited the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def flower(name, *options, env):
    # Console scripts of Flower, whichever folder they were installed into.
    package = {"flower-superlink": "flwr.superlink.cli", "flower-supernode": "flwr.supernode.cli"}[name]
    code = f"import sys; from {package} import {name.replace('-', '_')} as main; sys.argv[0] = {name!r}; main()"
    return subprocess.Popen([sys.executable, "-c", code, *options], env=env)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_two_supernodes_on_loopback_train_what_one_process_trains(tmp_path):
    root = Path(__file__).parents[3]
    port, home = free_port(), tmp_path / "flower"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    env = {
        **os.environ,
        MARK: str(tmp_path),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # Flower starts its own
    }
    leanlight = [sys.executable, "-m", "leanlight"]
    server = flower(
        "flower-superlink", "--insecure", "--port", str(port), "--disable-runtime-dependency-installation", env=env
    )
    nodes = []
    try:
        for part in range(2):
            where = "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())
            share = f"partition-id={part} num-partitions=2"
            nodes.append(flower("flower-supernode", "--insecure", *where, "--node-config", share, env=env))
        words = ["sfedca/digits_small", *CONFIG, f"--trainer.default_root_dir={tmp_path / 'there'}"]
        deployed = [*leanlight, "flower", *words, "--superlink=loopback", "--timeout=300"]
        subprocess.run(deployed, env=env, check=True, timeout=600, cwd=tmp_path)
    finally:
        for process in [*nodes, server]:
            process.terminate()
        for process in [*nodes, server]:
            process.wait(60)
    left_until = time.monotonic() + 60
    while (left := marked(tmp_path)) and time.monotonic() < left_until:
        time.sleep(1)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == []

    alone = [*leanlight, "fit", f"--config={words[0]}", *CONFIG, f"--trainer.default_root_dir={tmp_path / 'here'}"]
    subprocess.run(alone, env=env, check=True, timeout=300, cwd=tmp_path)
    runs = [tmp_path / place / "sfedca" / "digits" / "run" for place in ("here", "there")]
    here, there = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
        for run in runs
    )
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=0, atol=0, msg=name)
