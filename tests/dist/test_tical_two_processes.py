"""Two gloo processes with half the batch each train one network with one list of anchors, and measure the same."""

import pytest
import torch
from short_fit import fit

SMALL = [f"--data.init_args.planted.{name}={value}" for name, value in {"train": 256, "val": 61, "test": 61}.items()]
MODEL = ["network.init_args.encoding={dim: 8, dropout: 0.0}", "optimizer.init_args.lr=0.05"]
ASSESSED = ["assessment.warmup_epochs=1", "assessment.theta=0.2", "assessment.length=64"]
# A config, and whether its clips are assessed.
VARIANTS = {"": True, "__soft": True, "__missing": True, "__attention": False, "__self_mm": False}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name else name for name in VARIANTS])
def test_two_processes_equal_one(tmp_path, name):
    assessed = ASSESSED if VARIANTS[name] else []
    options = ["--config", f"tical/planted_small{name}", *SMALL]
    options += [f"--model.init_args.{option}" for option in [*MODEL, *assessed]]
    one, one_metrics = fit(tmp_path / "one", *options, "--data.init_args.batch_size=32", "--trainer.devices=1")
    two, two_metrics = fit(
        tmp_path / "two", *options, "--config=trainer/ddp", "--data.init_args.batch_size=16", "--trainer.devices=2"
    )
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    measured = [key for key in one_metrics if key.startswith(("val/", "test/")) and "energy" not in key]
    assert {"val/accuracy", "test/accuracy_conflicted"} <= set(measured)
    for key in measured:
        assert two_metrics[key] == pytest.approx(one_metrics[key], rel=1e-3, abs=1e-4), key
