"""What a tuned network leaves behind: a program of plain PyTorch, and the prompts in as many bytes as they need."""

import hashlib
import json
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from callbacks import ExportArtifact
from lit_modules.nn import TimmNet
from lit_modules.spike_nvpt import (
    BitFit,
    DensePrompts,
    LoRA,
    PromptTuning,
    RandomBits,
    SpikingPrompts,
    TunedClassifier,
)

pytest.importorskip("timm", reason="needs the extra vision")
safetensors = pytest.importorskip("safetensors.torch")

SIZES = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 3, "num_heads": 2}
IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(7))

PROMPTS = {
    "spiking": PromptTuning(partial(SpikingPrompts, length=3, scale_mode="learned_by_layer")),
    "rates": PromptTuning(partial(SpikingPrompts, length=3, use_sdu=False)),
    "dense": PromptTuning(partial(DensePrompts, length=3), depth="shallow", dropout=0.5),
    "random": PromptTuning(partial(RandomBits, length=3, scale=0.5), depth="last", blocks=2),
}
BLOCKS = {"spiking": [0, 1, 2], "rates": [0, 1, 2], "dense": [0], "random": [1, 2]}


def tuned(tuning, weights=None):
    torch.manual_seed(3)
    make = partial(TimmNet, "vit_tiny_patch16_224", 1, None, options=SIZES, weights=weights)
    module = TunedClassifier(make, tuning)
    module.evaluation.prepare((1, 8, 8), "0123456789")
    module.network.follow_classes(10)
    with torch.no_grad():
        for parameter in module.parameters():  # as if it had been trained
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return module.train()


def program(folder):
    return torch.export.load(folder / "network.pt2").module()


@pytest.mark.parametrize("kind", list(PROMPTS))
@pytest.mark.parametrize("items", [1, 5])
def test_the_program_gives_the_logits_of_evaluation_bit_for_bit(tmp_path, kind, items):
    module = tuned(PROMPTS[kind])
    module.export(tmp_path)
    module.eval()
    with torch.no_grad():
        assert torch.equal(program(tmp_path)(IMAGES[:items]), module(IMAGES[:items]))


def test_a_merged_adapter_gives_them_up_to_rounding(tmp_path):
    pytest.importorskip("peft")
    module = tuned(LoRA(rank=2))
    files = module.export(tmp_path)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(program(tmp_path)(IMAGES), module(IMAGES), rtol=1e-4, atol=1e-5)
    assert {file.name for file in files} == {"network.pt2", "weights.safetensors", "card.json"}
    assert not [name for name in safetensors.load_file(tmp_path / "weights.safetensors") if "lora" in name]


@pytest.mark.parametrize("kind", list(PROMPTS))
def test_stored_prompts_are_the_tokens_of_the_network(tmp_path, kind):
    module = tuned(PROMPTS[kind])
    module.export(tmp_path)
    found = safetensors.load_file(tmp_path / "prompts.safetensors")
    tokens = module.network.prompts().detach().numpy()
    if kind in ("rates", "dense"):
        assert found.keys() == {"prompts"}
        assert np.array_equal(found["prompts"].numpy(), tokens)
        return
    shape = found["shape"].tolist()
    assert len(found["bits"]) == -(-np.prod(shape) // 8)
    bits = np.unpackbits(found["bits"].numpy(), count=np.prod(shape)).reshape(shape)
    assert np.array_equal(bits * found["scales"].numpy()[:, None, None], tokens)
    assert 0 < bits.mean() < 1
    if kind == "spiking":
        assert len(set(found["scales"].tolist())) == 3


@pytest.mark.parametrize("kind", list(PROMPTS))
def test_the_card_says_what_was_tuned(tmp_path, kind):
    module = tuned(PROMPTS[kind])
    module.export(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["tuning"] == "PromptTuning"
    assert card["prompts"]["before_blocks"] == BLOCKS[kind]
    assert card["prompts"]["shape"] == [len(BLOCKS[kind]), 3, 24]
    trained = 24 * 10 + 10 + {"spiking": 3 * 3 * 24 + 3, "rates": 3 * 3 * 24, "dense": 3 * 24, "random": 0}[kind]
    assert card["trained_parameters"] == trained
    share = card["prompts"]["density"]
    if kind in ("rates", "dense"):
        assert share is None
        assert card["stored_bits"] == 32 * trained
    else:
        assert share == pytest.approx(float((module.network.prompts() != 0).float().mean()))
        assert 24 * 10 * 32 < card["stored_bits"] < 32 * (24 * 10 + 10) + 9 * 24 + 3 * 32 + 1
    assert card["pretrained_weights"] is None
    assert card["classes"] == list("0123456789")
    assert not any("neuron" in str(node) for node in torch.export.load(tmp_path / "network.pt2").graph.nodes)


@pytest.mark.parametrize("rule", ["prompts", "bitfit"])
def test_weights_that_a_file_holds_are_not_written_again(tmp_path, rule):
    file = tmp_path / "vit.safetensors"
    safetensors.save_file(tuned(BitFit()).network.net.network.state_dict(), file)
    module = tuned(PROMPTS["spiking"] if rule == "prompts" else BitFit(), file)
    folder = tmp_path / "out"
    folder.mkdir()
    module.export(folder)
    written = safetensors.load_file(folder / "weights.safetensors")
    there = {name.removeprefix("network.") for name in written if name.startswith("network.")}
    if rule == "prompts":
        assert there == {"head.weight", "head.bias"} | {f"blocks.{i}.tokens" for i in range(3)}
    else:
        assert there == {"head.weight"} | {name for name in safetensors.load_file(file) if name.endswith("bias")}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    card = json.loads((folder / "card.json").read_text())
    assert card["pretrained_weights"] == {"file": "vit.safetensors", "sha256": digest}
    module.eval()
    with torch.no_grad():
        assert torch.equal(program(folder)(IMAGES), module(IMAGES))


class Exporter(pl.LightningModule):
    def export(self, directory):
        (directory / "a.txt").write_text("exported")
        return [directory / "a.txt"]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_export_of_a_run_can_be_left_out(tmp_path, enabled):
    trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", enable_progress_bar=False)
    ExportArtifact(enabled=enabled).on_fit_end(trainer, Exporter())
    assert (tmp_path / "artifacts").exists() == enabled
