"""FAD as published: against a stand-in of the published feature network in plain PyTorch, and scipy."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import nn

from leanlight.contracts import UserError
from lit_modules.esvae.evaluation import frechet_autoencoder_distances
from lit_modules.esvae.networks import to_signed
from lit_modules.esvae.published import published_features, reference_gaussian, use_batch_statistics

LATENT = 6
SHAPE = (1, 32, 32)


class Published(nn.Module):
    """The names and shapes of the published files, put together by hand."""

    def __init__(self, in_channels=1, widths=(32, 64, 128, 256)):
        super().__init__()
        pairs = list(zip((in_channels, *widths), widths, strict=False))
        self.encoder = nn.Sequential(*(self.block(nn.Conv2d(a, b, 3, 2, 1), b) for a, b in pairs))
        self.latent_layer = nn.Linear(4 * widths[-1], LATENT)
        self.decoder_input = nn.Linear(LATENT, 4 * widths[-1])
        self.decoder = nn.Sequential(*(self.block(self.up(b, a), a) for a, b in reversed(pairs[1:])))
        first, norm, act = self.block(self.up(widths[0], widths[0]), widths[0])
        last = nn.ConvTranspose2d(widths[0], in_channels, 3, padding=1)
        self.final_layer = nn.Sequential(first, norm, act, last, nn.Tanh())
        for module in self.modules():  # as if trained: no norm is the identity in evaluation
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)

    @staticmethod
    def up(a, b):
        return nn.ConvTranspose2d(a, b, 3, 2, 1, 1)

    @staticmethod
    def block(convolution, width):
        return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.LeakyReLU())

    def encode(self, image):
        return self.latent_layer(self.encoder(image).flatten(1))

    def forward(self, image):
        spread = self.decoder_input(self.encode(image)).unflatten(1, (-1, 2, 2))
        return self.final_layer(self.decoder(spread))


@pytest.fixture
def published(tmp_path):
    torch.manual_seed(0)
    network = Published()
    torch.save(network.state_dict(), tmp_path / "fashion_6.pth")
    return network, tmp_path / "fashion_6.pth"


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_published_file_gives_the_published_features_and_reconstructions(published, tmp_path, suffix):
    network, _ = published
    file = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(network.state_dict(), file)
    image = 2 * torch.rand(5, *SHAPE) - 1
    ours = published_features(file, SHAPE)
    with torch.no_grad():
        network.eval()
        torch.testing.assert_close(ours.encode(image).features, network.encode(image))
        torch.testing.assert_close(ours.decode(ours.encode(image).z), network(image))


def test_the_published_file_for_larger_images_has_a_fifth_convolution(tmp_path):
    torch.manual_seed(0)
    network = Published(3, (32, 64, 128, 256, 512)).eval()
    torch.save(network.state_dict(), tmp_path / "celeba.pth")
    image = 2 * torch.rand(2, 3, 64, 64) - 1
    with torch.no_grad():
        features = published_features(tmp_path / "celeba.pth", (3, 64, 64)).encode(image).features
        torch.testing.assert_close(features, network.encode(image))


def test_batch_statistics_are_those_of_a_network_that_is_never_in_evaluation_mode(published):
    network, file = published
    ours = published_features(file, SHAPE)
    use_batch_statistics(ours)
    ours.eval()
    image = 2 * torch.rand(9, *SHAPE) - 1
    with torch.no_grad():
        for part in (image, image[:4]):  # of this batch, and of nothing that came before
            torch.testing.assert_close(ours.encode(part).features, network.train().encode(part))


class Generator:
    """Draws the images that it is given, in order."""

    generates = True

    def __init__(self, images):
        self.images, self.drawn = images, 0

    def generate(self, count):
        self.drawn += count
        return self.images[self.drawn - count : self.drawn]


def published_fad(network, generated, mean, covariance):
    """Features of 128 images at a time, in training mode; scipy's matrix square root."""
    with torch.no_grad():
        features = [network.train().encode(to_signed(part)).double().numpy() for part in generated.split(128)]
    features = np.concatenate(features)
    own = np.cov(features, rowvar=False)
    root = scipy.linalg.sqrtm(own @ covariance).real
    return ((features.mean(0) - mean) ** 2).sum() + np.trace(own + covariance - 2 * root)


