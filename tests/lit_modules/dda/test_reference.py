"""What the benchmark times ours against does the same work."""

import json
from functools import partial

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from datamodules import ImageDataModule
from leanlight.benchmarks.dda import first_gradients
from leanlight.benchmarks.probe import StepProbe
from leanlight.contracts import derived_seed
from leanlight.ops import counter
from lit_modules.dda import DataFreeDistillation, Generator, GeneratorInversion, Teacher
from lit_modules.dda.reference import crop_each, plain_inversion
from lit_modules.frozen import Frozen
from lit_modules.nn import ConvNet

SHAPE, ITEMS, LATENT = (1, 8, 8), 12, 16
NETWORK = partial(ConvNet, in_channels=1, width=16, depth=3, norm="batch", image_size=8)


def start():
    return counter.noise(2, torch.arange(ITEMS), LATENT), torch.arange(ITEMS) % 10


def test_a_plain_loop_makes_the_images_of_an_inversion(trained_teacher):
    def ours():
        inversion = GeneratorInversion(steps=4, width=8, augment=None, channels_last=False)
        results.append(inversion(Frozen(trained_teacher), *start(), SHAPE, seed=5))

    def plain():
        draws = torch.Generator().manual_seed(derived_seed(5, "start"))
        generator = Generator.fresh(SHAPE, draws, latent_size=LATENT, width=8)
        results.append(plain_inversion(trained_teacher, generator, *start(), 4, augment=None))

    results = []
    gradients = first_gradients(ours), first_gradients(plain)
    assert len(gradients[0]) > 10
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4 * pair[1].abs().max().item())
    found, expected = results
    assert found.first.keys() == expected.first.keys()
    assert expected.best["loss"] < expected.first["loss"]
    for each in ("first", "best", "bn_layers", "images"):
        torch.testing.assert_close(getattr(found, each), getattr(expected, each), rtol=1e-3, atol=1e-4)
    assert not any(module._forward_hooks for module in trained_teacher.modules())


def test_every_image_is_mirrored_or_not_and_moved_by_up_to_an_eighth():
    image = torch.rand(1, 2, 16, 16).requires_grad_()
    padded = [F.pad(each, (2,) * 4)[0] for each in (image, image.flip(-1))]
    windows = [each[:, y : y + 16, x : x + 16] for each in padded for y in range(5) for x in range(5)]
    cropped = crop_each(image.expand(400, -1, -1, -1))
    kinds = [[torch.equal(each, window) for window in windows].index(True) for each in cropped]
    assert len(set(kinds)) == 50
    (gradient,) = torch.autograd.grad(cropped.sum(), image)
    assert gradient[0, 0, 8, 8] == 400


def test_a_bare_step_is_the_students(tmp_path, trained_teacher):
    save_file(trained_teacher.state_dict(), tmp_path / "teacher.safetensors")
    torch.manual_seed(0)
    module = DataFreeDistillation(
        partial(ConvNet, in_channels=1, width=4, depth=2, norm="batch", image_size=8),
        Teacher(network=NETWORK, weights=tmp_path / "teacher.safetensors"),
        recipe="kl",
        real_data=True,
    )
    before = [parameter.clone() for parameter in module.parameters()]
    probe = StepProbe(tmp_path / "times.json", "lit_modules.dda.reference:BareDistillationStep", warmup=0)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    limits = {"max_steps": 4, "limit_val_batches": 0, "default_root_dir": tmp_path, "accelerator": "cpu"}
    pl.Trainer(callbacks=[probe], **limits, **quiet).fit(module, ImageDataModule("digits", batch_size=20, seed=0))
    report = json.loads((tmp_path / "times.json").read_text())
    assert report["equal"]
    assert len(report["bare"]) == 3  # the first of an epoch does not count
    assert not any(torch.equal(now, then) for now, then in zip(module.parameters(), before, strict=True))
