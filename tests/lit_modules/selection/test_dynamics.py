"""What training tells of its items: against loops that keep a dictionary by hand."""

import math

import pytest
import torch

from lit_modules.selection import DYNAMICS, FIELDS, TrainingDynamics, item_statistics

ITEMS, CLASSES = 11, 4
LABEL = torch.arange(ITEMS) % CLASSES


def statistics_by_hand(logits, label):
    """Probability, margin and error of one item, from Python numbers."""
    exponentials = [math.exp(x) for x in logits]
    softmax = [x / sum(exponentials) for x in exponentials]
    margin = logits[label] - max(x for i, x in enumerate(logits) if i != label)
    error = math.sqrt(sum((p - (i == label)) ** 2 for i, p in enumerate(softmax)))
    return [softmax[label], margin, error]


def batches(epoch, size=4, left_out=()):
    """Index and logits of an epoch's batches in an order of its own."""
    generator = torch.Generator().manual_seed(epoch)
    order = [i for i in torch.randperm(ITEMS, generator=generator).tolist() if i not in left_out]
    for start in range(0, len(order), size):
        index = torch.tensor(order[start : start + size])
        yield index, torch.randn(len(index), CLASSES, generator=generator)


def record(dynamics, epoch, **options):
    for number, (index, logits) in enumerate(batches(epoch, **options)):
        dynamics.record(index, logits, LABEL[index], number)
    dynamics.end_epoch()


def equal(left, right):
    return all(torch.equal(left[name].nan_to_num(7e7), right[name].nan_to_num(7e7)) for name in DYNAMICS)


def test_the_names_are_those_of_the_features():
    assert set(DYNAMICS) == {name for name in FIELDS if name.startswith("train_")}


def test_the_statistics_are_those_of_their_definitions():
    logits = torch.randn(ITEMS, CLASSES) * 3
    expected = [statistics_by_hand(row, label) for row, label in zip(logits.tolist(), LABEL.tolist(), strict=True)]
    torch.testing.assert_close(item_statistics(logits, LABEL), torch.tensor(expected).T, rtol=1e-5, atol=1e-6)


def test_a_tiny_error_keeps_its_digits():
    """Of 1e-6, where a difference of squares near one would leave nothing."""
    logits = torch.tensor([[0.0, -14.0, -15.0]])
    expected = statistics_by_hand(logits[0].tolist(), 0)[2]
    assert item_statistics(logits, torch.tensor([0]))[2].item() == pytest.approx(expected, rel=0.2)
    assert 1e-7 < expected < 1e-5


def test_every_item_has_what_was_recorded_in_every_epoch():
    dynamics, by_hand = TrainingDynamics(ITEMS), {}
    for epoch in range(3):
        record(dynamics, epoch)
        for index, logits in batches(epoch):
            for item, row in zip(index.tolist(), logits.tolist(), strict=True):
                by_hand[item, epoch] = statistics_by_hand(row, int(LABEL[item]))
    assert len(dynamics) == 3
    for row, name in enumerate(DYNAMICS):
        got = dynamics.by_item()[name]
        assert got.shape == (ITEMS, 3)
        assert got.dtype == torch.float32
        expected = torch.tensor([[by_hand[item, epoch][row] for epoch in range(3)] for item in range(ITEMS)])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_first_record_of_an_epoch_counts():
    dynamics = TrainingDynamics(2)
    first, again = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[9.0, 0.0]])
    dynamics.record(torch.tensor([0, 1]), first, torch.tensor([0, 1]), 0)
    dynamics.record(torch.tensor([0]), again, torch.tensor([0]), 1)
    dynamics.end_epoch()
    assert dynamics.by_item()["train_margin"][:, 0].tolist() == [3.0, 1.0]


def test_an_item_that_an_epoch_leaves_out_keeps_its_last_value():
    dynamics, whole = TrainingDynamics(ITEMS), TrainingDynamics(ITEMS)
    for epoch, left_out in enumerate([[2, 5], [2, 3], [3, 5]]):
        record(dynamics, epoch, left_out=[*left_out, 10])
        record(whole, epoch, left_out=[*left_out, 10])
    got = dynamics.by_item()["train_margin"]
    assert got[2, 0] == got[2, 1] == got[2, 2]  # first seen in the last epoch
    assert got[3, 0] == got[3, 1] == got[3, 2]  # seen in the first alone
    assert got[5, 0] == got[5, 1] == got[5, 2]  # seen in the middle
    assert got[10].isnan().all()  # never seen
    assert got[:10].isfinite().all()
    assert len(got[0].unique()) == 3


def test_an_epoch_without_records_is_none():
    dynamics = TrainingDynamics(ITEMS)
    dynamics.end_epoch()
    assert len(dynamics) == 0
    assert dynamics.by_item()["train_error"].shape == (ITEMS, 0)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_what_is_restored_inside_an_epoch_goes_on_to_the_same_bits(stop):
    undisturbed = TrainingDynamics(ITEMS)
    for epoch in range(3):
        record(undisturbed, epoch)
    first = TrainingDynamics(ITEMS)
    record(first, 0)
    parts = list(enumerate(batches(1)))
    for number, (index, logits) in parts[:stop]:
        first.record(index, logits, LABEL[index], number)
    state = first.state_dict()
    first.record(torch.arange(ITEMS), torch.randn(ITEMS, CLASSES), LABEL, 0)  # what a killed process still did
    second = TrainingDynamics(ITEMS)
    second.load_state_dict(state)
    for number, (index, logits) in parts[stop:]:
        second.record(index, logits, LABEL[index], number)
    second.end_epoch()
    record(second, 2)
    assert equal(second.by_item(), undisturbed.by_item())
