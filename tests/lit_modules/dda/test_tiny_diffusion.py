"""The small diffusion model in a Trainer, on scikit-learn's digits."""

import dataclasses
import functools
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch

from callbacks import ExactResume
from datamodules import ImageDataModule
from leanlight.contracts import HasTerms, MethodModule, PrimaryMetric, UserError
from lit_modules.dda import Teacher, TinyDiffusion
from lit_modules.frozen import Frozen
from lit_modules.nn import ConvNet, pooled_features

pytest.importorskip("diffusers")

SMALLEST = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "add_attention": False,
}
make_teacher = functools.partial(ConvNet, in_channels=1, width=8, depth=2, image_size=8)


def trainer(**options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator="cpu", logger=False, **{"max_steps": 3, "num_sanity_val_steps": 0, **quiet, **options}
    )


def digits(**options):
    return ImageDataModule(**{"dataset": "digits", "batch_size": 16, "train_items": 64, **options})


def tiny(**options):
    torch.manual_seed(0)
    return TinyDiffusion(**{"image_size": 8, "network": SMALLEST, "samples": 4, "sample_steps": 2, **options})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    module, runner = tiny(), trainer(max_epochs=1, max_steps=-1)
    data = digits()
    runner.fit(module, data)
    checkpoint = tmp_path_factory.mktemp("fitted") / "last.ckpt"
    runner.save_checkpoint(checkpoint)
    return module, data, runner, checkpoint


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    weights = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(1)
    torch.save(make_teacher().state_dict(), weights)
    module, runner = (
        tiny(teacher=Teacher(network=make_teacher, weights=weights), condition_dropout=0.5),
        trainer(max_steps=4),
    )
    runner.fit(module, digits())
    checkpoint = weights.parent / "last.ckpt"
    runner.save_checkpoint(checkpoint)
    return module, checkpoint


def test_it_is_a_method_of_the_suite(fitted):
    module, _, runner, _ = fitted
    assert isinstance(module, MethodModule)
    assert isinstance(module, HasTerms)
    assert module.primary_metric == PrimaryMetric("val/loss", "min")
    assert module.progress().value == module.global_step == 4
    assert {"train/loss", "val/loss"} <= set(runner.callback_metrics)
    assert set(module.loss_terms()) == {"mse"}


