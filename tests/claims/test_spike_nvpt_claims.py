"""What prompts do around a small transformer that learned the digits 0 to 4, tuned to 5 to 9 with 100 labels."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from datamodules import ImageDataModule
from leanlight.ops.corruptions import Corruption
from lit_modules.nn import TimmNet
from lit_modules.optim import parameter_groups
from lit_modules.spike_nvpt import DensePrompts, LinearProbe, PromptTuning, SpikingPrompts

pytest.importorskip("timm", reason="needs the extra vision")

SEEDS = range(3)
VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
RULES = {  # rule and learning rate of the prompts
    "linear": (LinearProbe(), None),
    "vpt": (PromptTuning(functools.partial(DensePrompts, length=8)), 0.005),
    "spike": (PromptTuning(functools.partial(SpikingPrompts, length=8)), 0.1),
}
NOISES = [Corruption("gaussian", level=0.1), Corruption("gaussian", level=0.2), Corruption("impulse", level=0.1)]


def pixels(split):
    return split.images.float() / 255, split.labels


def train(network, groups, image, label, epochs, batch, seed):
    optimizer = torch.optim.AdamW(groups, lr=0.005, weight_decay=1e-4)
    steps = epochs * -(-len(image) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(image), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(network(image[index]), label[index]).backward()
            optimizer.step()
            schedule.step()


@functools.cache
def backbone():
    torch.manual_seed(0)
    data = ImageDataModule("digits", classes=[0, 1, 2, 3, 4])
    data.setup()
    net = TimmNet("vit_tiny_patch16_224", 1, 5, options=VIT, mean=0.3044, std=0.3754)
    train(net, [{"params": list(net.parameters()), "lr": 0.002}], *pixels(data.train_split), 40, 64, 0)
    image, label = pixels(data.test_split)
    assert (net.eval()(image).argmax(1) == label).float().mean() > 0.95
    return net


@functools.cache
def found():
    """rule → accuracy on clean and on noisy test images, means over the seeds."""
    data = ImageDataModule("digits", classes=[5, 6, 7, 8, 9], train_items=100)
    data.setup()
    image, label = pixels(data.test_split)
    noisy = torch.cat([noise(image, torch.arange(len(image))) for noise in NOISES])
    results = {}
    for name, (rule, lr) in RULES.items():
        scores = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            net = copy.deepcopy(backbone())
            net.network.reset_classifier(5)
            network = rule.adapt(net)
            options = {"lr": lr or 0.005, "weight_decay": 0.0}
            train(network, parameter_groups(network, {"prompts": options}), *pixels(data.train_split), 60, 50, seed)
            with torch.no_grad():
                right = (network.eval()(torch.cat([image, noisy])).argmax(1) == label.repeat(1 + len(NOISES))).float()
            scores.append([right[: len(label)].mean(), right[len(label) :].mean()])
        results[name] = torch.tensor(scores).mean(0).tolist()
    return results


@pytest.mark.slow
def test_prompts_adapt_to_new_classes_better_than_a_linear_probe():
    for rule in ("vpt", "spike"):
        for condition in range(2):
            assert found()[rule][condition] > found()["linear"][condition] + 0.03, (rule, condition, found())


@pytest.mark.slow
def test_bits_keep_about_the_share_of_accuracy_under_noise_that_real_valued_prompts_keep():
    clean, noisy = found()["spike"]
    assert noisy / clean > found()["vpt"][1] / found()["vpt"][0] - 0.05
