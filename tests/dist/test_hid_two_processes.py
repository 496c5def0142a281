"""Two gloo processes with half the batch each train one recommender, and measure what one process measures."""

import pytest
import torch
from short_fit import fit

PLANTED = {"intents": 4, "categories": 3, "items": 10, "train_sessions": 200, "test_sessions": 61}
SMALL = [f"--data.init_args.planted.{name}={value}" for name, value in PLANTED.items()]
CONFIG = ["--config", "hid/planted_small", *SMALL, "--model.init_args.optimizer.init_args.lr=2.0"]
HID = ["--model.init_args.intents.n=4", "--model.init_args.icloss.gather=true", "--model.init_args.epsilon=0.4"]
VARIANTS = {
    "hid": HID,
    # Its least and greatest variance pick rows: greater steps make of rounding another pick.
    "hid released": [*HID, "--model.init_args.icloss.form=released", "--model.init_args.optimizer.init_args.lr=0.2"],
    "plain": ["--config", "hid/planted_small__plain"],
    "itemknn": ["--config", "hid/planted_small__itemknn"],
}


@pytest.mark.parametrize(
    "name", [name if name == "hid" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_two_processes_equal_one(tmp_path, name):
    options = VARIANTS[name]
    config = [*options, *CONFIG[2:]] if options[0] == "--config" else [*CONFIG, *options]
    one, one_metrics = fit(tmp_path / "one", *config, "--data.init_args.batch_size=64", "--trainer.devices=1")
    two, two_metrics = fit(
        tmp_path / "two", *config, "--config=trainer/ddp", "--data.init_args.batch_size=32", "--trainer.devices=2"
    )
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    measured = [key for key in one_metrics if key.startswith(("val/", "test/")) and "energy" not in key]
    assert {"val/hr_20", "test/tail_coverage_20", "test/gini_20", "test/popularity_20"} <= set(measured)
    for key in measured:
        assert two_metrics[key] == pytest.approx(one_metrics[key], rel=1e-3, abs=1e-4), key
