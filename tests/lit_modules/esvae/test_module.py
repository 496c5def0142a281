"""The training glue of the ESVAE family: data that fit, schedules, the feature autoencoder, pictures, export."""

import functools

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from PIL import Image
from safetensors.torch import load_file
from torch.optim.lr_scheduler import ExponentialLR

from datamodules import ImageDataModule, ImageFolderStream
from leanlight.contracts import ImageGrid, UserError
from lit_modules.esvae import ESVAE, FeatureAutoencoder, ImageAutoencoder, MeanImage
from lit_modules.esvae import module as training_glue

SMALL = functools.partial(ESVAE, image_size=8, channels=(4, 8), latent_size=6, time_steps=4)
FEATURES = functools.partial(FeatureAutoencoder, image_size=8, channels=(4, 8), latent_size=5)
SHORT = {"limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1, "num_sanity_val_steps": 0}


def trainer(tmp_path, **limits):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", **{"max_epochs": 1, **SHORT, **limits}, **quiet)


def digits():
    return ImageDataModule("digits", batch_size=64, image_size=8, seed=0)


def fit(tmp_path, network=SMALL, epochs=1, **options):
    pl.seed_everything(0, verbose=False)
    module = ImageAutoencoder(network, generated=32, probe_images=100, **options)
    fitted = trainer(tmp_path, max_epochs=epochs)
    fitted.fit(module, datamodule=digits())
    return module, fitted


class Steps(pl.Callback):
    count = 0

    def on_train_batch_start(self, *_):
        self.count += 1


def test_a_stream_is_refused_before_the_first_step(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(6):
                Image.fromarray(np.full((8, 8, 3), 40 * i, dtype=np.uint8)).save(tmp_path / part / name / f"{i}.png")
    data = ImageFolderStream(tmp_path, image_size=8, batch_size=4, num_workers=0, val_fraction=0.25, seed=0)
    steps, short = Steps(), trainer(tmp_path)
    short.callbacks.append(steps)
    with pytest.raises(UserError, match=r"^data: ImageAutoencoder needs .* got ImageFolderStream") as error:
        short.fit(ImageAutoencoder(functools.partial(SMALL, in_channels=3)), datamodule=data)
    assert "\n" not in str(error.value)
    assert steps.count == 0


def test_images_of_another_size_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"^network: made for in_channels 1 and image_size 16"):
        fit(tmp_path, functools.partial(SMALL, image_size=16))


def test_a_schedule_on_a_plateau_lowers_the_rates_of_network_and_prior(tmp_path):
    never_better = {"threshold": 1e9, "threshold_mode": "abs", "patience": 0}
    plateau = functools.partial(ReduceLROnPlateau, monitor="val/mse", factor=0.5, **never_better)
    _, fitted = fit(tmp_path, epochs=3, lr_scheduler=plateau, bottleneck_lr_factor=4.0)
    assert [group["lr"] for group in fitted.optimizers[0].param_groups] == pytest.approx([2.5e-4, 1e-3])


def test_a_schedule_starts_from_the_raised_rate_of_the_prior(tmp_path):
    schedule = functools.partial(ExponentialLR, gamma=0.1)
    _, fitted = fit(tmp_path, epochs=1, lr_scheduler=schedule)
    assert [group["lr"] for group in fitted.optimizers[0].param_groups] == pytest.approx([1e-4, 1e-3])


@pytest.fixture
def features(tmp_path):
    _, fitted = fit(tmp_path, FEATURES)
    fitted.save_checkpoint(tmp_path / "features.ckpt")
    return tmp_path / "features.ckpt"


def test_the_feature_autoencoder_measures_and_stays_outside(tmp_path, features):
    module, plain = fit(tmp_path, feature_checkpoint=features)
    (figures,) = plain.test(module, datamodule=digits(), verbose=False)
    assert figures["test/fad"] > 0
    without, _ = fit(tmp_path)
    assert module.state_dict().keys() == without.state_dict().keys()
    for name, value in without.state_dict().items():  # loading it changed nothing of the training
        assert torch.equal(module.state_dict()[name], value), name


def test_real_images_are_closer_than_those_of_a_hardly_trained_network(tmp_path, features):
    module, fitted = fit(tmp_path, feature_checkpoint=features)
    (figures,) = fitted.test(module, datamodule=digits(), verbose=False)
    assert 0 <= figures["test/fad_real"] < 0.5 * figures["test/fad"]


def test_shuffles_are_summed_up_against_the_spikes_in_order(tmp_path):
    module, fitted = fit(tmp_path, epochs=20, shuffles=4)
    (figures,) = fitted.test(module, datamodule=digits(), verbose=False)
    clean = figures["test/mse_shuffled"] / (1 + figures["test/shuffle_change"])
    noisy = [value for name, value in figures.items() if name.startswith("test/mse_flip_")]
    assert clean == pytest.approx(sum(noisy) / len(noisy) - figures["test/drop"], rel=1e-4)
    assert figures["test/mse_shuffled_std"] > 0


def test_batch_statistics_change_the_distance_alone(tmp_path, features):
    figures = []
    for statistics in ("eval", "batch"):
        module, fitted = fit(tmp_path, feature_checkpoint=features, statistics=statistics)
        figures += fitted.test(module, datamodule=digits(), verbose=False)
    names = {name for name in figures[0] if abs(figures[0][name] - figures[1][name]) > 1e-9}
    assert names == {"test/fad", "test/fad_real"}


def test_inception_measures_what_a_network_generates_and_stays_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(training_glue, "load_inception", lambda path: torch.nn.Linear(1, 1))
    told = lambda network, inception, images, count: (float(len(images)), float(count))  # noqa: E731
    monkeypatch.setattr(training_glue, "fid_and_score", told)
    module, fitted = fit(tmp_path, inception_weights=tmp_path / "weights.pth")
    (figures,) = fitted.test(module, datamodule=digits(), verbose=False)
    assert (figures["test/fid"], figures["test/is"]) == (len(digits_of(fitted).images), 32)
    assert not any("inception" in name for name in module.state_dict())
    plain, fitted = fit(tmp_path, FEATURES, inception_weights=tmp_path / "weights.pth")
    (figures,) = fitted.test(plain, datamodule=digits(), verbose=False)
    assert not {"test/fid", "test/is"} & figures.keys()


def digits_of(fitted):
    return fitted.datamodule.test_split


def test_the_mean_image_is_learned_and_its_features_are_the_pixels(tmp_path):
    module, fitted = fit(
        tmp_path,
        functools.partial(MeanImage, image_size=8),
        epochs=8,
        optimizer=functools.partial(torch.optim.SGD, lr=9),
    )
    (figures,) = fitted.test(module, datamodule=digits(), verbose=False)
    data = fitted.datamodule
    train, test = (split.images.float().div(255) for split in (data.train_split, data.test_split))
    floor = (2 * (test - train.mean(0))).square().mean()
    assert figures["test/mse_mean_image"] == pytest.approx(float(floor), rel=1e-4)
    with torch.no_grad():
        error = (2 * (module.network.eval()(test) - test)).square().mean()
    assert error == pytest.approx(float(floor), rel=0.02)
    assert torch.equal(module.network.encode(test[:3]).features, test[:3].flatten(1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"statistics": "train"}, "statistics: expected eval or batch"),
        ({"feature_checkpoint": "a", "feature_weights": "b"}, "feature_weights: expected one feature network"),
        ({"reference_statistics": "a"}, "reference_statistics: expected the feature network"),
    ],
)
def test_options_of_the_distance_that_do_not_go_together_are_refused(options, said):
    with pytest.raises(UserError, match=f"^{said}"):
        ImageAutoencoder(SMALL, **options)