@pytest.mark.parametrize("stored", [True, False], ids=["statistics from a file", "those of the test images"])
def test_fad_with_batch_statistics_is_the_published_distance(published, tmp_path, stored):
    network, file = published
    torch.manual_seed(1)
    test, generated = (torch.rand(300, *SHAPE) * scale for scale in (1.0, 0.6))
    with torch.no_grad():  # the reference: 256 images at a time
        reference = torch.cat([network.train().encode(to_signed(part)) for part in test.split(256)]).double().numpy()
    mean, covariance = reference.mean(0), np.cov(reference, rowvar=False)
    np.savez_compressed(tmp_path / "fashion_test_6.npz", mu=mean.astype(np.float32), sigma=covariance)
    gaussian = reference_gaussian(tmp_path / "fashion_test_6.npz", LATENT) if stored else None
    ours = published_features(file, SHAPE)
    use_batch_statistics(ours)
    floor, distance = frechet_autoencoder_distances(Generator(generated), ours, test, test, 300, gaussian)
    assert distance == pytest.approx(published_fad(network, generated, mean, covariance), rel=1e-3)
    assert 0 <= floor < 0.1 * distance


def test_statistics_of_the_batch_see_the_order_of_images_and_not_their_contrast(published):
    def distance(images, batch):
        features = published_features(published[1], SHAPE)
        if batch:
            use_batch_statistics(features)
        return frechet_autoencoder_distances(Generator(images), features, real, real, 512)[1]

    torch.manual_seed(1)
    real, others = torch.rand(2, 512, *SHAPE) * torch.rand(2, 512, 1, 1, 1)
    faint = (others + 0.5) / 2  # half of the signal in [-1, 1]
    by_brightness = others[others.mean((1, 2, 3)).argsort()]
    for batch in (False, True):
        untouched = distance(others, batch)
        contrast, order = (distance(images, batch) / untouched - 1 for images in (faint, by_brightness))
        assert (abs(contrast) < 0.2) is batch, (batch, untouched, contrast)
        assert (abs(order) < 0.2) is not batch, (batch, untouched, order)


class Runs:
    """Unpickled without limits, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_hostile_weights_are_one_line_and_neither_run_nor_take_memory(published, tmp_path):
    network, _ = published
    runs, claims, trace = tmp_path / "runs.pth", tmp_path / "claims.pth", tmp_path / "trace"
    runs.write_bytes(pickle.dumps({"latent_layer.weight": Runs(trace)}))
    huge = {"latent_layer.weight": torch.zeros(1, 1).expand(10**9, 1024)}  # one number in the file
    torch.save(network.state_dict() | huge, claims)
    for file, reason in ((runs, "does not fit"), (claims, "claim more bytes than the file has")):
        with pytest.raises(UserError, match=rf"^feature_weights: .*{reason}") as error:
            published_features(file, SHAPE)
        assert "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {}, "KeyError: 'latent_layer.weight'"),
        (lambda state: state | {"extra.weight": torch.zeros(1)}, "unexpected extra.weight"),
        (lambda state: {k: v for k, v in state.items() if k != "final_layer.3.bias"}, "missing decoder.6.bias"),
        (lambda state: state | {"encoder.0.0.weight": torch.zeros(32, 3, 3, 3)}, "encoder.0.0.weight of shape"),
        (lambda state: state | {"encoder.0.0.weight": "text"}, "AttributeError"),
    ],
)
def test_weights_of_another_network_are_one_line(published, tmp_path, change, reason):
    torch.save(change(published[0].state_dict()), tmp_path / "other.pth")
    with pytest.raises(UserError, match=rf"^feature_weights: .*{reason}") as error:
        published_features(tmp_path / "other.pth", SHAPE)
    assert "\n" not in str(error.value)


def test_there_is_no_published_network_for_other_sizes_and_none_without_a_file(published, tmp_path):
    with pytest.raises(UserError, match=r"^feature_weights: .* images of 32 or 64 pixels, got 16"):
        published_features(published[1], (1, 16, 16))
    with pytest.raises(UserError, match=r"^feature_weights: expected a file of weights, got .*none.pth"):
        published_features(tmp_path / "none.pth", SHAPE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"mu": np.zeros(LATENT)}, "KeyError"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"has \(5,\) and \(5, 5\)"),
        ({"mu": np.full(LATENT, np.nan), "sigma": np.eye(LATENT)}, "has others"),
        ({"mu": np.zeros(LATENT), "sigma": np.triu(np.ones((LATENT, LATENT)))}, "has others"),
        ({"mu": np.array([Runs(Path("trace"))] * LATENT), "sigma": np.eye(LATENT)}, "ValueError: Object arrays"),
        ({"mu": np.array(["a"] * LATENT), "sigma": np.eye(LATENT)}, "TypeError"),
        (b"no archive", "gives"),
        (None, "FileNotFoundError"),
    ],
)
def test_other_statistics_are_one_line(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "stats.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.savez(file, **content)
    with pytest.raises(UserError, match=rf"^reference_statistics: expected .*{reason}") as error:
        reference_gaussian(file, LATENT)
    assert "\n" not in str(error.value)
    assert not Path("trace").exists()
