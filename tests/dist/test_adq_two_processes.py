"""Two gloo processes score items as one does: records of training, whatever was repeated, and predictions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynamics_run import recorded
from short_fit import COMMON, PLAIN, run

from leanlight.predictions import load_predictions
from lit_modules.selection import DYNAMICS

SCRIPT = Path(__file__).parents[1] / "support" / "dynamics_run.py"
CONFIG = ["--config=adq/digits_small"]
TWO = ["--config=trainer/ddp", "--data.init_args.batch_size=32", "--trainer.devices=2"]


def test_records_of_two_processes_are_those_of_one_though_they_repeat_items(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out.pt")]
    started = [subprocess.Popen([*command, str(rank), str(tmp_path / "rendezvous")]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    expected = recorded()
    assert all(value.isfinite().all() for value in expected.values())
    for results in torch.load(tmp_path / "out.pt", weights_only=True):
        for stop, got in results.items():
            for name in DYNAMICS:
                assert torch.equal(got[name], expected[name]), (stop, name)


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Folder and last checkpoint of a scorer fitted by one process and by two."""
    base = tmp_path_factory.mktemp("fits")
    one = run(base / "one", *COMMON, *CONFIG, "--data.init_args.batch_size=64", "--trainer.devices=1")[0]
    two = run(base / "two", *COMMON, *CONFIG, *TWO)[0]
    return base, one, two


def test_training_on_two_processes_is_recorded_as_on_one(fits):
    _, one, two = fits
    for expected, got in zip(one["dynamics"]["epochs"], two["dynamics"]["epochs"], strict=True):
        assert torch.equal(expected.isnan(), got.isnan())
        assert 0 < expected.isnan().float().mean() < 0.05  # the batch that `drop_last` leaves out
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3, equal_nan=True)
    assert len(one["dynamics"]["epochs"]) == 2


def test_two_processes_predict_what_one_does(fits):
    base, *_ = fits
    (found,) = (base / "one").glob("runs/*/*/a")
    for processes in ([], ["--config=trainer/ddp", "--trainer.devices=2"]):
        command = [sys.executable, "-m", "leanlight", "predict", "--from", str(found), *PLAIN[:2], PLAIN[3], *processes]
        done = subprocess.run(command, cwd=base / "one", capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_predictions(path) for path in sorted(found.glob("predict*")))
    assert one.keys() == two.keys() > {"views", "texture", *DYNAMICS}
    for name, value in one.items():
        if name in ("index", "origin", "label", *DYNAMICS):
            assert torch.equal(two[name], value), name
        else:
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
