"""What images are made from, where there are none: a function of the seed and the number of an image."""

import pytest
import torch

from datamodules import CATALOG, NoiseDataModule
from datamodules.images import sources
from leanlight.contracts import MethodData, UserError
from leanlight.ops import counter


def data(**arguments) -> NoiseDataModule:
    made = NoiseDataModule(
        **{"dataset": "digits", "items": 10, "batch_size": 2, "latent_size": 3, "seed": 5} | arguments
    )
    made.setup()
    return made


def test_an_epoch_holds_every_number_in_order_and_what_belongs_to_it():
    batches = list(data().train_dataloader())
    assert [batch.index.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    for batch in batches:
        assert torch.equal(batch.latent, counter.noise(5, batch.index, 3))
        assert torch.equal(batch.label, counter.labels(5, batch.index, 10))
    whole = next(iter(data(batch_size=10).train_dataloader()))
    assert torch.equal(torch.cat([batch.latent for batch in batches]), whole.latent)


def test_processes_take_whole_batches_in_turn_and_one_that_lacks_its_last_repeats_one(monkeypatch):
    taken = []
    for rank in (0, 1):
        monkeypatch.setattr("datamodules.noise.rank_and_world", lambda rank=rank: (rank, 2))
        taken.append([batch.index.tolist() for batch in data().train_dataloader()])
    assert taken == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [0, 1]]]


def test_a_loader_goes_on_with_the_next_batch():
    loader = data().train_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    state = loader.state_dict()
    again = data().train_dataloader()
    again.load_state_dict(state)
    assert [batch.index.tolist() for batch in again] == [[4, 5], [6, 7], [8, 9]]
    with pytest.raises(UserError, match="cannot go on with 5 items, seed 6"):
        data(seed=6).train_dataloader().load_state_dict(state)


def test_facts_come_from_the_catalogue_without_loading_data(monkeypatch):
    monkeypatch.setattr(sources, "load", None)
    made = NoiseDataModule("cifar10", items=40, batch_size=8, image_size=16, seed=5)
    made.setup()
    assert isinstance(made, MethodData)
    meta = made.meta
    assert (meta.name, meta.shape, meta.classes) == ("cifar10", (3, 16, 16), CATALOG["cifar10"].classes)
    assert meta.counts == {"train": 40, "val": 0, "test": 0}
    labels = torch.cat([batch.label for batch in made.train_dataloader()]).tolist()
    assert meta.class_counts == tuple(labels.count(label) for label in range(10))


@pytest.mark.parametrize("change", [{"items": 20}, {"seed": 6}, {"latent_size": 4}, {"image_size": 9}])
def test_a_fingerprint_follows_from_what_is_drawn_and_not_from_the_batches(change):
    assert data(batch_size=5).meta.fingerprint == data().meta.fingerprint
    assert data(**change).meta.fingerprint != data().meta.fingerprint


def test_without_a_seed_it_is_that_of_the_run(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert data(seed=None).meta.fingerprint == data().meta.fingerprint
    assert torch.equal(next(iter(data(seed=None).train_dataloader())).latent, counter.noise(5, torch.arange(2), 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"items": 450, "batch_size": 200},
            "items: expected a multiple of batch_size 200, such as 400 or 600; got 450",
        ),
        ({"items": 50, "batch_size": 200}, "items: expected a multiple of batch_size 200, such as 200; got 50"),
        ({"latent_size": 0}, "latent_size: expected at least 1, got 0"),
        ({"dataset": "digit"}, "data set 'digit' is unknown"),
        ({"dataset": "image_folder"}, "dataset: expected a set whose classes the catalogue knows"),
        ({"dataset": "celeba"}, "dataset: expected a set whose classes the catalogue knows, each image of one"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        NoiseDataModule(**{"dataset": "digits"} | arguments)
