"""Window rules: statistics on made-up gradient norms, stages, limits."""

import math

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.at_bptt import AdaptiveWindow, FullWindow, HalfWindow, LastWindow, RandomWindow

T = 60
FALLING = torch.linspace(6, 1, T)  # norms as training gives them: large at first


def windows(selector, stage=None, norms=FALLING, count=300):
    if isinstance(selector, AdaptiveWindow):
        selector.stage = stage or selector.stage
    generator = torch.Generator().manual_seed(0)
    return [selector.select(T, norms if selector.needs_norms else None, generator) for _ in range(count)]


def mean_start(chosen):
    return sum(window.start for window in chosen) / len(chosen)


def test_early_windows_lie_before_uniform_ones_and_late_ones_behind():
    early, middle, late = (mean_start(windows(AdaptiveWindow(10, 4), stage)) for stage in ("early", "middle", "late"))
    assert early < middle - 5
    assert late > middle + 5


@pytest.mark.parametrize("anchor", ["start", "end"])
@pytest.mark.parametrize("late_rule", ["mirror", "complement"])
@pytest.mark.parametrize("stage", ["early", "middle", "late"])
@pytest.mark.filterwarnings("ignore:late_rule")
def test_a_window_never_leaves_the_inner_steps(anchor, late_rule, stage):
    selector = AdaptiveWindow(10, 4, anchor=anchor, late_rule=late_rule)
    for window in windows(selector, stage):
        assert window.start >= 0
        assert 6 <= window.length <= 14
        assert window.end <= T
    assert (selector.window, selector.half_range) == (10, 4)


def test_with_anchor_end_the_drawn_step_is_the_last_of_the_window():
    peaked = torch.full((T,), -1e3)
    peaked[30] = 0.0  # P puts all weight on one step
    (window,) = windows(AdaptiveWindow(10, 4, anchor="end", length="fixed"), "early", peaked, 1)
    assert (window.start, window.end) == (21, 31)
    (window,) = windows(AdaptiveWindow(10, 4, anchor="start", length="fixed"), "early", peaked, 1)
    assert (window.start, window.end) == (30, 40)


def test_the_rank_rule_uses_the_whole_range_of_lengths_and_the_paper_s_softmax_hardly_any():
    norms = torch.rand(T, generator=torch.Generator().manual_seed(1))
    lengths = {window.length for window in windows(AdaptiveWindow(10, 4), "early", norms)}
    assert (min(lengths), max(lengths)) == (6, 14)
    with pytest.warns(UserWarning, match="softmax"):
        literal = AdaptiveWindow(10, 4, length_rule="softmax")
    assert {window.length for window in windows(literal, "early", norms)} <= {6, 7, 8}


def test_lengths_of_the_middle_and_late_stage_are_the_longest_and_the_shortest():
    assert {window.length for window in windows(AdaptiveWindow(10, 4), "middle")} == {14}
    assert {window.length for window in windows(AdaptiveWindow(10, 4), "late")} == {6}
    adaptive = AdaptiveWindow(10, 4, length_stages="all")
    assert len({window.length for window in windows(adaptive, "late")}) > 3


def test_the_complement_rule_is_close_to_uniform_for_any_norms():
    for norms in (FALLING, torch.eye(T)[0] * 1e4):
        p = AdaptiveWindow(10, 4).probabilities(norms)
        complement = (1 - p) / (T - 1)
        divergence = float((complement * (complement * T).clamp(min=1e-300).log()).sum())
        assert divergence <= math.log(T / (T - 1)) + 1e-12


def test_standardised_norms_make_the_choice_independent_of_their_scale():
    selector = AdaptiveWindow(10, 4, norm_scale="zscore")
    assert torch.allclose(selector.probabilities(FALLING), selector.probabilities(1000 * FALLING + 5))


def stages(selector, accuracies, epochs):
    selector.prepare(T, epochs)
    seen = []
    for accuracy in accuracies:
        selector.end_epoch(accuracy)
        seen.append(selector.stage)
    return seen


