"""Differentially private training of clients, against plain loops and opacus' own accountant."""

import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from spikingjelly.activation_based import neuron
from torch import nn

from callbacks import FederatedRounds
from datamodules import Dirichlet, FederatedDataModule
from leanlight.contracts import UserError
from lit_modules.federated import (
    DPSGD,
    FederatedClassifier,
    FedProx,
    LocalTraining,
    PowerOfChoice,
    RandomClients,
    Scaffold,
)
from lit_modules.federated.local import cross_entropy
from lit_modules.federated.privacy import poisson_draw, private_gradient
from lit_modules.nn import MLP, ConvNet
from lit_modules.sfedca import CreditSelection, SpikingCNN

opacus = pytest.importorskip("opacus", reason="needs the extra 'dp'")

SMALL = functools.partial(MLP, in_channels=1, hidden=(8,), image_size=8)
SPIKING = functools.partial(SpikingCNN, channels=[], hidden=[16], time_steps=3, image_size=8)
CONVOLUTIONS = functools.partial(SpikingCNN, channels=[3], hidden=[8], time_steps=2, image_size=8)
WITH_NORM = functools.partial(ConvNet, in_channels=1, width=4, depth=1, norm="batch", image_size=8)


def federation(network=SMALL, local=None, selector=None, rounds=2, server=None, **model):
    """Fit a small federation; return module, data, callback and what was logged last."""
    torch.manual_seed(0)
    module = FederatedClassifier(network, local=local, seed=0, **model)
    data = FederatedDataModule(dataset="digits", clients=8, partition=Dirichlet(0.5), partition_seed=0, seed=0)
    options = {"participants": 3, "probe": 0, "every_n_epochs": 0, "seed": 0, **(server or {})}
    callback = FederatedRounds(selector or RandomClients(), **options)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", callbacks=[callback], max_epochs=rounds, limit_val_batches=0, **quiet)
    trainer.fit(module, data)
    return module, data, callback, {name: float(value) for name, value in trainer.callback_metrics.items()}


def items(count):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


@pytest.mark.parametrize("make", [SMALL, SPIKING, CONVOLUTIONS], ids=["relu", "spikes", "spikes of convolutions"])
def test_the_gradient_is_the_sum_of_each_images_clipped_one(make):
    torch.manual_seed(0)
    network, (image, label) = make().train(), items(12)
    parameters = list(network.parameters())
    losses = [F.cross_entropy(network(x[None]), y[None]) for x, y in zip(image, label, strict=True)]
    alone = [torch.autograd.grad(loss, parameters) for loss in losses]
    norms = torch.stack([torch.cat([g.flatten() for g in gradients]).norm() for gradients in alone])
    bound = norms.median().item()
    factors = (bound / norms).clamp(max=1)
    assert 0 < (factors < 1).sum() < 12
    sgd = torch.optim.SGD(parameters, 0.1)
    loss = private_gradient(network, DPSGD(0.0, bound), sgd, cross_entropy, expected=10.0)(image, label)
    for parameter, *each in zip(parameters, *alone, strict=True):
        expected = sum(factor * gradient for factor, gradient in zip(factors, each, strict=True)) / 10
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, F.cross_entropy(network(image), label).detach())


