"""What choosing clients does on real digits, in means over seeds; the gaps are about twice the margins asserted."""

import functools

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks import FederatedRounds
from datamodules import ClassesPerClient, ClassImbalance, FederatedDataModule
from lit_modules.federated import FederatedClassifier, LocalTraining, RandomClients
from lit_modules.sfedca import CreditSelection, HighFiring, SpikingCNN

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sfedca_claims")]
SHARDS, IMBALANCE = ClassesPerClient(2), ClassImbalance(3.0, 0.3)
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


@functools.cache
def outcome(selector, partition, seed):
    """Mean validation accuracy of the last five of 30 rounds, and entropy of the labels of all chosen clients."""
    torch.manual_seed(seed)
    network = functools.partial(SpikingCNN, channels=[], hidden=[64], time_steps=6, image_size=8)
    module = FederatedClassifier(
        network, local=LocalTraining(3, 16), optimizer=functools.partial(torch.optim.SGD, lr=0.5), seed=seed
    )
    data = FederatedDataModule(
        dataset="digits", clients=40, partition=partition, partition_seed=seed, seed=seed, val_fraction=0.2
    )
    drawn = 4 if isinstance(selector, RandomClients) else 12
    server = FederatedRounds(selector, participants=4, candidates=drawn, probe=0, every_n_epochs=0, seed=seed)
    Trainer(accelerator="cpu", callbacks=[server], max_epochs=30, num_sanity_val_steps=0, **QUIET).fit(module, data)
    last = [entry["val"] for entry in server.history[-5:]]
    return sum(last) / len(last), float(module.trainer.callback_metrics["train/label_entropy_total"])


def mean(selector, partition, part=0):
    return sum(outcome(selector, partition, seed)[part] for seed in range(3)) / 3


@pytest.mark.timeout(600)
def test_the_lowest_credits_end_clearly_below_the_highest():
    top, bottom = mean(CreditSelection(), SHARDS), mean(CreditSelection(order="bottom"), SHARDS)
    assert top - bottom >= 0.08, (top, bottom)


@pytest.mark.timeout(600)
def test_under_class_imbalance_credit_by_class_beats_random_selection_and_balances_labels():
    rule = CreditSelection("class_abs")
    assert mean(rule, IMBALANCE) - mean(RandomClients(), IMBALANCE) >= 0.05
    assert mean(rule, IMBALANCE, 1) > mean(RandomClients(), IMBALANCE, 1)


@pytest.mark.timeout(600)
def test_firing_alone_is_worse_than_random_selection():
    assert mean(HighFiring(), SHARDS) < mean(RandomClients(), SHARDS)
