"""Two gloo processes with half the batch each equal one process with the whole batch."""

import pytest
import torch
from short_fit import fit

from leanlight.registry import METHODS


def test_the_classifier_trains_the_same_on_two_processes(tmp_path):
    config = ["--config", METHODS["classifier"].smallest]
    one, one_metrics = fit(tmp_path / "one", *config, "--data.init_args.batch_size=64", "--trainer.devices=1")
    two, two_metrics = fit(
        tmp_path / "two", *config, "--config=trainer/ddp", "--data.init_args.batch_size=32", "--trainer.devices=2"
    )
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in ("val/accuracy", "val/loss", "test/accuracy", "test/loss"):
        assert two_metrics[name] == pytest.approx(one_metrics[name], rel=1e-3, abs=1e-4), name
