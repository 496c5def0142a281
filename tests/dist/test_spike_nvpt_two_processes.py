"""Prompts that two gloo processes tune, with half the batch each, have the bits that one process finds."""

import pytest
import torch
from short_fit import fit

TUNING = "--model.init_args.tuning.init_args"
DEEP: list[str] = []
LAST = [f"{TUNING}.depth=last", f"{TUNING}.blocks=2"]  # stored values, which each process computes for itself
# Both processes draw the same noise and keep the same potentials.
NOISY = [f"{TUNING}.prompts.init_args.sigma=0.2", f"{TUNING}.prompts.init_args.time_mode=across_iterations"]


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(DEEP, id="deep"),
        pytest.param(LAST, id="last", marks=pytest.mark.slow),
        pytest.param(NOISY, id="noisy and carried", marks=pytest.mark.slow),
    ],
)
def test_two_processes_find_the_bits_of_one(tmp_path, variant):
    config = ["--config", "spike_nvpt/digits_small", "--model.init_args.prompt_lr=50", *variant]
    one, one_metrics = fit(tmp_path / "one", *config, "--data.init_args.batch_size=64", "--trainer.devices=1")
    two, two_metrics = fit(
        tmp_path / "two", *config, "--config=trainer/ddp", "--data.init_args.batch_size=32", "--trainer.devices=2"
    )
    assert one_metrics["train/flips"] > 0
    for name in ("train/flips", "train/density", "test/stored_bits", "test/trained_parameters"):
        assert two_metrics[name] == one_metrics[name], name
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in ("val/accuracy", "val/loss", "test/accuracy", "test/loss"):
        assert two_metrics[name] == pytest.approx(one_metrics[name], rel=1e-3, abs=1e-4), name
