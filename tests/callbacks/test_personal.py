"""Accuracy of each client, before and after training of its own, against plain loops."""

import copy
import csv
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from callbacks import ExactResume, FederatedRounds, PersonalisedEvaluation, SpikeStatistics
from callbacks.federated.personal import like_client
from datamodules import ClassesPerClient, Dirichlet, FederatedDataModule, ImageDataModule
from leanlight.contracts import UserError, derived_seed
from lit_modules.classifier import ImageClassifier
from lit_modules.federated import FederatedClassifier, FedProx, LocalTraining, RandomClients, Scaffold
from lit_modules.nn import MLP
from lit_modules.sfedca import SpikingCNN

SMALL = functools.partial(MLP, in_channels=1, hidden=(8,), image_size=8)
SPIKING = functools.partial(SpikingCNN, channels=[], hidden=[16], time_steps=3, image_size=8)
CLIENTS = 8


def federation(folder, *callbacks, network=SMALL, partition=None, rounds=1, test=True, **model):
    """Fit and test a small federation; return module, data and what the test logged."""
    torch.manual_seed(0)
    module = FederatedClassifier(network, local=LocalTraining(2, 16), seed=0, **model)
    data = FederatedDataModule(
        dataset="digits", clients=CLIENTS, partition=partition or Dirichlet(0.5), partition_seed=0, seed=0
    )
    server = FederatedRounds(RandomClients(), participants=3, probe=0, every_n_epochs=0, seed=0)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=CSVLogger(folder),
        callbacks=[server, *callbacks, ExactResume()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_epochs=rounds,
    )
    trainer.fit(module, data)
    return module, data, trainer.test(module, data, verbose=False)[0] if test else None


def tuned(network, data, client, number, epochs, lr=0.1, batch_size=16):
    """A copy after plain epochs of SGD, in the order in which the suite takes a client's images."""
    network = copy.deepcopy(network).train()
    own = data.client_data(client)
    order = torch.Generator().manual_seed(derived_seed(0, "order", number, client))
    optimizer = torch.optim.SGD(network.parameters(), lr)
    for _ in range(epochs):
        for index in torch.randperm(len(own), generator=order).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(own.image[index]), own.label[index]).backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def accuracy(network, data, client, items):
    """On the test images of the client's classes that the suite draws."""
    generator = torch.Generator().manual_seed(derived_seed(0, "personal", client))
    index = like_client(data.class_matrix[client], data.test_split.labels, items, generator)
    image, label = data.test_split.images[index].float() / 255, data.test_split.labels[index]
    return (network.eval()(image).argmax(1) == label).double().mean().item()


@pytest.mark.parametrize("objective", [None, FedProx(0.5), Scaffold()], ids=["plain", "fedprox", "scaffold"])
def test_accuracies_before_and_after_training_are_those_of_a_plain_loop(tmp_path, objective):
    meter = PersonalisedEvaluation(epochs=3, items=40, seed=0)
    module, data, logged = federation(tmp_path, meter, rounds=2, objective=objective)
    before = [accuracy(module.network, data, client, 40) for client in range(CLIENTS)]
    after = [accuracy(tuned(module.network, data, client, 2, 3), data, client, 40) for client in range(CLIENTS)]
    assert [row.global_accuracy for row in meter.clients.values()] == pytest.approx(before)
    assert [row.tuned_accuracy for row in meter.clients.values()] == pytest.approx(after)
    for name, values in {"global": before, "tuned": after}.items():
        mean = sum(values) / CLIENTS
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / CLIENTS)
        assert logged[f"test/personal_{name}_mean"] == pytest.approx(mean)
        assert logged[f"test/personal_{name}_std"] == pytest.approx(spread, abs=1e-6)
        assert logged[f"test/personal_{name}_worst_decile"] == pytest.approx(min(values))
    assert logged["test/personal_gain"] == pytest.approx(sum(after) / CLIENTS - sum(before) / CLIENTS, abs=1e-6)
    assert logged["test/personal_gain"] > 0.05  # clients of few classes gain


def test_without_training_nobody_gains(tmp_path):
    meter = PersonalisedEvaluation(epochs=0, seed=0)
    _, _, logged = federation(tmp_path, meter)
    assert logged["test/personal_gain"] == 0
    assert all(row.global_accuracy == row.tuned_accuracy for row in meter.clients.values())


