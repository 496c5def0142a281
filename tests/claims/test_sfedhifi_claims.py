"""What fusion across widths does on real digits, in means over seeds."""

import functools

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks import FederatedRounds
from datamodules import Dirichlet, FederatedDataModule
from lit_modules.federated import LocalTraining, RandomClients
from lit_modules.sfedhifi import HIFI, FactorisedSpikingCNN, WidthFederation

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sfedhifi_claims")]
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
ROUNDS = 11


@functools.cache
def outcome(core, seed):
    """Mean over widths of validation accuracy: of the last three rounds, all of them fused, by width."""
    torch.manual_seed(seed)
    network = functools.partial(
        FactorisedSpikingCNN,
        image_size=8,
        channels=(16, 32, 32),
        time_steps=4,
        norm=True,
        inner_neuron=False,
        output_neuron=False,
    )
    module = WidthFederation(
        network,
        hifi=HIFI(rounds=ROUNDS, rank_ratio=0.5, core=core) if core else None,
        orthogonality_weight=1.0,
        local=LocalTraining(2, 32),
        optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        seed=seed,
    )
    partition = Dirichlet(0.5, min_size=2, capped=False)
    data = FederatedDataModule(
        dataset="digits", clients=10, partition=partition, partition_seed=seed, seed=seed, val_fraction=0.2
    )
    server = FederatedRounds(RandomClients(), participants=5, probe=0, every_n_epochs=0, seed=seed)
    trainer = Trainer(accelerator="cpu", callbacks=[server], max_epochs=ROUNDS, num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, data)
    last = torch.tensor(module._history["accuracy"][-3:]).mean(0)
    return last.tolist()


def mean(core):
    return sum(sum(outcome(core, seed)) / 4 for seed in range(3)) / 3


@pytest.mark.timeout(600)
def test_naive_cores_damage_the_rounds_they_fuse_and_aligned_cores_do_not():
    naive, aligned, plain = mean("naive"), mean("sign_aligned"), mean(None)
    assert aligned - naive >= 0.04, (naive, aligned, plain)
    assert aligned - plain >= -0.1, (naive, aligned, plain)


@pytest.mark.timeout(600)
def test_the_widest_network_is_more_accurate_than_the_narrowest():
    for core in (None, "sign_aligned"):
        widths = torch.tensor([outcome(core, seed) for seed in range(3)]).mean(0)
        assert widths[-1] > widths[0], widths
