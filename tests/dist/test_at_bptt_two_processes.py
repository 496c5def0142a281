"""Distillation on two processes equals one process that averages the same two inner runs."""

import pytest
import torch
from short_fit import fit

SHORT = [
    "--config=at_bptt/digits_small",
    "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
    "--model.init_args.evaluation.networks=3",
    "--model.init_args.evaluation.epochs=[3,6]",
]


@pytest.mark.parametrize("replicas", [1, 2])
def test_two_processes_equal_one_that_averages_the_same_two_inner_runs(tmp_path, replicas):
    short = [*SHORT, f"--model.init_args.replicas={replicas}"]
    one, one_metrics = fit(
        tmp_path / "one",
        *short,
        "--data.init_args.batch_size=200",
        "--trainer.devices=1",
        "--model.init_args.inner_runs=2",
    )
    two, two_metrics = fit(
        tmp_path / "two", *short, "--config=trainer/ddp", "--data.init_args.batch_size=100", "--trainer.devices=2"
    )
    assert not torch.equal(one["images"], torch.zeros_like(one["images"]))
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in ("val/accuracy", "test/accuracy", "test/accuracy_random"):
        assert two_metrics[name] == pytest.approx(one_metrics[name], abs=1e-6), name
