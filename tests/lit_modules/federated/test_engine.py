"""The federated engine against plain loops, closed forms and autograd, on real digits."""

import copy
import functools
import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn
from waits import Waits, waits

from callbacks import ExactResume, FederatedRounds
from callbacks.federated.exchange import mean_over_processes
from datamodules import ClassesPerClient, Dirichlet, FederatedDataModule
from leanlight.benchmarks.federated import mlp, simulate
from leanlight.contracts import ClientUpdate, ImageBatch, UserError
from lit_modules.federated import (
    FedAvg,
    FederatedClassifier,
    FedNova,
    FedProx,
    LargestUpdate,
    LocalObjective,
    LocalTraining,
    PowerOfChoice,
    RandomClients,
    Scaffold,
)
from lit_modules.federated.batched import LinearStack, find_stack, train_clients
from lit_modules.federated.firing import measure
from lit_modules.federated.local import make_update, train_client
from lit_modules.hparams import rebuild
from lit_modules.nn import MLP, ConvNet
from lit_modules.sfedca import CreditSelection, SpikingCNN

SPIKING = functools.partial(SpikingCNN, channels=[], hidden=[16], time_steps=3, image_size=8)
SMALL = functools.partial(MLP, in_channels=1, hidden=(8,), image_size=8)
CONV = functools.partial(ConvNet, in_channels=1, width=4, depth=1, norm="none", image_size=8)
WITH_NORM = functools.partial(ConvNet, in_channels=1, width=4, depth=1, norm="batch", image_size=8)


def federation(
    network=SMALL, selector=None, rounds=2, clients=12, partition=None, server=None, trainer=None, data=None, **model
):
    """Fit a small federation; return module, data and callback."""
    torch.manual_seed(0)
    local = model.pop("local", LocalTraining(epochs=1, batch_size=16))
    module = FederatedClassifier(network, local=local, seed=0, **model)
    data = data or FederatedDataModule(
        dataset="digits", clients=clients, partition=partition or Dirichlet(0.5), partition_seed=0, seed=0
    )
    options = {"participants": 4, "probe": 0, "every_n_epochs": 0, "seed": 0, **(server or {})}
    callback = FederatedRounds(selector or RandomClients(), **options)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    limits = {"max_epochs": rounds, "limit_val_batches": 0, **(trainer or {})}
    Trainer(accelerator="cpu", callbacks=[callback], **quiet, **limits).fit(module, datamodule=data)
    return module, data, callback