@pytest.mark.parametrize("mixed", [False, True])
def test_the_noise_of_a_step_has_the_standard_deviation_asked_for(mixed):
    torch.manual_seed(0)
    network, (image, label) = MLP(in_channels=1, hidden=(500,), image_size=8), items(0)  # of no image: noise alone
    sgd = torch.optim.SGD(network.parameters(), 0.1)
    gradient = private_gradient(network, DPSGD(noise_multiplier=2.0, max_grad_norm=3.0), sgd, cross_entropy, 4.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        assert gradient(image, label) == 0
    first = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert first.std().item() == pytest.approx(2.0 * 3.0 / 4.0, rel=0.02)
    assert abs(first.mean().item()) < 0.03
    gradient(image, label)
    second = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.03


@pytest.mark.parametrize("objective", [None, FedProx(0.5), Scaffold()], ids=["plain", "fedprox", "scaffold"])
def test_without_noise_and_bound_whole_batches_give_the_ordinary_weights(objective):
    whole = functools.partial(LocalTraining, epochs=3, batch_size=1000)
    plain, *_ = federation(SPIKING, whole(), objective=objective)
    private, *_, logged = federation(SPIKING, whole(privacy=DPSGD(0.0, 1e9)), objective=objective)
    for name, value in plain.network.state_dict().items():
        torch.testing.assert_close(private.network.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert "train/privacy_epsilon" not in logged  # there is none


def test_epsilon_is_that_of_the_accountant_for_the_steps_of_the_client_that_spent_most():
    local = LocalTraining(epochs=2, batch_size=16, privacy=DPSGD(noise_multiplier=1.1, delta=1e-4))
    _, data, server, logged = federation(local=local, rounds=4)
    times = Counter(client for entry in server.history for client in entry["chosen"])
    assert max(times.values()) > 1
    spent = []
    for client, rounds in times.items():
        size, accountant = data.client_sizes[client], opacus.accountants.RDPAccountant()
        for _ in range(rounds * 2 * -(-size // 16)):
            accountant.step(noise_multiplier=1.1, sample_rate=min(1.0, 16 / size))
        spent.append(accountant.get_epsilon(1e-4))
    assert logged["train/privacy_epsilon"] == pytest.approx(max(spent), rel=1e-5)


def test_clients_that_stop_early_or_drop_out_spend_for_the_steps_that_they_made():
    local = LocalTraining(epochs=4, batch_size=16, privacy=DPSGD())
    server = {"participants": 8, "dropout": 0.4, "stragglers": 0.5, "straggler_work": 0.3}
    _, data, callback, logged = federation(local=local, rounds=1, server=server)
    steps = {client: report.steps for client, report in callback.round.reports.items()}
    assert len(steps) < 8
    spent = []
    for client, made in steps.items():
        accountant = opacus.accountants.RDPAccountant()
        accountant.history = [(1.0, min(1.0, 16 / data.client_sizes[client]), made)]
        spent.append(accountant.get_epsilon(1e-5))
    assert logged["train/privacy_epsilon"] == pytest.approx(max(spent), rel=1e-5)


def test_a_private_run_learns_and_is_the_same_run_again():
    local = LocalTraining(epochs=2, batch_size=16, privacy=DPSGD(0.5))
    first, *_ = federation(SPIKING, local)
    torch.rand(17)
    again, *_ = federation(SPIKING, local)
    plain, *_ = federation(SPIKING, LocalTraining(epochs=2, batch_size=16))
    for name, value in first.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value), name
    assert any(not torch.equal(plain.network.state_dict()[n], v) for n, v in first.network.state_dict().items())


def test_each_step_takes_each_image_with_the_same_chance():
    local = LocalTraining(epochs=100, batch_size=10, privacy=DPSGD())
    order = list(local.batches(40, torch.Generator().manual_seed(0)))
    assert len(order) == 400  # as many steps as passes in batches of ten take
    taken = torch.bincount(torch.cat(order), minlength=40)
    assert ((taken - 100).abs() < 5 * (400 * 0.25 * 0.75) ** 0.5).all()
    sizes = torch.tensor([len(index) for index in order], dtype=torch.float64)
    assert sizes.var().item() == pytest.approx(40 * 0.25 * 0.75, rel=0.25)  # binomial
    assert all(len(index.unique()) == len(index) for index in order)
    assert torch.equal(poisson_draw(7, 1.0, torch.Generator()), torch.arange(7))


class Foreign(nn.Module):
    """A neuron of spikingjelly's own, whose surrogate `torch.func` cannot take."""

    def __init__(self):
        super().__init__()
        self.layer, self.neuron = nn.Linear(64, 10), neuron.IFNode()

    def forward(self, image):
        self.neuron.reset()
        return self.neuron(self.layer(image.flatten(1)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": WITH_NORM}, "without BatchNorm2d"),
        ({"network": Foreign}, "got Foreign"),
        ({"clients_at_once": 2}, "clients_at_once: expected 1"),
        ({"selector": CreditSelection()}, "a selector without scores"),
        ({"selector": PowerOfChoice(), "server": {"candidates": 4}}, "a selector without scores"),
    ],
)
def test_what_would_not_be_private_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        federation(local=LocalTraining(1, 16, privacy=DPSGD()), **change)


def test_a_package_that_lacks_names_the_extra(monkeypatch):
    monkeypatch.setattr("lit_modules.federated.privacy.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"leanlight\[dp\]"):
        federation(local=LocalTraining(1, 16, privacy=DPSGD()))


@pytest.mark.parametrize("change", [{"noise_multiplier": -1.0}, {"max_grad_norm": 0.0}, {"delta": 0.0}])
def test_numbers_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=f"privacy.{next(iter(change))}"):
        DPSGD(**change)