def by_hand(network, image, drawn, time):
    """The loss of Ho et al. (2020), equation 14, in float64."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)[time].view(-1, 1, 1, 1)
    noisy = alpha_bar.sqrt() * (2 * image - 1) + (1 - alpha_bar).sqrt() * drawn
    return ((network.double()(noisy, time) - drawn) ** 2).mean()


def test_the_loss_is_the_error_of_the_predicted_noise(monkeypatch):
    module, batch = tiny(), first_batch()
    drawn, time = torch.randn(len(batch), 64), torch.arange(len(batch)) * 60
    monkeypatch.setattr("lit_modules.dda.tiny_diffusion.noise", lambda *_: drawn)
    monkeypatch.setattr("lit_modules.dda.tiny_diffusion.labels", lambda *_: time)
    with torch.no_grad():
        loss = module._loss(module.network, batch, 0, 0.0)
        expected = by_hand(module.network, batch.image.double(), drawn.view_as(batch.image).double(), time)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)


def first_batch(items=16):
    data = digits()
    data.setup()
    batch = data.train_split.batch(torch.arange(items))
    return dataclasses.replace(batch, image=batch.image.float() / 255)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_kind_of_prediction_recovers_the_image_that_its_target_says(kind):
    """One step of DDIM with the target itself as the answer is the clean image."""
    module = tiny(scheduler={"prediction_type": kind, "num_train_timesteps": 10})
    image, drawn, time = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8), torch.full((4,), 7)
    target = module._target(image, drawn, time)
    scheduler = module.make_scheduler()
    scheduler.set_timesteps(10)
    noisy = scheduler.add_noise(image, drawn, time)
    torch.testing.assert_close(scheduler.step(target, 7, noisy).pred_original_sample, image, rtol=1e-4, atol=1e-4)


def test_the_validation_loss_is_the_same_whatever_the_batches_and_training_did_not_draw_it(fitted):
    module, _, runner, _ = fitted
    known = runner.validate(module, digits(), verbose=False)[0]["val/loss"]
    torch.manual_seed(99)
    torch.rand(7)
    other = trainer().validate(module, digits(eval_batch_size=17), verbose=False)[0]["val/loss"]
    assert other == pytest.approx(known, rel=1e-5)


def test_noise_differs_from_step_to_step_and_between_items(monkeypatch):
    streams, module = [], tiny()
    monkeypatch.setattr(module, "_loss", lambda network, batch, stream, dropout: streams.append(stream) or loss())

    def loss():
        return next(module.network.parameters()).sum()

    trainer().fit(module, digits())
    assert len(set(streams[:3])) == 3


def test_training_learns():
    """On pixels that are all alike the noise can be read off."""
    module = tiny(optimizer=functools.partial(torch.optim.Adam, lr=1e-2))
    batch = first_batch()
    batch = dataclasses.replace(batch, image=torch.zeros_like(batch.image))
    optimizer = torch.optim.Adam(module.network.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        loss = module._loss(module.network, batch, step, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_average_follows_the_weights_and_trains_by_nothing_else():
    module = tiny(ema_decay=0.15)
    expected = {name: value.clone() for name, value in module.average.named_parameters()}

    class Follow(pl.Callback):
        """By hand: a warm-up that the decay given soon ends."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            for name, value in pl_module.network.named_parameters():
                decay = min(0.15, trainer.global_step / (9 + trainer.global_step))
                expected[name] = decay * expected[name] + (1 - decay) * value.detach()

    trainer(max_steps=3, limit_val_batches=0, callbacks=[Follow()]).fit(module, digits())
    for name, value in module.average.named_parameters():
        torch.testing.assert_close(value, expected[name])
        assert not value.requires_grad
    assert any(not torch.equal(value, module.network.get_parameter(name)) for name, value in expected.items())


