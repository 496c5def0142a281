"""Where a teacher comes from, and what is refused before anything is made of it."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import save_file

from leanlight.contracts import ImageMeta, UserError
from lit_modules.classifier import ImageClassifier
from lit_modules.dda import Teacher
from lit_modules.nn import ConvNet

NETWORK = partial(ConvNet, in_channels=1, num_classes=3, width=4, depth=1, norm="batch", image_size=8)


def meta(shape=(1, 8, 8), classes=("ant", "bee", "cat")):
    return ImageMeta(
        name="animals",
        source="nowhere",
        counts={},
        fingerprint="",
        num_classes=len(classes),
        shape=shape,
        classes=classes,
        class_counts=(),
    )


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    module = ImageClassifier(NETWORK)
    module.evaluation.prepare((1, 8, 8), ("ant", "bee", "cat"))
    return module


@pytest.fixture(scope="module")
def checkpoint(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "last.ckpt"
    trainer = pl.Trainer(logger=False, accelerator="cpu")
    trainer.strategy.connect(classifier)
    trainer.save_checkpoint(path)
    return path


def test_a_checkpoint_and_weights_from_a_file_give_one_teacher_frozen(classifier, checkpoint, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(classifier.network.state_dict(), weights)
    image = torch.rand(5, 1, 8, 8)
    expected = classifier.network.eval()(image)
    for teacher in (Teacher(checkpoint=checkpoint), Teacher(network=NETWORK, weights=weights)):
        loaded = teacher.load(meta())
        torch.testing.assert_close(loaded(image), expected, rtol=0, atol=0)
        assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
        assert not any(module.training for module in loaded.network.modules())


def test_numbers_stand_for_names_that_only_the_files_of_a_set_know(checkpoint):
    assert Teacher(checkpoint=checkpoint).load(meta(classes=("0", "1", "2")))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"shape": (1, 9, 9)}, r"teacher\.checkpoint: .*images of shape \(1, 9, 9\), got one for \(1, 8, 8\)"),
        ({"classes": ("ant", "bee", "dog")}, r"teacher\.checkpoint: .*the classes .*dog.*, got one for .*cat"),
        ({"classes": ("0", "1")}, r"teacher\.checkpoint: .*the classes"),
    ],
)
def test_a_checkpoint_for_other_images_is_refused(checkpoint, facts, message):
    with pytest.raises(UserError, match=message):
        Teacher(checkpoint=checkpoint).load(meta(**facts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"teacher\.checkpoint: .*leanlight run dda/pipelines"),
        ({"weights": "some.pt"}, r"teacher\.network: expected what makes the network that some\.pt is for"),
        ({"network": NETWORK, "weights": "none.pt"}, r"teacher\.weights: expected a file of weights, got none\.pt"),
        ({"network": NETWORK, "checkpoint": "some.ckpt"}, r"teacher\.checkpoint: expected none beside"),
        ({"network": partial(NETWORK, num_classes=4)}, r"teacher\.network: .*num_classes 3"),
        ({"network": partial(NETWORK, in_channels=3)}, r"teacher\.network: .*in_channels 1"),
    ],
)
def test_a_teacher_that_is_none_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Teacher(**options).load(meta())
