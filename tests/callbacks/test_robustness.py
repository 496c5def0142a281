"""Accuracy on corrupted test images, against a plain loop."""

from importlib.util import find_spec

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import callbacks.library_corruptions
from callbacks import ExactResume, Robustness
from callbacks.library_corruptions import LIBRARY_CORRUPTIONS, LibraryCorruption
from datamodules import GameDataModule, ImageDataModule
from leanlight.contracts import MissingExtraError, UserError
from leanlight.experiment import resolve
from leanlight.ops.corruptions import NOISES, Corruption
from leanlight.runs import config_hash

RANDOM = ("glass_blur", "motion_blur", "snow", "frost", "fog", "spatter", "elastic_transform")
needs_library = pytest.mark.skipif(find_spec("imagecorruptions") is None, reason="needs the extra 'robustness'")


class Labels(pl.LightningModule):
    """A fixed linear classifier of digits that draws a random number for every test batch."""

    def __init__(self, outputs=10):
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, outputs)
        )
        self.drawn, self.dtypes = [], set()

    def forward(self, image):
        logits = self.network(image)
        self.dtypes.add((logits.dtype, self.training, torch.is_grad_enabled()))
        return logits

    def training_step(self, batch, batch_idx):
        assert self.network[2].training
        return nn.functional.cross_entropy(self.network(batch.image), batch.label)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)

    def test_step(self, batch, batch_idx):
        self.drawn.append(torch.rand(()).item())
        right = (self.network(batch.image).argmax(1) == batch.label).float().mean()
        self.log("test/accuracy", right, on_epoch=True, batch_size=len(batch))


class TwoNetworks(Labels):
    """Stands for two networks; the second answers as the first does for images turned upside down."""

    def variants(self):
        return {"up": self.network, "down": nn.Sequential(Flipped(), self.network)}


class Flipped(nn.Module):
    def forward(self, image):
        return image.flip(-2)


def trainer(folder, *others, **options):
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[*others, ExactResume()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **options,
    )


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = Labels()
    data = ImageDataModule(dataset="digits", batch_size=64)
    data.setup()
    image, label = data.train_split.images.float() / 255, data.train_split.labels
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module.network(image), label).backward()
        optimizer.step()
    return module.eval()


def expected(network, names, severities, **options):
    """Share of right answers by condition, over the whole test set at once; the clean one under the empty name."""
    data = ImageDataModule(dataset="digits")
    data.setup()
    image, label = data.test_split.images.float() / 255, data.test_split.labels
    index = torch.arange(len(label))
    shares = {"": (network(image).argmax(1) == label).double().mean().item()}
    for name in names:
        for severity in severities:
            noisy = Corruption(name, severity, **options)(image, index)
            shares[f"{name}_{severity}"] = (network(noisy).argmax(1) == label).double().mean().item()
    return shares


@pytest.mark.parametrize("batch_size", [50, 360])
def test_accuracies_are_those_of_a_plain_loop_whatever_the_batch_size(tmp_path, module, batch_size):
    meter = Robustness(NOISES, (5, 1, 3), scale="imagenet_c", seed=3)
    data = ImageDataModule(dataset="digits", eval_batch_size=batch_size)
    (logged,) = trainer(tmp_path, meter).test(module, data, verbose=False)
    shares = expected(module.network, NOISES, (1, 3, 5), scale="imagenet_c", seed=3)
    clean = shares.pop("")
    for name, share in shares.items():
        assert logged[f"test/{name}"] == pytest.approx(share, rel=1e-6)
    noisy = np.mean(list(shares.values()))
    assert 0.2 < noisy < clean - 0.05
    assert logged["test/accuracy"] == pytest.approx(clean, rel=1e-6)
    assert logged["test/noisy_accuracy"] == pytest.approx(noisy, rel=1e-6)
    assert logged["test/drop"] == pytest.approx(clean - noisy, rel=1e-5)
    assert logged["test/retention"] == pytest.approx(noisy / clean, rel=1e-6)
    assert (tmp_path / "artifacts" / "media" / "test" / "robustness.png").stat().st_size > 5000


