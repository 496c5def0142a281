"""Every method says what it can be run with; all else is refused in one line, and overlays build what is allowed."""

import copy
import sys
from functools import cache

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from leanlight.__main__ import main
from leanlight.checks import check_config
from leanlight.contracts import Allows, UserError
from leanlight.contracts.allows import PRECISIONS
from leanlight.experiment import build, resolve
from leanlight.registry import METHODS

CONVERTED = "dsqn/catch_small__converted"
CONFIGS = [*(method.smallest for method in METHODS.values()), CONVERTED]
SHARDING = [
    *("fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3_offload"),
    {"class_path": "lightning.pytorch.strategies.FSDPStrategy"},
    {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"},
]


@cache
def resolved_of(name):
    return resolve("fit", ["--config", name])


def changed(name, **trainer):
    config = copy.deepcopy(resolved_of(name))
    config["trainer"] |= trainer
    return config


def module_of(config):
    package, _, name = config["model"]["class_path"].rpartition(".")
    return getattr(sys.modules[package], name)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that seems to have two GPUs, for what is decided before any is used."""
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    for name in ("lightning.fabric.accelerators.cuda.num_cuda_devices", "torch.cuda.device_count"):
        monkeypatch.setattr(name, lambda: 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_method_says_what_it_allows_and_why_not_more(name):
    allows = module_of(resolved_of(name)).allows
    assert isinstance(allows, Allows)
    assert set(allows.precision) <= set(PRECISIONS)
    assert "32-true" in allows.precision, "overlays say nothing of precision"
    assert bool(allows.why) == (set(allows.precision) != set(PRECISIONS))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_precision_is_refused_exactly_where_the_method_does_not_allow_it(name, precision):
    config = changed(name, precision=precision)
    allows = module_of(config).allows
    if precision in allows.precision:
        check_config(config)
        return
    with pytest.raises(UserError) as error:
        check_config(config)
    assert str(error.value).startswith(f"trainer.precision: expected {' or '.join(allows.precision)} for lit_modules.")
    assert str(error.value).endswith(f"got {precision}: {allows.why}")


@pytest.mark.parametrize("strategy", SHARDING, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_weights_are_refused_exactly_where_the_method_does_not_allow_them(name, strategy, monkeypatch):
    config = changed(name, strategy=strategy)
    if module_of(config).allows.sharded:
        check_config(config)
        return
    with pytest.raises(UserError, match=r"^trainer\.strategy: .* shards weights, and lit_modules.* use ddp"):
        check_config(config)
    monkeypatch.setattr(module_of(config), "allows", Allows(sharded=True))
    check_config(config)


def test_a_plain_module_may_shard_its_weights_and_choose_its_mixed_precision():
    config = changed(CONFIGS[0], strategy="fsdp", precision="16-mixed")
    config["model"]["class_path"] = "lightning.pytorch.LightningModule"
    assert not hasattr(pl.LightningModule, "allows")
    check_config(config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["at_bptt/digits_small", "--config", "trainer/bf16"], ["trainer.precision", "differentiated twice"]),
        (["sfedca/digits_small", "--trainer.precision=16-mixed"], ["32-true or bf16-mixed", "scale losses"]),
        (["esvae/digits_small", "--config", "trainer/fsdp"], ["trainer.strategy", "ImageAutoencoder", "trainer/gpus"]),
    ],
)
def test_a_refusal_is_one_line_and_writes_nothing(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overlay", ["gpu", "gpus", "slurm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gpu_overlay_alone_builds_every_method_in_float32(name, overlay, two_gpus, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")  # read by the overlay; Lightning sees no SLURM job
    made = build([name, f"trainer/{overlay}"], {"trainer.default_root_dir": str(tmp_path)})
    assert isinstance(made.trainer.accelerator, CUDAAccelerator)
    assert made.trainer.num_devices == {"gpu": 1}.get(overlay, 2)
    assert made.trainer.precision == "32-true"


def test_float32_on_a_gpu_is_float32_unless_asked_otherwise(tmp_path):
    def multiplied():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = multiplied()
    try:
        for asked in (True, False):
            build(CONFIGS[0], {"trainer.default_root_dir": str(tmp_path), "run.tf32": asked})
            assert multiplied() == (asked, asked)
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's own default
        build(CONFIGS[0], {"trainer.default_root_dir": str(tmp_path)})
        assert multiplied() == (False, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
