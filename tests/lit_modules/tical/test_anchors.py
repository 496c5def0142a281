"""Lists of anchors are queues of a fixed length, whatever the order within a step; reserves are sorted lists."""

from collections import deque

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.tical.anchors import AnchorLists

NAMES, C, D, Q = ("text", "voice"), 3, 4, 7


def a_step(count, seed, chosen=0.5):
    """Points, labels, clips, which are chosen, confidences."""
    generator = torch.Generator().manual_seed(seed)
    points = {name: torch.rand(count, D, generator=generator) for name in NAMES}
    label = torch.randint(C, (count,), generator=generator)
    clip = torch.randperm(100, generator=generator)[:count]
    which = {name: torch.rand(count, generator=generator) < chosen for name in NAMES}
    return points, label, clip, which, {name: torch.rand(count, generator=generator) for name in NAMES}


def ring(lists, m):
    """What a ring holds, oldest first."""
    written = int(lists.written[m])
    places = [place % Q for place in range(max(written - Q, 0), written)]
    return [(lists.points[m, at].tolist(), int(lists.label[m, at]), int(lists.clip[m, at])) for at in places]


@pytest.mark.parametrize("count", [1, 3, 7, 20])
@pytest.mark.parametrize("chosen", [0.0, 0.4, 1.0])
def test_a_list_is_a_queue_of_a_fixed_length(count, chosen):
    lists = AnchorLists(NAMES, C, D, Q)
    queues = {name: deque(maxlen=Q) for name in NAMES}
    for step in range(6):
        points, label, clip, which, confidence = a_step(count, step, chosen)
        lists.add(points, label, clip, which, confidence)
        for row in sorted(range(count), key=lambda row: clip[row]):
            for name in NAMES:
                if which[name][row]:
                    queues[name].append((points[name][row].tolist(), int(label[row]), int(clip[row])))
        for m, name in enumerate(NAMES):
            assert ring(lists, m) == list(queues[name])
            of_class = [sum(each[1] == k for each in queues[name]) for k in range(C)]
            assert lists.counts()[m].tolist() == of_class
            empty = lists.label[m, len(queues[name]) : Q]
            assert (empty == -1).all()


def test_the_order_within_a_step_does_not_matter():
    one, other = AnchorLists(NAMES, C, D, Q), AnchorLists(NAMES, C, D, Q)
    for step in range(4):
        points, label, clip, which, confidence = a_step(6, step)
        one.add(points, label, clip, which, confidence)
        mixed = torch.randperm(6, generator=torch.Generator().manual_seed(step))
        points, which, confidence = ({k: v[mixed] for k, v in each.items()} for each in (points, which, confidence))
        other.add(points, label[mixed], clip[mixed], which, confidence)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_state_carries_everything():
    straight, first = AnchorLists(NAMES, C, D, Q), AnchorLists(NAMES, C, D, Q)
    for step in range(3):
        for lists in (straight, first):
            lists.add(*a_step(5, step))
            lists.observe({name: torch.rand(5, generator=torch.Generator().manual_seed(step)) for name in NAMES}, 0.3)
    resumed = AnchorLists(NAMES, C, D, Q)
    resumed.load_state_dict(first.state_dict())
    for lists in (straight, resumed):
        lists.add(*a_step(5, 9))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_reserve_holds_the_most_confident_samples_of_a_class():
    """Against sorted lists of Python, faded by 1 % at each step."""
    lists = AnchorLists(NAMES, C, D, Q)
    kept = {(name, k): [] for name in NAMES for k in range(C)}
    for step in range(8):
        points, label, clip, which, confidence = a_step(4, step)
        lists.add(points, label, clip, which, confidence)
        for (name, k), entries in kept.items():
            entries[:] = [(0.99 * sure, *rest) for sure, *rest in entries]
            for row in (label == k).nonzero()[:, 0].tolist():
                entries.append((confidence[name][row].item(), int(clip[row]), points[name][row].tolist()))
            kept[name, k] = sorted(entries, reverse=True)[:3]
    for (name, k), entries in kept.items():
        m, at = NAMES.index(name), slice(Q + 3 * k, Q + 3 * k + 3)
        filled = len(entries)
        assert filled > 0
        assert lists.label[m, at].tolist() == [k] * filled + [-1] * (3 - filled)
        assert lists.clip[m, at].tolist() == [entry[1] for entry in entries] + [-1] * (3 - filled)
        assert lists.points[m, at][:filled].tolist() == [entry[2] for entry in entries]
        assert lists.confidence[m, k][:filled].tolist() == pytest.approx([entry[0] for entry in entries])


def test_the_reserve_stands_in_only_for_a_class_without_anchors():
    lists = AnchorLists(NAMES, C, D, Q)
    points, label, clip = {name: torch.rand(6, D) for name in NAMES}, torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6)
    sure = torch.tensor([0.9, 0.5, 0.3, 0.2, 0.8, 0.9])
    lists.add(points, label, clip, {"text": sure > 0.7, "voice": torch.zeros(6).bool()}, sure)
    assert lists.without_anchors() == {"text": (1,), "voice": (0, 1, 2)}
    for m, reserved in enumerate(([1, 1], [0, 0, 1, 1, 2, 2])):
        behind = lists.label[m, Q:][lists.usable()[m, Q:]]
        assert behind.tolist() == reserved
    assert lists.usable()[:, :Q].sum(1).tolist() == [3, 0]
    lists.add(points, label, clip, torch.ones(6).bool(), sure)
    assert lists.without_anchors() == {"text": (), "voice": ()}
    assert not lists.usable()[:, Q:].any()


def test_a_modality_that_is_absent_leaves_nothing():
    lists, points = AnchorLists(NAMES, C, D, Q), {name: torch.rand(4, D) for name in NAMES}
    present = {"text": torch.tensor([True, False, True, False]), "voice": torch.ones(4).bool()}
    everything = torch.ones(4).bool()
    lists.add(points, torch.tensor([0, 1, 1, 2]), torch.arange(4), everything, everything.float(), present)
    assert lists.clip[0, :Q].tolist() == [0, 2, *[-1] * 5]
    assert sorted(lists.clip[0, Q:].tolist()) == [*[-1] * 7, 0, 2]
    assert lists.counts().tolist() == [[1, 1, 0], [1, 2, 1]]


def test_the_range_follows_the_steps():
    lists = AnchorLists(NAMES, C, D, Q)
    least, greatest = None, None
    for step in range(5):
        distance = torch.rand(6, generator=torch.Generator().manual_seed(step))
        lists.observe({"text": distance, "voice": torch.full((6,), torch.inf)}, momentum=0.25)
        now = distance.min().item(), distance.max().item()
        least, greatest = now if least is None else (0.75 * least + 0.25 * now[0], 0.75 * greatest + 0.25 * now[1])
    assert lists.range[0].tolist() == pytest.approx([least, greatest])
    assert lists.range[1].tolist() == [torch.inf, -torch.inf]


def test_other_modalities_and_sizes_are_refused():
    with pytest.raises(UserError, match="modalities: expected text, voice, got text"):
        AnchorLists(NAMES, C, D, Q).check(("text",))
    with pytest.raises(UserError, match="length: expected"):
        AnchorLists(NAMES, C, D, 0)