def test_networks_of_a_module_are_measured_one_by_one(tmp_path, module):
    both = TwoNetworks()
    both.load_state_dict(module.state_dict())
    data = ImageDataModule(dataset="digits", eval_batch_size=100)
    (logged,) = trainer(tmp_path, Robustness(["impulse"], [4])).test(both, data, verbose=False)
    for name, network in both.variants().items():
        shares = expected(network.eval(), ["impulse"], [4])
        assert logged[f"test/impulse_4_{name}"] == pytest.approx(shares["impulse_4"], rel=1e-6)
        assert logged[f"test/drop_{name}"] == pytest.approx(shares[""] - shares["impulse_4"], abs=1e-6)
        assert (tmp_path / "artifacts" / "media" / "test" / f"robustness_{name}.png").is_file()
    assert "test/drop" not in logged


def test_measuring_changes_nothing_else(tmp_path, module):
    module.network.insert(3, Shaken())  # draws in every pass
    results = []
    for meter in (Robustness(), Robustness(["gaussian"], [2])):
        torch.manual_seed(1)
        module.drawn = []
        data = ImageDataModule(dataset="digits", eval_batch_size=100)
        (logged,) = trainer(tmp_path, meter).test(module, data, verbose=False)
        results.append((module.drawn, logged["test/accuracy"]))
    assert results[0] == results[1]
    assert len(set(results[0][0])) == 4


class Shaken(nn.Module):
    def forward(self, x):
        return x + 0.5 * torch.randn_like(x)


def test_without_corruptions_nothing_is_measured(tmp_path, module):
    (logged,) = trainer(tmp_path, Robustness()).test(module, ImageDataModule(dataset="digits"), verbose=False)
    assert logged.keys() == {"test/accuracy"}
    assert not (tmp_path / "artifacts").exists()
    assert not module.dtypes  # forward was not called


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_networks_run_in_the_trainers_precision_without_gradients_in_eval_mode(tmp_path, module, precision, dtype):
    run = trainer(tmp_path, Robustness(["speckle"], [1]), precision=precision)
    run.test(module, ImageDataModule(dataset="digits"), verbose=False)
    assert module.dtypes == {(dtype, False, False)}


def test_a_fit_trains_as_without_it_and_its_test_measures(tmp_path):
    weights = []
    for meter in (Robustness(), Robustness(["gaussian"], [2])):
        pl.seed_everything(5)
        module, data = Labels(), ImageDataModule(dataset="digits", batch_size=64)
        run = trainer(tmp_path, meter, max_steps=20)
        run.fit(module, data)
        weights.append([parameter.detach() for parameter in module.parameters()])
    assert all(map(torch.equal, *weights))
    (logged,) = run.test(module, data, verbose=False)
    assert "test/gaussian_2" in logged


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["gausian"],), r"robustness.corruptions: .* got 'gausian' \(did you mean 'gaussian'\?\)"),
        ((["shot_noise"],), r"did you mean 'shot'"),
        ((["shot", "fogg"],), r"did you mean 'fog'"),
        ((["shot"], [0]), r"robustness.severities: expected whole numbers from 1 to 5, got \[0\]"),
        ((["shot"], []), r"robustness.severities: expected whole numbers from 1 to 5, got \[\]"),
    ],
)
def test_bad_names_and_severities_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        Robustness(*arguments)


def test_data_that_are_no_labelled_images_are_refused(tmp_path):
    module = Labels()
    with pytest.raises(
        UserError, match=r"robustness.corruptions: expected data of labelled images, got GameDataModule"
    ):
        trainer(tmp_path, Robustness(["shot"])).test(module, GameDataModule(game="catch"), verbose=False)
    assert module.drawn == []


@pytest.mark.parametrize("phase", ["fit", "test"])
def test_networks_that_do_not_label_are_refused_before_the_first_step(tmp_path, phase):
    module, run = Labels(outputs=7), trainer(tmp_path, Robustness(["shot"]), max_epochs=1)
    with pytest.raises(UserError, match=r"with outputs \(N, 10\); Labels gives \(2, 7\); use \[\]"):
        getattr(run, phase)(module, datamodule=ImageDataModule(dataset="digits"))
    assert module.drawn == []
    assert run.global_step == 0


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(callbacks.library_corruptions, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"imagecorruptions-imaug.*leanlight\[robustness\]"):
        Robustness(["gaussian", "fog"])
    Robustness(NOISES)


