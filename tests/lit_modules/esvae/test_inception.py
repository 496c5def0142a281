"""FID and Inception score with torch-fidelity's network: random weights in its layout, smaller images inside."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from leanlight.contracts import MissingExtraError, UserError
from lit_modules.esvae import VAE
from lit_modules.esvae.inception import fid_and_score, load_inception

torch_fidelity = pytest.importorskip("torch_fidelity", reason="needs the extra fidelity")
from torch_fidelity import feature_extractor_inceptionv3  # noqa: E402

SIDE = 75  # in place of 299: the smallest that every layer of Inception v3 takes


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(feature_extractor_inceptionv3.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("random", ["2048"])
    for name, weight in network.named_parameters():
        if name.endswith("bn.weight"):
            weight.fill_(6**0.5)  # signals keep their size through the layers
    network.fc.weight.normal_(0, 3)  # classes differ, so that the score is above 1
    torch.save(network.state_dict(), file)
    return file


def test_fid_and_score_are_those_of_the_library_and_of_the_definition(weights, monkeypatch):
    extractor = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    monkeypatch.setattr(extractor, "INPUT_IMAGE_SIZE", SIDE)
    torch.manual_seed(0)
    real = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    generated = torch.randint(0, 200, (24, 1, 8, 8), dtype=torch.uint8)
    fid, score = fid_and_score(Generator(generated), load_inception(weights), real, 24)

    oracle = extractor("oracle", ["2048"], weights)
    one, two = (oracle(images.repeat(1, 3, 1, 1))[0].double().numpy() for images in (real, generated))
    # tr (C1 C2)^(1/2) is the sum of the singular values of the centred features' products.
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (one, two))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross
    assert fid == pytest.approx(expected, rel=1e-4)
    settings = {"isc": True, "cuda": False, "cache": False, "verbose": False, "batch_size": 24, "save_cpu_ram": True}
    told = torch_fidelity.calculate_metrics(
        input1=Items(generated.repeat(1, 3, 1, 1)), feature_extractor_weights_path=str(weights), **settings
    )
    assert score == pytest.approx(told["inception_score_mean"], rel=1e-5)
    assert score > 1.05


class Generator(VAE):
    """Draws the images that it is given."""

    def __init__(self, images):
        super().__init__(1, 8, (4, 8), 3)
        self.images = images

    def generate(self, count):
        return self.images[:count] / 255


class Items(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("trace"),)


def test_other_weights_are_one_line_and_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs.pth").write_bytes(pickle.dumps(Runs()))
    torch.save({"fc.weight": torch.zeros(3)}, "other.pth")
    for name, reason in (("runs.pth", "does not fit"), ("other.pth", "missing"), ("none.pth", "expected a file")):
        with pytest.raises(UserError, match=rf"^inception_weights: .*{reason}") as error:
            load_inception(Path(name))
        assert "\n" not in str(error.value)
    assert not Path("trace").exists()


def test_without_the_package_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(MissingExtraError, match=r"torch-fidelity.*leanlight\[fidelity\]"):
        load_inception(tmp_path / "any.pth")
