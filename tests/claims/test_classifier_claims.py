"""What the classifier promises, on real digits."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules import ImageDataModule
from lit_modules.classifier import ImageClassifier, Recipe, train_and_score
from lit_modules.nn import ConvNet, LinearClassifier, SpikingConvNet

EPOCHS = 6
CONVNET = partial(ConvNet, in_channels=1, num_classes=10, width=16, depth=2, image_size=8)
SPIKING = partial(SpikingConvNet, in_channels=1, num_classes=10, width=16, depth=2, time_steps=4, image_size=8)
ADAM = partial(torch.optim.Adam, lr=3e-3)


def fit_and_test(network, epochs=EPOCHS):
    seed_everything(0, verbose=False)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", **quiet)
    module = ImageClassifier(network=network, optimizer=ADAM)
    data = ImageDataModule(dataset="digits", batch_size=64)
    trainer.fit(module, datamodule=data)
    return trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"], data


def test_a_spiking_network_learns_real_digits():
    accuracy, _ = fit_and_test(SPIKING)
    assert accuracy > 0.85


def test_training_inside_a_run_agrees_with_training_as_a_stage_of_its_own():
    staged, data = fit_and_test(CONVNET)
    train, test = ((split.images, split.labels) for split in (data.train_split, data.test_split))
    recipe = Recipe(epochs=EPOCHS, batch_size=64, lr=3e-3, optimizer="adam")
    inside = train_and_score(train, CONVNET, recipe, seeds=[0, 1, 2], test_data=test)
    assert staged == pytest.approx(sum(inside) / 3, abs=0.03)
    assert staged > 0.9


def test_convolutions_beat_a_linear_classifier():
    convolutional, _ = fit_and_test(CONVNET, epochs=12)
    linear, _ = fit_and_test(partial(LinearClassifier, in_channels=1, num_classes=10, image_size=8), epochs=12)
    assert convolutional > linear