def test_images_too_small_for_the_library_are_refused(tmp_path, module, monkeypatch):
    monkeypatch.setattr(callbacks.library_corruptions, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"fog takes images of 1 or 3 channels and at least 32 pixels a side, got 1"):
        trainer(tmp_path, Robustness(["shot", "fog"])).test(module, ImageDataModule(dataset="digits"), verbose=False)


# -- a run's identity


def test_only_a_measurement_that_is_on_counts_in_the_identity():
    config = resolve("fit", ["--config=classifier/digits_small"])
    assert config["robustness"]["corruptions"] in ([], ())
    old = {key: value for key, value in config.items() if key != "robustness"}
    assert config_hash(config) == config_hash(old)
    on = [{**config["robustness"], "corruptions": ["shot"], "severities": s} for s in ([1], [1, 2])]
    hashes = {config_hash(old), *(config_hash({**config, "robustness": settings}) for settings in on)}
    assert len(hashes) == 3


# -- the library's corruptions


@needs_library
@pytest.mark.parametrize("name", LIBRARY_CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_corruption_of_the_library_is_a_function_of_the_item(name, channels):
    from imagecorruptions import corrupt

    rows = torch.linspace(0, 1, 40)
    image = (rows[:, None] * rows.sin()).expand(3, channels, 40, 40) * torch.tensor([0.5, 0.7, 1.0])[
        :, None, None, None
    ]
    image, index, noise = (image * 255).round() / 255, torch.tensor([7, 3, 7]), LibraryCorruption(name, 3, seed=2)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    whole = noise(image, index)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert whole.shape == image.shape
    assert 0 <= whole.min() <= whole.max() <= 1
    assert torch.equal(whole[1:2], noise(image[1:2], index[1:2]))
    assert torch.equal(whole, torch.cat([noise(image[i : i + 1], index[i : i + 1]) for i in range(3)]))
    if channels == 3 and name not in (
        "glass_blur",
        "motion_blur",
        "snow",
        "frost",
        "fog",
        "spatter",
        "elastic_transform",
    ):
        pixels = (image[0] * 255).byte().permute(1, 2, 0).numpy()  # nothing random: the library itself
        assert np.array_equal(corrupt(pixels, 3, name), (whole[0] * 255).round().byte().permute(1, 2, 0).numpy())


@needs_library
def test_the_librarys_noise_depends_on_item_and_seed():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(4, 3, 32, 32)
    for name in RANDOM:
        one = LibraryCorruption(name, 3, seed=0)(image, torch.arange(4))
        two = LibraryCorruption(name, 3, seed=1)(image, torch.arange(4))
        assert len({tuple(x.flatten().tolist()) for x in (*one, *two)}) > 4, name


@needs_library
@pytest.mark.parametrize("name", NOISES)
def test_our_noises_have_the_moments_of_the_librarys(name):
    """Whose pixels are cut to 8 bits, half a level too dark on average; levels of ImageNet-C."""
    from imagecorruptions import corrupt

    image = torch.full((40, 3, 32, 32), 100 / 255)
    pixels = np.full((32, 32, 3), 100, np.uint8)
    for severity in (1, 3, 5):
        ours = Corruption(name, severity, scale="imagenet_c")(image, torch.arange(40)).double().mul(255).floor()
        np.random.seed(severity)  # noqa: NPY002
        its = torch.stack([torch.from_numpy(corrupt(pixels, severity, f"{name}_noise")) for _ in range(40)]).double()
        for f in (lambda x: x, lambda x: (x - 100) ** 2, lambda x: (x == 255).double()):
            error = ((f(ours).var() + f(its).var()) / its.numel()).sqrt()
            assert (f(ours).mean() - f(its).mean()).abs() <= 5 * error + 1e-6
