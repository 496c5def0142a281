"""Two gloo processes with half the batch each train one judge, whatever their answers' lengths, and measure alike."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from short_fit import fit
from transformers import AutoModelForImageTextToText

from datamodules.safety.files import write_samples
from datamodules.safety.shapes import Shapes

SHAPES = {"train": 64, "val": 13, "test": 11}
TINY = {"hidden": 32, "intermediate": 32, "layers": 1, "heads": 2, "kv_heads": 1, "vision_layers": 1, "vocab_size": 500}
SMALL = [f"--data.init_args.shapes.{name}={value}" for name, value in SHAPES.items()]
SMALL += [f"--model.init_args.backbone.init_args.{name}={value}" for name, value in TINY.items()]
SMALL += ["--model.init_args.max_new_tokens=4", "--data.init_args.eval_batch_size=4"]
VARIANTS = {
    "full": [],
    "weighted words": ["--model.init_args.field_loss_weight=5.0"],
    "text only": ["--config", "falcon_eye/shapes_small__text_only"],
}


@pytest.mark.parametrize(
    "name", [name if name == "full" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_two_processes_equal_one(tmp_path, name):
    variant = VARIANTS[name]
    config = variant if "--config" in variant else ["--config", "falcon_eye/shapes_small", *variant]
    options = [*config, *SMALL]
    one, one_metrics = fit(tmp_path / "one", *options, "--data.init_args.batch_size=16", "--trainer.devices=1")
    two, two_metrics = fit(
        tmp_path / "two", *options, "--config=trainer/ddp", "--data.init_args.batch_size=8", "--trainer.devices=2"
    )
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    measured = [key for key in one_metrics if key.startswith(("val/", "test/"))]
    assert {"val/loss", "val/response_auroc", "test/balanced_accuracy"} <= set(measured)
    for key in measured:
        assert two_metrics[key] == pytest.approx(one_metrics[key], rel=1e-3, abs=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_without_a_picture_in_their_batch_train_beside_those_that_have_one(tmp_path, strategy):
    samples = [(sample, part) for sample, part in Shapes(train=32, val=8, test=8).make()]
    for place, (sample, part) in enumerate(samples):
        if place % 5:
            labels = {field: label for field, label in sample.labels.items() if field != "image"}
            samples[place] = replace(sample, image=None, labels=labels), part
    write_samples(samples, tmp_path / "set")
    options = ["--config", "falcon_eye/shapes_small", *SMALL[len(SHAPES) :]]  # but the sizes of made sets
    options += ["--data.init_args.dataset=jsonl", f"--data.init_args.path={tmp_path / 'set'}"]
    one, _ = fit(tmp_path / "one", *options, "--data.init_args.batch_size=4", "--trainer.devices=1")
    spread = [f"--config=trainer/{strategy}", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    two, _ = fit(tmp_path / "two", *options, *spread, "--data.init_args.batch_size=2")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones_and_are_exported_from_their_checkpoint(tmp_path):
    options = ["--config", "falcon_eye/shapes_small", *SMALL]
    one, one_metrics = fit(tmp_path / "one", *options, "--data.init_args.batch_size=16", "--trainer.devices=1")
    sharded = ["--config=trainer/fsdp", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    two, two_metrics = fit(tmp_path / "two", *options, *sharded, "--data.init_args.batch_size=8")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    for key in ("val/loss", "val/response_auroc", "test/balanced_accuracy"):
        assert two_metrics[key] == pytest.approx(one_metrics[key], rel=1e-3, abs=1e-4), key
    (run,) = (tmp_path / "two").glob("runs/*/*/a")
    assert not list((run / "artifacts" / "export").iterdir())
    subprocess.run([sys.executable, "-m", "leanlight", "export", str(run)], check=True, timeout=280)
    exported = AutoModelForImageTextToText.from_pretrained(run / "artifacts" / "export").state_dict()
    assert {f"network.{key}" for key in exported} == two.keys()
    for key, value in exported.items():
        assert torch.equal(value, two[f"network.{key}"]), key