def test_a_feature_autoencoder_for_other_images_is_refused(tmp_path, features):
    with pytest.raises(UserError, match=r"^feature_checkpoint: expected .* leanlight run esvae/pipelines"):
        fit(tmp_path, feature_checkpoint=tmp_path / "none.ckpt")
    module = ImageAutoencoder(functools.partial(SMALL, image_size=16), feature_checkpoint=features)
    with pytest.raises(UserError, match=r"^feature_checkpoint: expected one for images of shape \(1, 16, 16\)"):
        trainer(tmp_path).fit(module, datamodule=ImageDataModule("digits", image_size=16, seed=0))


def test_pictures_and_export_do_not_depend_on_the_global_random_state(tmp_path):
    module, fitted = fit(tmp_path)
    fitted.test(module, datamodule=digits(), verbose=False)
    drawn, exported = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            drawn.append(module.media("test"))
        (tmp_path / str(seed)).mkdir()
        module.export(tmp_path / str(seed))
        exported.append(load_file(tmp_path / str(seed) / "samples.safetensors")["z"])
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(after, torch.rand(1))
    assert set(drawn[0]) == {"reconstructions", "samples", "latent_rates", "raster", "noise"}
    for name in ("reconstructions", "samples"):
        first, second = (items[name] for items in drawn)
        assert isinstance(first, ImageGrid)
        assert torch.equal(first.images, second.images)
    assert torch.equal(drawn[0]["raster"].matrix, drawn[1]["raster"].matrix)
    assert torch.equal(*exported)
