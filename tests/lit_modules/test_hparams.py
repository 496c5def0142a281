"""Checkpoints rebuild their module with `weights_only=True`, however it was made."""

import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from datamodules import ImageDataModule
from leanlight.contracts import UserError
from lit_modules.classifier import ImageClassifier
from lit_modules.hparams import _TESTED, encode
from lit_modules.nn import ConvNet

CONFIG = """
model:
  class_path: lit_modules.classifier.ImageClassifier
  init_args:
    network:
      class_path: lit_modules.nn.SpikingConvNet
      init_args: {width: 6, depth: 2, time_steps: 3, image_size: 8, mean: [0.3], num_classes: 10}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: "${trainer.max_steps}"}}
data: {class_path: datamodules.ImageDataModule, init_args: {dataset: digits}}
trainer:
  {max_steps: 2, limit_val_batches: 0, logger: false, accelerator: cpu, enable_progress_bar: false,
   enable_model_summary: false, enable_checkpointing: false}
"""

LOAD = """
import sys, torch
from lit_modules.classifier import ImageClassifier

for source, copy in zip(sys.argv[1::2], sys.argv[2::2]):
    module = ImageClassifier.load_from_checkpoint(source, weights_only=True).eval()
    saved = torch.load(source, weights_only=True)
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in module.state_dict().items())
    optimizer = module.configure_optimizers()["optimizer"]
    given = optimizer.defaults
    print(type(module.network).__name__, type(optimizer).__name__, given["lr"], given["weight_decay"])
    # A checkpoint of the rebuilt module has to be as good as the first.
    torch.save({**saved, "hyper_parameters": dict(module.hparams)}, copy)
    ImageClassifier.load_from_checkpoint(copy, weights_only=True)
"""


def fit_from_config(folder: Path) -> Path:
    (folder / "config.yaml").write_text(CONFIG)
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    cli = LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        args=["fit", "--config", str(folder / "config.yaml")],
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_kwargs={"parser_mode": "omegaconf+"},
    )
    assert cli.trainer.optimizers[0].defaults["weight_decay"] == 0.01  # AdamW's own default survives the config
    cli.trainer.save_checkpoint(folder / "cli.ckpt", weights_only=True)
    return folder / "cli.ckpt"


def fit_in_python(folder: Path) -> Path:
    module = ImageClassifier(
        network=functools.partial(ConvNet, 1, width=6, depth=2, image_size=8),
        optimizer=functools.partial(torch.optim.SGD, lr=0.02, weight_decay=0.5),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3),
    )
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    trainer = pl.Trainer(max_steps=2, limit_val_batches=0, accelerator="cpu", **quiet)
    trainer.fit(module, ImageDataModule(dataset="digits"))
    trainer.save_checkpoint(folder / "python.ckpt", weights_only=True)
    return folder / "python.ckpt"


def test_checkpoints_made_by_a_config_and_in_python_rebuild_in_a_fresh_process(tmp_path):
    sources = [fit_from_config(tmp_path), fit_in_python(tmp_path)]
    arguments = [str(path) for source in sources for path in (source, source.with_suffix(".again.ckpt"))]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["SpikingConvNet AdamW 0.01 0.01", "ConvNet SGD 0.02 0.5"]


def test_an_argument_given_at_loading_replaces_the_saved_one(tmp_path):
    path = fit_in_python(tmp_path)
    loaded = ImageClassifier.load_from_checkpoint(
        path, weights_only=True, optimizer=functools.partial(torch.optim.SGD, lr=7.0)
    )
    assert loaded.configure_optimizers()["optimizer"].defaults["lr"] == 7.0
    assert loaded.hparams["optimizer"]["init_args"] == {"lr": 7.0}


@pytest.mark.parametrize(
    "network", [lambda: ConvNet(), ConvNet(), functools.partial(lambda width: ConvNet(width=width), width=4)]
)
def test_what_no_checkpoint_can_rebuild_is_refused_with_the_way_out(network):
    with pytest.raises(UserError, match=r"network: expected .*functools\.partial\(Class, \.\.\.\)"):
        ImageClassifier(network)


@dataclass
class Rule:
    """A dataclass stands for rules and strategies that a config gives by class_path."""

    keep: float
    network: object = None


def test_nested_objects_become_a_config():
    rule = Rule(0.5, functools.partial(ConvNet, width=4, mean=(0.1, 0.2)))
    inner = {"class_path": "lit_modules.nn.convnets.ConvNet", "init_args": {"width": 4, "mean": [0.1, 0.2]}}
    got = encode({"rule": rule, "path": Path("a/b"), "kind": ConvNet}, "options")
    assert got == {
        "rule": {"class_path": f"{__name__}.Rule", "init_args": {"keep": 0.5, "network": inner}},
        "path": "a/b",
        "kind": {"class_path": "lit_modules.nn.convnets.ConvNet"},
    }
    with pytest.raises(UserError, match=r"options\.rule: .*object"):
        encode({"rule": object()}, "options")
    with pytest.raises(UserError, match="named arguments"):
        encode(functools.partial(torch.nn.Sequential, torch.nn.ReLU), "network")


def test_a_version_of_lightning_that_lacks_what_is_needed_is_named(tmp_path):
    code = (
        "from lightning.pytorch.core import saving; del saving._ALLOWED_INSTANTIATORS;"
        "from leanlight.contracts import UserError\n"
        "try:\n    import lit_modules.hparams\nexcept UserError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("lightning: ")
    assert "pip install lightning==" in done.stdout


def test_the_tested_version_of_lightning_is_that_of_the_constraints():
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert f"lightning=={_TESTED}" in constraints
