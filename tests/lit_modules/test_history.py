"""Curves of numbers kept over training, and their way through a checkpoint."""

import torch

from leanlight.contracts import Curve
from lit_modules.history import History


def filled():
    history = History()
    for step in (1, 2, 3):
        history.add(step=step, loss=1.0 / step)
    history.add(late=0.5)
    return history


def test_values_are_kept_by_name():
    history = filled()
    assert history["step"] == [1, 2, 3]
    assert history["nothing"] == []


def test_a_curve_has_the_lines_that_are_as_long_as_its_axis():
    curve = filled().curve("step", {"loss": "loss", "late": "late", "none": "nothing"}, "step", "value")
    assert curve == Curve([1, 2, 3], {"loss": [1.0, 0.5, 1.0 / 3]}, "step", "value")


def test_there_is_no_curve_of_one_point_or_without_lines():
    assert filled().curve("step", {"late": "late"}, "step", "value") is None
    assert filled().curve("late", {"late": "late"}, "late", "value") is None
    assert History().curve("step", {"loss": "loss"}, "step", "value") is None


def test_a_checkpoint_gives_back_the_same_lists_and_shares_none(tmp_path):
    history = filled()
    history.add(groups=["conv1", "conv2"])
    state = history.state_dict()
    history.add(step=4)
    torch.save(state, tmp_path / "history.pt")
    again = History()
    again.add(other=1)
    again.load_state_dict(torch.load(tmp_path / "history.pt", weights_only=True))
    assert again.values == {
        "step": [1, 2, 3],
        "loss": [1.0, 0.5, 1.0 / 3],
        "late": [0.5],
        "groups": [["conv1", "conv2"]],
    }
    again.add(step=9)
    assert state["step"] == [1, 2, 3]
