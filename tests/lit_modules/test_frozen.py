"""Networks that are used and not trained: out of everything their owner does, from checkpoints and from weights."""

import functools

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from leanlight.contracts import UserError, capture_rng
from lit_modules.esvae import FeatureAutoencoder, ImageAutoencoder
from lit_modules.frozen import Frozen, frozen_module, frozen_network

FEATURES = functools.partial(FeatureAutoencoder, 1, 8, (4, 8), 5)


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


class Owner(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.layer, self.teacher = nn.Linear(3, 3), Frozen(teacher)


def test_a_frozen_network_belongs_to_nobody():
    teacher = small()
    owner = Owner(teacher).train()
    names = {name.split(".")[0] for name, _ in owner.named_parameters()}
    assert names | {name.split(".")[0] for name in owner.state_dict()} == {"layer"}
    assert not any(module.training for module in teacher.modules())
    assert owner.double().teacher.network[0].weight.dtype == torch.float32


def test_gradient_reaches_the_input_and_no_weight():
    owner = Owner(small())
    x = torch.randn(5, 3, requires_grad=True)
    owner.teacher(owner.layer(x)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert owner.layer.weight.grad is not None
    assert all(weight.grad is None for weight in owner.teacher.network.parameters())


def test_it_is_moved_by_hand():
    frozen = Frozen(nn.Linear(3, 2))
    assert frozen.to("meta") is frozen
    assert frozen(torch.zeros(1, 3, device="meta")).device.type == "meta"


@pytest.fixture
def checkpoint(tmp_path):
    """Of an autoencoder that was trained for one step."""
    module = ImageAutoencoder(FEATURES)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "features.ckpt", weights_only=True)
    return module, tmp_path / "features.ckpt"


def test_a_module_comes_back_from_its_checkpoint_with_nothing_drawn(checkpoint):
    module, path = checkpoint
    before = capture_rng()["torch"]
    again = frozen_module(ImageAutoencoder, path, "source", "make one", probe=False)
    assert torch.equal(capture_rng()["torch"], before)
    assert not again.training
    assert not any(weight.requires_grad for weight in again.parameters())
    assert (again.probe, module.probe) == (False, True)
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


class Another(pl.LightningModule):
    def __init__(self, width=3):
        super().__init__()
        self.layer = nn.Linear(width, width)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_what_is_no_checkpoint_of_the_class_is_one_line(checkpoint, tmp_path):
    _, path = checkpoint
    (tmp_path / "text.ckpt").write_text("hello\nworld")
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    content = torch.load(path, weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = torch.zeros(9)
    torch.save(content, tmp_path / "shapes.ckpt")
    for wrong in (None, tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(
            UserError, match=r"^source: expected the checkpoint of a ImageAutoencoder, got .*; make one$"
        ):
            frozen_module(ImageAutoencoder, wrong, "source", "make one")
    for wrong in ("text.ckpt", "other.ckpt", "shapes.ckpt"):
        with pytest.raises(UserError) as error:
            frozen_module(ImageAutoencoder, tmp_path / wrong, "source", "make one")
        text = one_line(error)
        assert text.startswith("source: expected the checkpoint of a ImageAutoencoder; ")
        assert text.endswith("; make one")
    assert name in text  # the last was the one of another shape
    with pytest.raises(UserError) as error:
        frozen_module(Another, path, "source", "make one")
    assert "Another" in one_line(error)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_network_gets_its_weights_from_a_file(tmp_path, ending):
    trained = small()
    path = tmp_path / f"weights.{ending}"
    save_file(trained.state_dict(), path) if ending == "safetensors" else torch.save(trained.state_dict(), path)
    before = capture_rng()["torch"]
    network = frozen_network(small, path, "teacher_weights")
    assert torch.equal(capture_rng()["torch"], before)
    x = torch.randn(4, 3)
    assert torch.equal(network(x), trained.eval()(x))
    assert not any(weight.requires_grad for weight in network.parameters())


def test_without_a_file_a_network_is_as_its_factory_makes_it():
    network = frozen_network(small, None, "teacher_weights")
    assert not network.training


def test_weights_that_do_not_fit_are_one_line(tmp_path):
    save_file(nn.Linear(3, 3).state_dict(), tmp_path / "other.safetensors")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match=r"^teacher_weights: expected a file of weights, got"):
        frozen_network(small, tmp_path / "none.pt", "teacher_weights")
    for name in ("other.safetensors", "text.pt", "text.safetensors"):
        with pytest.raises(UserError) as error:
            frozen_network(small, tmp_path / name, "teacher_weights")
        assert one_line(error).startswith(f"teacher_weights: {tmp_path / name} does not fit a Sequential: ")
