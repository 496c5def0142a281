"""Checkpoints of a tuned network leave out what the file of its weights holds, and come back whole."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from leanlight import load
from leanlight.cli import export
from leanlight.contracts import UserError
from lit_modules.nn import TimmNet
from lit_modules.spike_nvpt import BitFit, DensePrompts, FullTuning, LinearProbe, LoRA, PromptTuning, TunedClassifier
from lit_modules.spike_nvpt.packing import pack, unpack

timm = pytest.importorskip("timm", reason="needs the extra vision")
safetensors = pytest.importorskip("safetensors.torch")

SIZES = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 3, "num_heads": 4}
PLAIN = ["--run.wandb=disabled", "--run.id=a", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=3"]
PLAIN += ["--trainer.log_every_n_steps=1", "--exact_resume.every=3"]
MOVED = "model.init_args.network.init_args.weights"


def vit_file(path, seed=1):
    torch.manual_seed(seed)
    state = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=5, **SIZES).state_dict()
    safetensors.save_file(state, path)
    return state


def launch(folder, *arguments):
    command = [sys.executable, "-m", "leanlight", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process):
    _, error = process.communicate(timeout=280)
    assert process.returncode == 0, error.decode()[-3000:]
    return error.decode()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Run folder of a fit with weights from a file, the file, its content, and what the fit said."""
    folder = tmp_path_factory.mktemp("fitted")
    state = vit_file(folder / "vit.safetensors")
    start = ["fit", "--config", "spike_nvpt/digits_small", f"--{MOVED}={folder / 'vit.safetensors'}", *PLAIN]
    said = finish(launch(folder, *start))
    return folder / "runs/spike_nvpt/digits/a", folder / "vit.safetensors", state, said


def saved(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.mark.parametrize("name", ["last", "best"])
def test_checkpoints_hold_what_trains_and_name_the_file_of_the_rest(fitted, name):
    run, file, state, _ = fitted
    checkpoint = saved(run, name)
    tensors = {key.removeprefix("network.") for key in checkpoint["state_dict"]}
    head = {"net.network.head.weight", "net.network.head.bias"}
    assert tensors == head | {"prompts.latents", "prompts.scale", "net.normalize.mean", "net.normalize.std"}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert checkpoint["weights"] == {"file": "vit.safetensors", "sha256": digest}
    assert len(state) > 30


@pytest.mark.parametrize("way", ["load", "load_from_checkpoint"])
def test_a_loaded_module_is_whole(fitted, way):
    run, _, state, _ = fitted
    path = run / "checkpoints" / "last.ckpt"
    module = load(run) if way == "load" else TunedClassifier.load_from_checkpoint(path, weights_only=True)
    parameters = {key.replace(".block.", "."): value for key, value in module.network.net.network.named_parameters()}
    assert state.keys() == parameters.keys()
    for key, value in state.items():
        assert torch.equal(parameters[key], value) != key.startswith("head."), key
    assert torch.equal(module.network.prompts.latents, saved(run)["state_dict"]["network.prompts.latents"])


def test_the_frozen_network_in_evaluation_mode_is_no_reason_to_warn(fitted):
    assert "eval mode" not in fitted[3]
    assert "sync_dist" not in fitted[3]


@pytest.mark.parametrize("change", ["gone", "other", "none"])
def test_a_file_that_is_gone_or_another_is_one_line_that_says_what_to_do(fitted, tmp_path, change):
    run = shutil.copytree(fitted[0], tmp_path / "a")
    config, there = run / "config.yaml", fitted[1]
    if change == "other":
        vit_file(tmp_path / "vit.safetensors", seed=2)
    value = {"gone": tmp_path / "vit.safetensors", "other": tmp_path / "vit.safetensors", "none": "null"}[change]
    config.write_text(config.read_text().replace(str(there), str(value)))
    with pytest.raises(UserError) as found:
        load(run)
    expected = {"gone": "expected a file of weights, got", "other": "with sha256", "none": "got none"}[change]
    text = str(found.value)
    assert text.startswith("weights: ")
    assert expected in text
    assert f"--{MOVED}=FILE" in text
    assert "\n" not in text
    assert export.main([str(run), f"--{MOVED}={there}", "--output", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").glob("*.pt2"))


def test_testing_a_run_takes_the_new_place_of_the_file(fitted, tmp_path):
    run = shutil.copytree(fitted[0], tmp_path / "a")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(fitted[1]), "/gone/vit.safetensors"))
    finish(launch(tmp_path, "test", "--from", run, f"--{MOVED}={fitted[1]}", "--run.wandb=disabled"))


@pytest.mark.slow
def test_a_killed_run_resumes_exactly_from_a_checkpoint_without_the_network(fitted, tmp_path):
    run, file, _, _ = fitted
    metrics = (run / "metrics.csv").read_bytes()
    start = ["fit", "--config", "spike_nvpt/digits_small", f"--{MOVED}={file}", *PLAIN]
    process, again = launch(tmp_path, *start), tmp_path / "runs/spike_nvpt/digits/a"
    lines = metrics.count(b"\n") // 2
    while not (again / "metrics.csv").exists() or (again / "metrics.csv").read_bytes().count(b"\n") < lines:
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(launch(tmp_path, "fit", "--resume", again))
    assert (again / "metrics.csv").read_bytes() == metrics
    assert b"train/flips" in metrics
    resumed = saved(again)
    for name, value in saved(run)["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    assert torch.equal(resumed["prompt_bits"], saved(run)["prompt_bits"])


RULES = {
    "linear": LinearProbe(),
    "bitfit": BitFit(),
    "full": FullTuning(),
    "lora": LoRA(rank=2),
    "prompts": PromptTuning(partial(DensePrompts, length=2)),
}


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("from_file", [True, False])
def test_a_checkpoint_has_what_trains_and_without_a_file_all(tmp_path, rule, from_file):
    vit_file(tmp_path / "vit.safetensors")
    weights = tmp_path / "vit.safetensors" if from_file else None
    make = partial(TimmNet, "vit_tiny_patch16_224", 1, None, options=SIZES, weights=weights)
    if rule == "lora":
        pytest.importorskip("peft")
    module = TunedClassifier(make, RULES[rule])
    module.evaluation.prepare((1, 8, 8), "0123456789")
    module.network.follow_classes(10)
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    parameters = dict(module.named_parameters())
    held = {name for name in checkpoint["state_dict"] if name in parameters}
    trained = {name for name, value in parameters.items() if value.requires_grad}
    assert trained
    assert held == (trained if from_file else set(parameters))
    assert ("weights" in checkpoint) == (from_file and rule != "full")
    another = TunedClassifier(make, RULES[rule])
    another.on_load_checkpoint(checkpoint)
    another.load_state_dict(checkpoint["state_dict"])
    for name, value in module.state_dict().items():
        assert torch.equal(another.state_dict()[name], value), name


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5, 7), (2, 4, 8)])
def test_bits_go_into_bytes_as_numpy_packs_them_and_come_back(shape):
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    packed = pack(bits)
    assert np.array_equal(packed.numpy(), np.packbits(bits.numpy()))
    assert torch.equal(unpack(packed, shape), bits)


def test_a_shape_of_another_number_of_bits_is_refused():
    with pytest.raises(UserError, match=r"shape: expected up to 8 bits in 1 bytes, got 9"):
        unpack(pack(torch.ones(8)), (9,))