def batch(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ImageBatch(
        torch.rand(count, 1, 8, 8, generator=generator),
        torch.randint(10, (count,), generator=generator),
        torch.arange(count),
    )


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# ---- the whole engine against a plain loop


# One round with batch norm: its steps amplify what the order of the mean's additions changes.
@pytest.mark.parametrize(
    ("network", "rounds"),
    [(mlp, 3), (functools.partial(ConvNet, in_channels=1, width=4, depth=2, norm="batch", image_size=28), 1)],
)
def test_rounds_equal_a_plain_loop_over_state_dicts(network, rounds):
    model, clock = simulate(40, rounds, network=network)
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(value, clock.plain.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("objective", [None, FedProx(0.5), Scaffold()], ids=["plain", "fedprox", "scaffold"])
@pytest.mark.parametrize("network", [SMALL, SPIKING, CONV], ids=["mlp", "spiking", "convolutions"])
def test_clients_trained_together_equal_clients_trained_one_by_one(network, objective):
    options = {"partition": Dirichlet(0.3), "local": LocalTraining(epochs=2, batch_size=16)}
    one, _, _ = federation(network, objective=objective, **options)
    many, _, _ = federation(network, objective=objective, clients_at_once=3, **options)
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(many.network.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


class Twice(nn.Module):
    """Calls a layer twice, holds a layer in place, and never calls another."""

    def __init__(self):
        super().__init__()
        self.fixed, self.inner, self.head = nn.Linear(64, 6).requires_grad_(False), nn.Linear(6, 6), nn.Linear(6, 10)
        self.unused = nn.Linear(6, 2)

    def forward(self, image):
        return self.head(self.inner(self.inner(self.fixed(image.flatten(1))).relu()))


@pytest.mark.parametrize("objective", [LocalObjective(), FedProx(0.5)], ids=["plain", "fedprox"])
def test_layers_called_twice_never_or_held_in_place_train_together_as_alone(objective):
    network, local = Twice(), LocalTraining(2, batch_size=8)
    parts = [batch(20, seed=1), batch(13, seed=2)]
    stack = find_stack(network, local, (1, 8, 8))
    generators = [torch.Generator().manual_seed(client) for client in range(2)]
    reports, states = train_clients(network, parts, local, 0.5, objective, [[], []], generators, [1.0, 1.0], stack)
    assert stack is LinearStack
    for client, part in enumerate(parts):
        alone, order = copy.deepcopy(network), torch.Generator().manual_seed(client)
        sgd = torch.optim.SGD(alone.parameters(), 0.5)
        steps, passes, loss = train_client(alone, part, local, sgd, objective, [], order)
        assert reports[client][:2] == (steps, passes)
        torch.testing.assert_close(reports[client][2], loss)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(states[client][name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(states[client]["fixed.weight"], network.fixed.weight)
        assert not torch.equal(states[client]["inner.weight"], network.inner.weight)


def test_clients_train_together_in_mixed_precision():
    trainer = {"precision": "bf16-mixed"}
    one, _, _ = federation(rounds=1, trainer=trainer)
    many, _, _ = federation(rounds=1, trainer=trainer, clients_at_once=4)
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(many.network.state_dict()[name], value, rtol=0.01, atol=2e-3, msg=name)


def test_stragglers_stop_early_together_as_they_do_one_by_one():
    server = {"stragglers": 0.5, "straggler_work": 0.4}
    one, _, a = federation(server=server)
    many, _, b = federation(server=server, clients_at_once=4)
    assert {1.0, 0.4} == set(a.round.work.values())
    assert [r.steps for r in a.round.reports.values()] == [r.steps for r in b.round.reports.values()]
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(many.network.state_dict()[name], value, rtol=1e-4, atol=1e-5)


class Centred(nn.Module):
    """Takes the mean of a batch off its images; in numbers that `vmap` does not see."""

    def forward(self, image):
        return image - image.detach().numpy().mean()


class Counted(nn.Module):
    """Brightens images from call to call."""

    calls = 0

    def forward(self, image):
        self.calls += 1
        return image * self.calls


@pytest.mark.parametrize(
    ("network", "local"),
    [
        (WITH_NORM, LocalTraining()),
        (functools.partial(SPIKING, coding="poisson"), LocalTraining()),
        (lambda: nn.Sequential(Centred(), SMALL()), LocalTraining()),
        (lambda: nn.Sequential(Counted(), SMALL()), LocalTraining()),
        (SMALL, LocalTraining(augment="shift")),
    ],
    ids=["batch norm", "random spikes", "images mixed", "state", "augmentation"],
)
def test_what_cannot_be_batched_is_refused(network, local):
    with pytest.raises(UserError, match="clients_at_once: expected 1"):
        find_stack(network(), local, (1, 8, 8))


def test_a_fit_of_what_cannot_be_batched_is_refused():
    with pytest.raises(UserError, match="clients_at_once: expected 1 for a network with BatchNorm2d"):
        federation(WITH_NORM, clients_at_once=2)


def test_choosing_every_candidate_is_fedavg_bit_for_bit():
    chosen, _, _ = federation(SPIKING, CreditSelection(), server={"candidates": 4})
    random, _, _ = federation(SPIKING, RandomClients(), server={"candidates": 4})
    for name, value in random.network.state_dict().items():
        assert torch.equal(chosen.network.state_dict()[name], value), name


def test_a_round_counts_as_one_step():
    module, _, _ = federation(rounds=3)
    assert module.trainer.global_step == 3
    assert module.progress().unit == "round"
    assert module.progress().value == 3


# ---- objectives


def train(objective, control=(), epochs=1, count=16):
    torch.manual_seed(0)
    network = SMALL().double()
    data = batch(count)
    data = ImageBatch(data.image.double(), data.label, data.index)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    train_client(network, data, LocalTraining(epochs, 8), optimizer, objective, list(control), generator)
    return network


def plain_steps(penalty, epochs=1, count=16):
    """The same training with a loss that autograd differentiates."""
    torch.manual_seed(0)
    network = SMALL().double()
    start = copy.deepcopy(network)
    data = batch(count)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(count, generator=generator).split(8):
            loss = F.cross_entropy(network(data.image[index].double()), data.label[index]) + penalty(network, start)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def test_fedprox_descends_the_loss_with_its_proximal_term():
    def proximal(network, start):
        pairs = zip(network.parameters(), start.parameters(), strict=True)
        return 0.35 * sum((a - b.detach()).square().sum() for a, b in pairs)

    ours, expected = train(FedProx(0.7), epochs=3), plain_steps(proximal, epochs=3)
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_plain_training_makes_the_steps_of_torchs_sgd_bit_for_bit():
    ours, expected = train(LocalObjective(), epochs=3), plain_steps(lambda network, start: 0.0, epochs=3)
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fedprox_with_mu_0_is_plain_training():
    for a, b in zip(train(FedProx(0.0)).parameters(), train(LocalObjective()).parameters(), strict=True):
        assert torch.equal(a, b)


def test_scaffold_descends_a_loss_tilted_by_the_control_gap():
    torch.manual_seed(5)
    gap = [torch.randn_like(p) for p in SMALL().double().parameters()]

    def tilt(network, start):
        return sum((p * g).sum() for p, g in zip(network.parameters(), gap, strict=True))

    ours, expected = train(Scaffold(), gap, epochs=2), plain_steps(tilt, epochs=2)
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_scaffold_equals_its_algorithm_written_out():
    """Algorithm 1 of Karimireddy et al. with option II and full participation, in the words of the paper."""
    lr, rounds, clients = 0.1, 3, 5
    module, data, _ = federation(
        objective=Scaffold(), rounds=rounds, clients=clients, server={"participants": clients}, optimizer=None
    )
    from leanlight.contracts import derived_seed

    torch.manual_seed(0)
    x = SMALL()
    server = [torch.zeros_like(p) for p in x.parameters()]
    own = [[torch.zeros_like(p) for p in x.parameters()] for _ in range(clients)]
    for number in range(rounds):
        deltas, changes = [], []
        for k in range(clients):
            y, d = copy.deepcopy(x), data.client_data(k)
            order = torch.Generator().manual_seed(derived_seed(0, "order", number, k))
            steps = 0
            for index in torch.randperm(len(d), generator=order).split(16):
                gradients = torch.autograd.grad(
                    F.cross_entropy(y(d.image[index]), d.label[index]), list(y.parameters())
                )
                with torch.no_grad():
                    for p, g, c_k, c in zip(y.parameters(), gradients, own[k], server, strict=True):
                        p -= lr * (g - c_k + c)
                steps += 1
            with torch.no_grad():
                new = [
                    c_k - c + (a - b) / (steps * lr)
                    for c_k, c, a, b in zip(own[k], server, x.parameters(), y.parameters(), strict=True)
                ]
                deltas.append([b - a for a, b in zip(x.parameters(), y.parameters(), strict=True)])
                changes.append([a - b for a, b in zip(new, own[k], strict=True)])
            own[k] = new
        with torch.no_grad():
            for p, *moves in zip(x.parameters(), *deltas, strict=True):
                p += sum(moves) / clients
            server = [c + sum(moves) / clients for c, *moves in zip(server, *changes, strict=True)]
    for a, b in zip(module.network.parameters(), x.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def scaffold_run(folder, rounds, resume=None, every=1):
    """Train with control variates in a run folder; return module and checkpoint."""
    torch.manual_seed(0)
    module = FederatedClassifier(SMALL, local=LocalTraining(1, 16), objective=Scaffold(), seed=0)
    data = FederatedDataModule(dataset="digits", clients=12, partition=Dirichlet(0.5), partition_seed=0, seed=0)
    rules = [FederatedRounds(RandomClients(), participants=4, probe=0, every_n_epochs=0, seed=0), ExactResume(every)]
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", callbacks=rules, default_root_dir=folder, max_epochs=rounds, limit_val_batches=0, **quiet
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, folder / "checkpoints" / "last.ckpt"


def test_controls_lie_in_files_of_their_own_and_a_resumed_run_goes_on_with_them(tmp_path):
    whole, _ = scaffold_run(tmp_path / "whole", 4)
    _, half = scaffold_run(tmp_path / "parts", 2)
    saved = torch.load(half, weights_only=True)["federated"]["client_controls"]
    assert all(isinstance(name, str) for name in saved.values()), "no tensor of a client's in the checkpoint"
    resumed, _ = scaffold_run(tmp_path / "parts", 4, resume=half)
    elsewhere, _ = scaffold_run(tmp_path / "elsewhere", 4, resume=half)  # which is by now at round 4
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    for client, control in whole.controls.clients.items():
        for name, value in control.items():
            assert torch.equal(resumed.controls.clients[client][name], value)
            assert torch.equal(elsewhere.controls.clients[client][name], value)


def test_files_of_controls_that_no_checkpoint_names_are_deleted(tmp_path):
    _, last = scaffold_run(tmp_path, 8)
    needed = set()
    for path in last.parent.glob("*.ckpt"):
        needed |= set(torch.load(path, weights_only=True)["federated"]["client_controls"].values())
    there = {path.name for path in (tmp_path / "controls").iterdir()}
    assert needed <= there
    assert len(there) <= len(needed) + 1  # those of the checkpoint that `previous` has replaced go with the next one


def test_a_missing_file_of_controls_is_named(tmp_path):
    _, last = scaffold_run(tmp_path, 1)
    next((tmp_path / "controls").glob("*.pt")).unlink()
    with pytest.raises(UserError, match=r"controls.*cannot be read"):
        scaffold_run(tmp_path, 2, resume=last)


@pytest.mark.parametrize(("items", "work", "steps"), [(3, 0.1, 1), (40, 0.5, 4), (40, 0.01, 1), (0, 0.5, 0)])
def test_a_straggler_makes_its_share_of_the_steps_and_at_least_one(items, work, steps):
    generator = torch.Generator().manual_seed(0)
    # 40 images in batches of 10, twice: 8 steps
    assert len(list(LocalTraining(epochs=2, batch_size=10).batches(items, generator, work))) == steps


def test_a_last_batch_of_one_is_refused_where_a_norm_needs_more(tmp_path):
    flat = functools.partial(WithBatchNorm1d)
    sizes = federation(rounds=1)[1].client_sizes
    single = next(size for size in sizes if size > 8) - 1
    with pytest.raises(UserError, match=r"local.batch_size: .* last batch of one"):
        federation(network=flat, local=LocalTraining(1, single))
    federation(network=WITH_NORM, rounds=1, local=LocalTraining(1, single))  # a map of pixels has values enough


class WithBatchNorm1d(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


def test_scaffold_refuses_an_optimiser_with_momentum():
    with pytest.raises(UserError, match="Scaffold needs SGD"):
        federation(objective=Scaffold(), optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))


# ---- aggregation


def update(client, items, steps, **state):
    return ClientUpdate(client=client, items=items, steps=steps, loss=0.0, passes=0, state=state)


def test_fedavg_takes_the_plain_or_the_weighted_mean_and_the_largest_counter():
    updates = [
        update(0, 10, 1, w=torch.tensor([1.0, 2.0]), n=torch.tensor(3)),
        update(1, 30, 1, w=torch.tensor([3.0, 6.0]), n=torch.tensor(7)),
    ]
    plain, weighted = FedAvg()({}, updates, ["w"]), FedAvg("items")({}, updates, ["w"])
    assert plain["w"].tolist() == [2.0, 4.0]
    assert weighted["w"].tolist() == [2.5, 5.0]
    assert plain["n"] == 7


def test_fednova_normalises_by_local_steps():
    start = {"w": torch.tensor([1.0, 1.0])}
    updates = [update(0, 10, 2, w=torch.tensor([3.0, 1.0])), update(1, 30, 8, w=torch.tensor([1.0, 5.0]))]
    # p = 1/4, 3/4; steps 2, 8; mean of steps 6.5; changes a step: (1, 0) and (0, 0.5).
    expected = [1 + 6.5 * 0.25 * 1.0, 1 + 6.5 * 0.75 * 0.5]
    assert FedNova("items")(start, updates, ["w"])["w"].tolist() == pytest.approx(expected)
    equal = [update(0, 10, 4, w=torch.tensor([3.0, 1.0])), update(1, 10, 4, w=torch.tensor([1.0, 5.0]))]
    torch.testing.assert_close(FedNova()(start, equal, ["w"])["w"], FedAvg()(start, equal, ["w"])["w"])


def test_a_server_optimiser_applies_the_pseudo_gradient():
    half, _, _ = federation(rounds=1, server_optimizer=functools.partial(torch.optim.SGD, lr=0.5))
    full, _, _ = federation(rounds=1)
    torch.manual_seed(0)
    for start, a, b in zip(SMALL().parameters(), half.network.parameters(), full.network.parameters(), strict=True):
        torch.testing.assert_close(a, (start + b) / 2)


def test_batch_norm_buffers_are_averaged_or_kept():
    averaged, _, _ = federation(WITH_NORM, rounds=1)
    kept, _, _ = federation(WITH_NORM, rounds=1, buffers="keep")
    mean = next(v for n, v in averaged.network.state_dict().items() if n.endswith("running_mean"))
    still = next(v for n, v in kept.network.state_dict().items() if n.endswith("running_mean"))
    assert mean.abs().sum() > 0
    assert torch.equal(still, torch.zeros_like(still))


def test_the_clients_learning_rate_follows_the_round():
    torch.manual_seed(0)
    module = RateRecorder(
        SMALL,
        local=LocalTraining(1, 16),
        optimizer=functools.partial(torch.optim.SGD, lr=0.8),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
        seed=0,
    )
    data = FederatedDataModule(dataset="digits", clients=8, partition_seed=0, seed=0)
    callback = FederatedRounds(RandomClients(), participants=2, probe=0, every_n_epochs=0, seed=0)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", callbacks=[callback], max_epochs=5, limit_val_batches=0, **quiet).fit(module, data)
    assert RateRecorder.seen == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2])


class RateRecorder(FederatedClassifier):
    """Remembers the clients' learning rate of each round."""

    seen: ClassVar[list[float]] = []

    def start_round(self, round_number, joined, mine):
        super().start_round(round_number, joined, mine)
        self.seen.append(self._lr[0])


def test_mixed_precision_trains_and_scores_in_full_precision_what_it_measures():
    options = {"rounds": 1, "server": {"participants": 2, "candidates": 4}}
    mixed, _, server = federation(SPIKING, CreditSelection(), trainer={"precision": "bf16-mixed"}, **options)
    _, _, full = federation(SPIKING, CreditSelection(), **options)
    assert all(value.dtype == torch.float32 for value in mixed.network.parameters())
    assert list(server.round.scores.values()) == pytest.approx(list(full.round.scores.values()), rel=0.2, abs=0.02)


# ---- who takes part


def test_power_of_choice_trains_only_the_candidates_with_the_largest_loss():
    _, data, server = federation(
        selector=PowerOfChoice(draw="uniform"), rounds=1, server={"participants": 3, "candidates": 9}
    )
    torch.manual_seed(0)
    network = SMALL().eval()
    with torch.no_grad():
        losses = {}
        for client in server.round.candidates:
            d = data.client_data(client)
            losses[client] = float(F.cross_entropy(network(d.image), d.label))
    assert sorted(sorted(losses, key=losses.get)[-3:]) == server.round.chosen == sorted(server.round.reports)
    for client, loss in losses.items():
        assert server.round.scores[client] == pytest.approx(loss, rel=1e-5)


def test_the_largest_updates_are_measured_from_the_received_weights():
    module, _, server = federation(selector=LargestUpdate(), rounds=1, server={"participants": 1, "candidates": 5})
    (winner,) = server.round.chosen
    torch.manual_seed(0)
    squares = sum(
        (a - b).square().sum() for a, b in zip(module.network.parameters(), SMALL().parameters(), strict=True)
    )
    assert server.round.scores[winner] == pytest.approx(float(squares.sqrt()), rel=1e-5)
    assert winner == max(server.round.scores, key=server.round.scores.get)


def test_a_selector_without_scores_draws_as_many_as_take_part():
    _, _, server = federation(rounds=8, server={"participants": 2, "candidates": 9})
    assert {len(entry["chosen"]) for entry in server.history} == {2}
    assert len({client for entry in server.history for client in entry["chosen"]}) > 6  # not always the first of nine


def test_a_client_that_diverges_is_left_out_counted_and_does_not_stop_the_run():
    class Poisoned(FederatedDataModule):
        def _raw_data(self, client):
            found = super()._raw_data(client)
            return ImageBatch(found.image.float() / 0, found.label, found.index) if client == 0 else found

    data = Poisoned(dataset="digits", clients=4, partition_seed=0, seed=0)
    with pytest.warns(UserWarning, match=r"left out clients \[0\]"):
        module, _, server = federation(data=data, rounds=1)
    assert server.round.failed == [0]
    assert server.round.chosen == [1, 2, 3]
    assert all(value.isfinite().all() for value in module.network.state_dict().values())
    assert module.trainer.callback_metrics["train/failed_clients"] == 1


def test_when_nobody_comes_back_the_weights_stay():
    with pytest.warns(UserWarning, match="no client came back"):
        module, _, server = federation(rounds=1, server={"dropout": 1.0})
    torch.manual_seed(0)
    for a, b in zip(module.network.parameters(), SMALL().parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(server.round.dropped) == 4
    assert module.trainer.global_step == 1


def test_empty_clients_are_never_drawn():
    _, data, server = federation(
        clients=60, partition=Dirichlet(0.02, min_size=0, capped=False), rounds=3, server={"participants": 8}
    )
    empty = {client for client, size in enumerate(data.client_sizes) if size == 0}
    assert empty
    assert not empty & {client for entry in server.history for client in entry["chosen"]}


def test_a_thousand_clients_at_one_percent_keep_ten_updates_at_most():
    most = []

    class Watched(FederatedRounds):
        def on_train_batch_end(self, *arguments):
            super().on_train_batch_end(*arguments)
            most.append(len(self.round.updates))

    torch.manual_seed(0)
    data = FederatedDataModule(dataset="digits", clients=1000, partition_seed=0, seed=0)
    module = FederatedClassifier(SPIKING, local=LocalTraining(1, 16), seed=0)
    server = Watched(CreditSelection(), participants=10, candidates=30, probe=0, every_n_epochs=0, seed=0)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", callbacks=[server], max_epochs=2, limit_val_batches=0, **quiet).fit(module, data)
    assert max(most) == 10
    assert [len(entry["chosen"]) for entry in server.history] == [10, 10]


def test_silent_networks_are_chosen_from_at_random_with_a_warning():
    silent = functools.partial(SPIKING, v_threshold=1e9)
    with pytest.warns(UserWarning, match="every score is 0"):
        _, _, server = federation(silent, CreditSelection(), rounds=4, server={"participants": 2, "candidates": 6})
    firsts = [sorted(entry["scores"])[:2] == entry["chosen"] for entry in server.history]
    assert not all(firsts)  # ties do not let ids decide


def test_a_run_does_not_depend_on_what_was_drawn_before():
    first, _, _ = federation(SPIKING, CreditSelection(), server={"participants": 2, "candidates": 4})
    torch.rand(17)
    again, _, _ = federation(SPIKING, CreditSelection(), server={"participants": 2, "candidates": 4})
    for name, value in weights(first).items():
        assert torch.equal(weights(again)[name], value)


# ---- what it costs


def test_traffic_computing_and_labels_are_counted_as_by_hand():
    module, data, server = federation(
        SPIKING,
        CreditSelection(),
        rounds=1,
        partition=ClassesPerClient(2),
        server={"participants": 2, "candidates": 6, "probe": 8},
        local=LocalTraining(epochs=3, batch_size=16),
    )
    model_bytes = sum(v.numel() * v.element_size() for v in module.network.state_dict().values())
    found = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert found["train/downlink_mb"] == pytest.approx(6 * model_bytes / 1e6)
    assert found["train/uplink_mb"] == pytest.approx((2 * model_bytes + 6 * 4) / 1e6)
    assert found["train/image_passes"] == 3 * sum(data.client_sizes[c] for c in server.round.candidates)
    counts = data.class_matrix[server.round.chosen].sum(0).double()
    share = counts[counts > 0] / counts.sum()
    assert found["train/label_entropy"] == pytest.approx(float(-(share * share.log()).sum()) / math.log(10), rel=1e-5)
    assert found["train/energy_mj"] > 0


def test_the_round_that_reaches_the_target_is_found_on_validation_data():
    server = FederatedRounds(RandomClients(), target=0.5)
    for number, accuracy in enumerate([0.2, 0.4, 0.55, 0.45]):
        totals = {"uplink_mb": number + 1.0, "image_passes": 10.0 * number, "energy_mj": 0.5 * number}
        server.history.append({"round": number, "chosen": [], "scores": {}, "val": accuracy, **totals})
    assert server.summary() == {
        "accuracy_last": pytest.approx(0.4),
        "target_reached": 1.0,
        "rounds_to_target": 3.0,
        "passes_to_target": 20.0,
        "uplink_mb_to_target": 3.0,
        "energy_mj_to_target": 1.0,
    }
    server.target = 0.9
    assert server.summary()["target_reached"] == 0.0
    assert server.summary()["rounds_to_target"] == 5.0


def test_a_module_made_in_python_is_rebuilt_from_its_hyperparameters():
    module = FederatedClassifier(SMALL, local=LocalTraining(2, 16), objective=FedProx(0.3), buffers="keep", seed=4)
    again = rebuild(FederatedClassifier, dict(module.hparams))
    assert isinstance(again, FederatedClassifier)
    assert (again.local, again.objective, again.buffers_rule, again.seed) == (
        module.local,
        module.objective,
        "keep",
        4,
    )


# ---- bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"server": {"participants": 0}}, "participants"),
        ({"server": {"participants": 5, "candidates": 3}}, "candidates"),
        ({"server": {"participants": 50}}, "only 12 clients"),
        ({"server": {"dropout": 1.5}}, "dropout"),
        ({"server": {"straggler_work": 0.0}}, "straggler_work"),
        ({"trainer": {"limit_train_batches": 1}}, "limit_train_batches"),
        ({"clients_at_once": 0}, "clients_at_once"),
    ],
)
def test_settings_that_make_no_sense_are_said_in_one_line(change, words):
    with pytest.raises(UserError, match=words):
        federation(**change)


def test_without_the_callback_the_data_says_what_is_missing():
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    data = FederatedDataModule(dataset="digits", clients=4, partition_seed=0, seed=0)
    with pytest.raises(UserError, match="FederatedRounds"):
        Trainer(accelerator="cpu", max_epochs=1, **quiet).fit(FederatedClassifier(SMALL, seed=0), datamodule=data)


def test_other_data_is_refused():
    from datamodules import ImageDataModule

    with pytest.raises(UserError, match="FederatedDataModule"):
        federation(data=ImageDataModule(dataset="digits", seed=0))


def test_a_network_without_spikes_has_relu_activity_as_its_credit():
    module, _, server = federation(SMALL, CreditSelection(), rounds=1, server={"participants": 2, "candidates": 4})
    assert all(score > 0 for score in server.round.scores.values())
    assert isinstance(next(m for m in module.network.modules() if isinstance(m, nn.ReLU)), nn.ReLU)


@pytest.mark.parametrize("objective", [LocalObjective(), FedProx(0.1)], ids=["plain", "fedprox"])
def test_a_client_waits_for_a_device_no_more_often_the_longer_it_trains(objective):
    def train(epochs):
        network = SMALL()
        sgd = torch.optim.SGD(network.parameters(), 0.1)
        start = {name: value.detach().clone() for name, value in network.named_parameters()}
        local = LocalTraining(epochs, batch_size=8)
        trained = train_client(network, batch(40), local, sgd, objective, [], torch.Generator())
        make_update(0, 40, trained, start, network.state_dict(), {}, None, None)

    assert 1 <= waits(train, 1) == waits(train, 4) <= 3


def test_clients_trained_together_wait_no_more_often_the_more_they_are():
    def train(clients):
        local, generators = LocalTraining(2, batch_size=8), [torch.Generator() for _ in range(clients)]
        parts = [batch(24 + client) for client in range(clients)]
        works = [1.0] * clients
        train_clients(SMALL(), parts, local, 0.1, LocalObjective(), [[]] * clients, generators, works, LinearStack)

    assert waits(train, 2) == waits(train, 5)


def test_a_measurement_reads_a_device_once():
    with Waits() as seen:
        measure(SMALL(), batch(40), 10, batch_size=8)
    assert seen.calls == {"cpu": 1, "item": 1}  # the number is read of what is on the CPU then


def test_a_mean_over_processes_is_that_of_all_states():
    """Two processes played one after the other: the first's part is known when the second's is reduced."""
    states = [{"weight": torch.randn(3, 2), "bias": torch.randn(2), "count": torch.tensor(n)} for n in (4, 9, 2)]
    weights, sent = [0.5, 0.2, 0.3], []

    def other(tensor, reduce_op):
        sent.append((tensor.clone(), reduce_op))
        return tensor

    mean_over_processes(list(zip(states, weights, strict=True))[:2], states[0], other)

    def both(tensor, reduce_op):
        first, how = sent.pop(0)
        assert how == reduce_op
        return tensor + first if how == "sum" else torch.maximum(tensor, first)

    mean = mean_over_processes([(states[2], 0.3)], states[0], both)
    for name in ("weight", "bias"):
        expected = sum(weight * state[name] for state, weight in zip(states, weights, strict=True))
        torch.testing.assert_close(mean[name], expected)
    assert torch.equal(mean["count"], torch.tensor(9))


@pytest.mark.parametrize(
    ("rule", "named"),
    [({"aggregator": FedNova()}, "FedNova"), ({"objective": Scaffold()}, "Scaffold")],
    ids=["fednova", "scaffold"],
)
def test_a_rule_that_needs_each_client_refuses_a_sum(rule, named):
    with pytest.raises(UserError, match=f"exchange: sum .* {named} needs"):
        federation(server={"exchange": "sum"}, **rule)


def test_a_sum_on_one_process_is_the_usual_round():
    networks = [federation(server={"exchange": how})[0].network.state_dict() for how in ("states", "sum")]
    for name, value in networks[0].items():
        assert torch.equal(networks[1][name], value)