def test_a_checkpoint_rebuilds_the_model_with_its_average(fitted):
    module, _, _, checkpoint = fitted
    again = TinyDiffusion.load_from_checkpoint(checkpoint, weights_only=True)
    assert again.image_shape == (1, 8, 8)
    for (name, value), other in zip(module.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_teacher_conditions_it_and_its_checkpoint_knows_the_size_of_embeddings(conditioned):
    module, checkpoint = conditioned
    again = TinyDiffusion.load_from_checkpoint(checkpoint, weights_only=True)
    assert again.conditioned
    assert not any("teacher" in name for name in again.state_dict())
    torch.testing.assert_close(again.average.projection.weight, module.average.projection.weight)
    x, embedding = torch.randn(2, 1, 8, 8), torch.randn(2, module.average.projection.in_features)
    with torch.no_grad():
        assert not torch.equal(again.average(x, 5, embedding), again.average(x, 5, torch.zeros_like(embedding)))


def test_embeddings_are_scaled_features_of_the_teacher(conditioned):
    module, _ = conditioned
    image = torch.rand(3, 1, 8, 8)
    network = module._teacher.network
    got = module.embed(Frozen(network), image)
    features = pooled_features(network, image)
    torch.testing.assert_close(got.square().mean(1), torch.ones(3))
    torch.testing.assert_close(torch.cosine_similarity(got, features), torch.ones(3))


def test_the_asked_share_of_embeddings_is_dropped_in_training_alone(conditioned):
    module, _ = conditioned
    seen, batch = [], first_batch(64)
    network = lambda noisy, time, embedding: seen.append(embedding) or noisy  # noqa: E731
    module._loss(network, batch, 5, 0.5)
    module._loss(network, batch, 5, 0.0)
    dropped, none = ((embedding == 0).all(1) for embedding in seen)
    assert 16 < int(dropped.sum()) < 48
    assert not none.any()


def test_pictures_are_samples_of_the_average_from_fixed_seeds(fitted, conditioned):
    module = fitted[0]
    assert module.media("train") == {}
    one, two = module.media("val")["samples"].images, module.media("val")["samples"].images
    assert torch.equal(one, two)
    assert one.shape == (4, 1, 8, 8)
    assert one.min() >= 0
    assert one.max() <= 1
    assert len(one.flatten(1).unique(dim=0)) == 4
    assert set(conditioned[0].media("val")) == {"samples", "sources"}


PLAIN = """
import sys
for name in ("leanlight", "lit_modules", "datamodules", "callbacks", "lightning"):
    sys.modules[name] = None
import diffusers, torch
pipeline = diffusers.DDIMPipeline.from_pretrained(sys.argv[1], local_files_only=True)
images = pipeline(2, generator=torch.Generator().manual_seed(3), num_inference_steps=3, output_type="pt").images
torch.save(images, sys.argv[2])
"""


def test_diffusers_samples_from_the_export_without_the_suite(fitted, tmp_path):
    module = fitted[0]
    files = module.export(tmp_path)
    assert {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} <= {
        file.relative_to(tmp_path).as_posix() for file in files
    }
    subprocess.run([sys.executable, "-c", PLAIN, tmp_path, tmp_path / "images.pt"], check=True, cwd=tmp_path)
    images = torch.load(tmp_path / "images.pt")
    from lit_modules.dda.sampling import sample

    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        drawn = sample(module.average.eval(), module.make_scheduler(), noise, 3)
    torch.testing.assert_close(images, (drawn / 2 + 0.5).clamp(0, 1))


def test_the_export_of_a_conditioned_model_is_a_network_with_its_projection(conditioned, tmp_path):
    import diffusers
    from safetensors.torch import load_file

    module = conditioned[0]
    module.export(tmp_path)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet", local_files_only=True)
    projection = load_file(tmp_path / "projection.safetensors")
    embedding, x = torch.randn(2, projection["weight"].shape[1]), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        got = unet(x, 4, torch.nn.functional.linear(embedding, **projection)).sample
        torch.testing.assert_close(got, module.average(x, 4, embedding))
    assert diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler").config.num_train_timesteps == 1000


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            raise RuntimeError("killed")


def test_a_run_killed_inside_an_epoch_ends_as_if_it_had_not_been(tmp_path):
    def runner(*callbacks):
        options = {"default_root_dir": tmp_path, "enable_checkpointing": True, "max_steps": 6}
        return trainer(**options, callbacks=[ExactResume(every=2), *callbacks])

    whole = tiny()
    runner().fit(whole, digits())
    with pytest.raises(RuntimeError, match="killed"):
        runner(Stop()).fit(tiny(), digits())
    resumed = tiny()
    torch.manual_seed(5)
    runner().fit(resumed, digits(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.global_step == 6
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": {"chanels": 3}}, "network: expected options of diffusers.UNet2DModel; .*chanels"),
        ({"network": {"block_out_channels": [8]}}, "network: expected options of diffusers.UNet2DModel; .*down_block"),
        ({"scheduler": {"beta_schedule": "cubic"}}, "scheduler: expected options of diffusers.DDIMScheduler; .*cubic"),
        ({"condition_dropout": 1.0}, r"condition_dropout: expected a number in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, "ema_decay: expected"),
        ({"image_size": 0}, "image_size: expected an integer of at least 1"),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        tiny(**options)
    assert "\n" not in str(error.value)


def test_images_of_another_shape_and_sizes_that_the_network_cannot_halve_are_one_line():
    with pytest.raises(UserError, match="image_size: expected in_channels 1 and image_size 8"):
        trainer().fit(tiny(image_size=16), digits())
    with pytest.raises(UserError, match="network: expected one for images of shape"):
        trainer().fit(tiny(image_size=7), digits(image_size=7))
