"""Two gloo processes distil as one does; with a pool each makes images of its own and trains on those of both."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dda_run import make_teacher, trained
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "support" / "dda_run.py"


def two(folder, variant, stop=None):
    """What each of two processes ends with; with `stop` both break off before that batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(SCRIPT), str(folder / "run"), variant]
    rest = [port] if stop is None else [port, str(stop)]
    started = [
        subprocess.Popen([*command, str(rank), *rest], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=280)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    if stop is not None:
        assert all("killed" in error for error in errors), errors
        return None
    assert [process.returncode for process in started] == [0, 0], "\n".join(error[-2000:] for error in errors)
    made = [folder / f"rank{rank}.pt" for rank in (0, 1)]
    return [torch.load(path, weights_only=True) for path in made if path.is_file()]


def test_two_processes_find_the_student_of_one(tmp_path):
    """With the rotation head, whose gradients are averaged by hand, and with clipping, after the average."""
    make_teacher(tmp_path)
    module, trainer = trained(tmp_path / "one", "bank")
    found = two(tmp_path, "bank")
    for name, value in module.state_dict().items():
        assert torch.equal(found[0]["state"][name], found[1]["state"][name]), name
        torch.testing.assert_close(
            found[0]["state"][name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in ("val/agreement", "val/loss"):
        assert found[0]["values"][name] == pytest.approx(float(trainer.callback_metrics[name]), rel=1e-3, abs=1e-4)


def test_a_bank_of_two_processes_is_that_of_one_item_by_item(tmp_path):
    """Five calls: the second process lacks one, and makes an early one again."""
    make_teacher(tmp_path)
    module, _ = trained(tmp_path / "one", "synthesis")
    module.export(tmp_path / "one")
    two(tmp_path, "synthesis")
    for name in ("bank.safetensors", "manifest.csv", "bank.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert len(load_file(tmp_path / "one" / "bank.safetensors")["images"].unique(dim=0)) == 60


@pytest.fixture(scope="module")
def with_pool(tmp_path_factory):
    """What two processes with a pool end with."""
    folder = tmp_path_factory.mktemp("pool")
    make_teacher(folder)
    return two(folder, "pool")


def test_processes_with_a_pool_share_a_student_and_all_images(with_pool):
    one, other = with_pool
    for name, value in one["state"].items():  # running statistics of student and alignment among them
        assert torch.equal(other["state"][name], value), name
    size, own, images, labels = one["pool"]
    assert (size, own) == (72, 36)
    assert (size, own) == tuple(other["pool"][:2])
    assert torch.equal(images, other["pool"][2])
    assert torch.equal(labels, other["pool"][3])
    # Files are disjoint: what one process made, the other did not.
    assert len(images.unique(dim=0)) == 72
    both = torch.cat([one["own"], other["own"]])
    assert len(both.unique(dim=0)) == 72
    assert torch.equal(both.unique(dim=0), images.unique(dim=0))


@pytest.mark.slow
def test_two_processes_with_a_pool_go_on_inside_an_epoch(tmp_path, with_pool):
    make_teacher(tmp_path)
    two(tmp_path, "pool", stop=6)
    for found, expected in zip(two(tmp_path, "pool"), with_pool, strict=True):
        for name, value in expected["state"].items():
            assert torch.equal(found["state"][name], value), name
        assert torch.equal(found["pool"][2], expected["pool"][2])