@pytest.mark.parametrize("network", [SMALL, SPIKING], ids=["relu", "spikes"])
def test_a_run_that_is_measured_is_the_same_run(tmp_path, network):
    plain, _, without = federation(tmp_path / "a", SpikeStatistics(0), network=network, rounds=2)
    meter = PersonalisedEvaluation(every_n_epochs=1, seed=0)
    module, _, logged = federation(tmp_path / "b", SpikeStatistics(0), meter, network=network, rounds=2)
    for name, value in plain.network.state_dict().items():
        assert torch.equal(module.network.state_dict()[name], value), name
    assert {name: value for name, value in logged.items() if "personal" not in name} == without


def test_rounds_are_measured_on_validation_images(tmp_path):
    meter = PersonalisedEvaluation(every_n_epochs=2, seed=0)
    federation(tmp_path, meter, rounds=3, test=False)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/personal_tuned_mean")]
    assert [int(row["epoch"]) for row in rows] == [1, 2]  # every second, and the last
    assert not any("test/" in name and value for row in rows for name, value in row.items())


def test_the_table_has_a_row_a_client(tmp_path):
    meter = PersonalisedEvaluation(items=20, seed=0)
    _, data, _ = federation(tmp_path, meter)
    folder = tmp_path / "artifacts" / "media" / "test"
    with (folder / "personal_clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["items"]) for row in rows] == data.client_sizes
    assert all(0 < int(row["measured_on"]) <= 20 for row in rows)
    assert (folder / "personal_accuracy.png").is_file()


# ---- which images


def draw(held, labels, items, seed=0):
    return like_client(torch.tensor(held), torch.tensor(labels), items, torch.Generator().manual_seed(seed))


def test_images_have_the_shares_of_the_clients_labels():
    labels = torch.arange(300) % 3
    index = draw([30, 0, 10], labels.tolist(), 40)
    assert torch.bincount(labels[index], minlength=3).tolist() == [30, 0, 10]
    assert len(index.unique()) == 40
    assert not torch.equal(index, draw([30, 0, 10], labels.tolist(), 40, seed=1))


def test_shares_that_are_no_whole_numbers_go_to_the_largest_remainders():
    labels = torch.arange(300) % 3
    assert torch.bincount(labels[draw([1, 1, 1], labels.tolist(), 200)]).sum() == 200
    assert torch.bincount(labels[draw([5, 3, 2], labels.tolist(), 7)]).tolist() == [4, 2, 1]  # of 3.5, 2.1, 1.4


def test_a_class_with_few_images_makes_all_give_fewer():
    labels = [0] * 10 + [1] * 100
    index = draw([50, 50], labels, 200)
    assert torch.bincount(torch.tensor(labels)[index]).tolist() == [10, 10]
    assert sorted(draw([7, 0], labels, 200).tolist()) == list(range(10))


def test_a_class_without_images_is_left_out():
    labels = [1] * 20
    assert len(draw([5, 5, 0], labels, 10)) == 10
    with pytest.raises(UserError, match="no image to measure on"):
        draw([5, 0, 0], labels, 10)


@pytest.mark.parametrize("seed", range(20))
def test_no_class_gives_more_images_than_it_has(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (60,), generator=generator)
    held = torch.randint(5, (6,), generator=generator) * torch.randint(40, (6,), generator=generator) + torch.eye(6)[0]
    index = like_client(held.long(), labels, 25, torch.Generator())
    assert 0 < len(index.unique()) == len(index) <= 25
    shares = held * (torch.bincount(labels, minlength=6) > 0)
    exact = shares / shares.sum() * len(index)
    assert ((torch.bincount(labels[index], minlength=6) - exact).abs() < 1).all()


# ---- bad input


@pytest.mark.parametrize("change", [{"epochs": -1}, {"every_n_epochs": -1}, {"items": 0}])
def test_numbers_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        PersonalisedEvaluation(**change)


def test_other_modules_are_refused(tmp_path):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", callbacks=[PersonalisedEvaluation()], **quiet)
    with pytest.raises(UserError, match="needs a federated module"):
        trainer.test(ImageClassifier(SMALL), ImageDataModule(dataset="digits"))


def test_rounds_without_validation_images_are_refused(tmp_path):
    data = FederatedDataModule(dataset="digits", clients=4, partition=ClassesPerClient(2), val_fraction=0.0)
    callbacks = [FederatedRounds(RandomClients(), participants=2), PersonalisedEvaluation(every_n_epochs=1)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with pytest.raises(UserError, match=r"every_n_epochs: .* val_fraction"):
        Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet).fit(FederatedClassifier(SMALL), data)