def test_stages_change_after_exactly_x_and_y_small_gains_and_never_back():
    selector = AdaptiveWindow(10, 4, patience_early=0.05, patience_late=0.04)  # of 100 epochs: 5 and 4 small gains
    flat = [50.0] * 12  # 11 gains of 0
    assert stages(selector, flat, 100) == ["early"] * 5 + ["middle"] * 4 + ["late"] * 3
    assert stages(selector, [0.0, 50.0, 100.0], 100) == ["late"] * 3


def test_a_stage_lasts_its_least_number_of_epochs():
    selector = AdaptiveWindow(10, 4, patience_early=0.02, patience_late=0.02, min_stage_epochs=6)
    assert stages(selector, [50.0] * 14, 100) == ["early"] * 5 + ["middle"] * 6 + ["late"] * 3


@pytest.mark.parametrize("stage", ["early", "middle", "late"])
@pytest.mark.parametrize("anchor", ["start", "end"])
def test_no_adaptive_window_starts_before_the_least_step(stage, anchor):
    starts = [window.start for window in windows(AdaptiveWindow(10, 4, anchor=anchor, min_start=7), stage)]
    assert min(starts) == 7
    assert max(starts) > 7


def test_a_random_window_is_an_epoch_s_or_an_outer_step_s():
    assert not RandomWindow(10).redraws
    assert RandomWindow(10, redraw="step").redraws
    with pytest.raises(UserError, match="redraw: expected epoch or step"):
        RandomWindow(10, redraw="never")


def test_consecutive_counting_starts_again_after_a_large_gain():
    rising = [0.0, 0.0, 0.0, 10.0, 10.0, 10.0, 20.0, 20.0]  # gains: 0 0 10 0 0 10 0
    settings = {"patience_early": 0.03, "patience_late": 0.5}
    assert "middle" not in stages(AdaptiveWindow(10, 4, counter="consecutive", **settings), rising, 100)
    assert stages(AdaptiveWindow(10, 4, counter="cumulative", **settings), rising, 100)[4] == "middle"


def test_a_probe_is_asked_for_only_where_norms_decide():
    needs = {}
    for stage in ("early", "middle", "late"):
        selector = AdaptiveWindow(10, 4)
        selector.stage = stage
        needs[stage] = selector.needs_norms
    assert needs == {"early": True, "middle": False, "late": True}
    assert not AdaptiveWindow(10, 4, position="uniform", length="fixed").needs_norms


def test_state_goes_on_where_it_was():
    selector, other = AdaptiveWindow(10, 4), AdaptiveWindow(10, 4)
    stages(selector, [50.0] * 7, 100)
    other.prepare(T, 100)
    other.load_state_dict(selector.state_dict())
    assert stages(other, [50.0] * 4, 100) == stages(selector, [50.0] * 4, 100)


def test_the_other_rules_lie_where_their_names_say():
    assert {(w.start, w.length) for w in windows(FullWindow())} == {(0, T)}
    assert {(w.start, w.length) for w in windows(LastWindow(10))} == {(50, 10)}
    starts = [window.start for window in windows(RandomWindow(10), count=2000)]
    assert (min(starts), max(starts)) == (0, 50)
    assert abs(sum(starts) / len(starts) - 25) < 2


def test_halves_change_with_thirds_of_the_epochs():
    selector = HalfWindow(("first", "any", "second"), (10, 20, 5))
    selector.prepare(T, 3)
    seen = []
    for _ in range(3):
        seen.append(windows(selector))
        selector.end_epoch(0.0)
    first, whole, second = seen
    assert all(window.start <= 25 and window.length == 10 for window in first)
    assert max(window.start for window in whole) > 30
    assert all(window.start >= 27 and window.length == 5 for window in second)


@pytest.mark.parametrize(
    "selector",
    [
        LastWindow(61),
        RandomWindow(61),
        RandomWindow(50, 11),
        AdaptiveWindow(55, 6),
        AdaptiveWindow(40, 5, min_start=16),
    ],
)
def test_windows_longer_than_the_inner_training_are_refused(selector):
    with pytest.raises(UserError, match=r"expected .* inner_steps"):
        selector.prepare(T, 10)
