"""Verdicts equal loops over clips and anchors, and do what the formulas say at their limits."""

import math
from itertools import combinations

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.tical.assessment import ConsistencyAssessment
from lit_modules.tical.hyperbolic import Geometry

NAMES, C, D, N = ("text", "voice", "face"), 3, 4, 20


def drawn(count, seed, geometry):
    generator = torch.Generator().manual_seed(seed)
    return {name: geometry.points(torch.randn(count, D, generator=generator)) for name in NAMES}


def filled(settings, steps=3, count=12):
    """Lists with anchors of all classes, and a range of distances."""
    lists = settings.lists(NAMES, C)
    for step in range(steps):
        generator = torch.Generator().manual_seed(50 + step)
        label = torch.arange(count) % C
        clip = torch.randperm(100, generator=generator)[:count]
        chosen = {name: torch.rand(count, generator=generator) < 0.7 for name in NAMES}
        lists.add(drawn(count, step, settings.geometry), label, clip, chosen, torch.rand(count, generator=generator))
        lists.observe({name: 5 * torch.rand(count, generator=generator) for name in NAMES}, settings.range_momentum)
    return lists


def settings_of(**changed):
    return ConsistencyAssessment(**{"dim": D, "length": 16} | changed)


def anchors_of(lists, m, clip=None):
    """(point, label, clip) of the anchors in use."""
    rows = lists.usable()[m].nonzero()[:, 0].tolist()
    entries = [(lists.points[m, at], int(lists.label[m, at]), int(lists.clip[m, at])) for at in rows]
    return [entry for entry in entries if clip is None or entry[2] != clip]


@pytest.mark.parametrize("kind", ["poincare", "lorentz", "euclidean"])
@pytest.mark.parametrize("range_of", ["running", "batch"])
def test_the_paper_s_verdict_is_that_of_loops(kind, range_of):
    settings = settings_of(geometry=Geometry(kind), typicality_range=range_of)
    lists, points, clip = filled(settings), drawn(N, 9, settings.geometry), torch.arange(N)
    verdict = settings.assess(points, lists, clip)
    near = {name: [] for name in NAMES}
    for m, name in enumerate(NAMES):
        for row, point in enumerate(points[name]):
            entries = anchors_of(lists, m, row)
            distances = [settings.geometry.distance(point, entry[0]).item() for entry in entries]
            least = min(range(len(entries)), key=distances.__getitem__)
            near[name].append((distances[least], *entries[least][1:]))
    kappa = torch.ones(N, dtype=torch.float64)
    for m, name in enumerate(NAMES):
        distance = [each[0] for each in near[name]]
        assert verdict.distance[name].tolist() == pytest.approx(distance, rel=1e-4)
        assert verdict.pseudo[name].tolist() == [each[1] for each in near[name]]
        assert verdict.anchor[name].tolist() == [each[2] for each in near[name]]
        low, high = (min(distance), max(distance)) if range_of == "batch" else lists.range[m].tolist()
        tau = [min(max((high - each) / (high - low), 0), 1) for each in distance]
        assert verdict.typicality[name].tolist() == pytest.approx(tau, rel=1e-4, abs=1e-5)
        kappa *= torch.tensor(tau)
    for row in range(N):
        says = [near[name][row][1] for name in NAMES]
        unequal = sum(one != other for one, other in combinations(says, 2)) / 3
        expected = max(kappa[row].item(), 0) ** 0.2 * math.exp(-0.5 * unequal)
        assert verdict.consistency[row].item() == pytest.approx(expected, rel=1e-3)
    assert len({*verdict.consistency.tolist()}) > 5


@pytest.mark.parametrize("disagreement", ["product", "jensen_shannon"])
@pytest.mark.parametrize("neighbours", [1, 3])
def test_the_soft_verdict_is_that_of_loops(disagreement, neighbours):
    settings = settings_of(
        reading="soft", geometry=Geometry("euclidean"), disagreement=disagreement, neighbours=neighbours
    )
    lists, points = filled(settings), drawn(N, 9, settings.geometry)
    verdict = settings.assess(points, lists)
    for row in range(N):
        q, tau = {}, {}
        for m, name in enumerate(NAMES):
            entries = anchors_of(lists, m)
            means = []
            for k in range(C):
                apart = sorted(
                    math.dist(points[name][row].tolist(), each[0].tolist()) for each in entries if each[1] == k
                )
                means.append(sum(apart[:neighbours]) / len(apart[:neighbours]))
            exps = [math.exp(-each / 0.2) for each in means]
            q[name] = [each / sum(exps) for each in exps]
            first, second = sorted(means)[:2]
            tau[name] = (second - first) / (second + first)
            assert verdict.pseudo[name][row] == means.index(first)
            assert verdict.probabilities[name][row].tolist() == pytest.approx(q[name], rel=1e-3, abs=1e-6)
            assert verdict.typicality[name][row].item() == pytest.approx(tau[name], rel=1e-3, abs=1e-4)
        above = below = 0.0
        for one, other in combinations(NAMES, 2):
            above += tau[one] * tau[other] * agreement(q[one], q[other], disagreement)
            below += tau[one] * tau[other]
        assert verdict.consistency[row].item() == pytest.approx(above / below, rel=1e-3, abs=1e-4)


def agreement(p, q, form):
    if form == "product":
        return sum(a * b for a, b in zip(p, q, strict=True))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    divergence = sum(a / 2 * math.log(a / m) for side in (p, q) for a, m in zip(side, middle, strict=True) if a > 0)
    return 1 - divergence / math.log(2)


@pytest.mark.parametrize("typicality", ["margin", "prototype", "radius", "off"])
def test_other_typicalities_are_those_of_loops(typicality):
    settings = settings_of(typicality=typicality)
    lists, points = filled(settings), drawn(N, 9, settings.geometry)
    verdict, distance = settings.assess(points, lists), settings.geometry.distance
    for m, name in enumerate(NAMES):
        entries = anchors_of(lists, m)
        of = {k: torch.stack([each[0] for each in entries if each[1] == k]) for k in range(C)}
        centre = {k: settings.geometry.mean(rows, torch.ones(1, len(rows)))[0] for k, rows in of.items()}
        for row, point in enumerate(points[name]):
            k = int(verdict.pseudo[name][row])
            first, second = sorted(distance(point, rows).min().item() for rows in of.values())[:2]
            expected = {
                "margin": (second - first) / (second + first),
                "prototype": math.exp(-distance(point, centre[k]).item() / distance(of[k], centre[k]).mean().item()),
                "radius": point.norm().item(),
                "off": 1.0,
            }
            assert verdict.typicality[name][row].item() == pytest.approx(expected[typicality], rel=1e-3)


def of_labels(says, settings, typical=1.0):
    """The verdict on one clip whose modalities say classes; anchors of a class lie in one place, far from others."""
    lists, corner = settings.lists(NAMES, C), torch.eye(4)[:C] * 2
    where = settings.geometry.points(corner)
    lists.add(dict.fromkeys(NAMES, where), torch.arange(C), torch.arange(C), torch.ones(C).bool(), torch.ones(C))
    lists.observe({name: torch.tensor([0.0, 1.0]) for name in NAMES}, 1.0)
    lists.range[:, 1] = settings.geometry.distance(where[0], settings.geometry.points(1.5 * corner[0]))
    typical = [typical] * len(says) if isinstance(typical, float) else typical
    points = {
        name: settings.geometry.points((2 if share else 1.5) * corner[k : k + 1] / 2)
        for name, k, share in zip(NAMES, says, typical, strict=True)
    }
    return settings.assess(points, lists)


def test_kappa_at_its_limits():
    far = Geometry("euclidean", clip=9.0)
    for disagreement, apart in (
        ("pairs", (0, 2 / 3, 1)),
        ("levels", (0, 1, 1)),
        ("power", (0, (4 / 3) ** 4, (4 / 3) ** 4)),
    ):
        settings = settings_of(geometry=far, disagreement=disagreement)
        for says, expected in zip(((1, 1, 1), (0, 0, 2), (0, 1, 2)), apart, strict=True):
            kappa = of_labels(says, settings).consistency.item()
            assert kappa == pytest.approx(math.exp(-0.5 * expected)), (disagreement, says)
    one_untypical = settings_of(geometry=far)
    verdict = of_labels((1, 1, 1), one_untypical, typical=[1.0, 0.0, 1.0])
    assert verdict.typicality["voice"].item() < 1
    assert verdict.typicality["text"].item() == 1
    flat = settings_of(geometry=far, temperature=0.0, scale=0.0)
    assert of_labels((0, 1, 2), flat).consistency.item() == 1
    constant = settings_of(geometry=far, consistency=False)
    assert of_labels((0, 1, 2), constant).consistency.item() == 0.5


def test_kappa_is_0_as_soon_as_one_modality_is_not_typical_at_all():
    settings = settings_of()
    lists = filled(settings)
    points = drawn(N, 9, settings.geometry)
    lists.range[1] = torch.tensor([1e-6, 2e-6])
    verdict = settings.assess(points, lists)
    assert (verdict.typicality["voice"] == 0).all()
    assert (verdict.consistency == 0).all()


def test_soft_consistency_at_its_limits():
    settings = settings_of(reading="soft", geometry=Geometry("euclidean", clip=9.0), neighbours=1)
    assert of_labels((1, 1, 1), settings).consistency.item() == pytest.approx(1, abs=1e-4)
    assert of_labels((0, 1, 2), settings).consistency.item() == pytest.approx(0, abs=1e-4)
    assert of_labels((0, 0, 2), settings).consistency.item() == pytest.approx(1 / 3, abs=1e-4)
    # A face between two classes is not typical of either, and leaves text and voice to decide.
    lists, corner = settings.lists(NAMES, C), torch.eye(4)[:C] * 2
    lists.add(dict.fromkeys(NAMES, corner), torch.arange(C), torch.arange(C), torch.ones(C).bool(), torch.ones(C))
    points = {"text": corner[:1], "voice": corner[:1], "face": (corner[1:2] + corner[2:3]) / 2}
    verdict = settings.assess(points, lists)
    assert verdict.typicality["face"].item() == 0
    assert verdict.consistency.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("changed", [{}, {"reading": "soft"}, {"typicality": "prototype"}])
def test_a_clip_gets_one_answer_whatever_is_beside_it(changed):
    settings = settings_of(**changed)
    lists, points = filled(settings), drawn(64, 9, settings.geometry)
    together = settings.assess(points, lists)
    for row in (0, 17, 63):
        alone = settings.assess({name: each[row : row + 1] for name, each in points.items()}, lists)
        torch.testing.assert_close(alone.consistency, together.consistency[row : row + 1])
        for name in NAMES:
            assert alone.pseudo[name] == together.pseudo[name][row]
            torch.testing.assert_close(alone.typicality[name], together.typicality[name][row : row + 1])


def test_the_published_range_depends_on_the_batch():
    settings = settings_of(typicality_range="batch")
    lists, points = filled(settings), drawn(64, 9, settings.geometry)
    half = settings.assess({name: each[:32] for name, each in points.items()}, lists)
    assert not torch.allclose(half.consistency, settings.assess(points, lists).consistency[:32], atol=1e-3)


def test_no_clip_is_its_own_anchor():
    settings = settings_of()
    lists, points = settings.lists(NAMES, C), drawn(6, 0, settings.geometry)
    label, clip = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6)
    lists.add(points, label, clip, torch.ones(6).bool(), torch.ones(6))
    known = settings.assess(points, lists, clip)
    foreign = settings.assess(points, lists)
    for name in NAMES:
        assert not (known.anchor[name] == clip).any()
        assert (known.distance[name] > 0).all()
        assert torch.equal(foreign.anchor[name], clip)
        assert torch.equal(foreign.pseudo[name], label)


@pytest.mark.parametrize(("reading", "constant"), [("paper", 0.5), ("soft", 1.0)])
@pytest.mark.parametrize("typicality", [None, "prototype", "margin"])
def test_empty_lists_know_nothing(reading, constant, typicality):
    settings = settings_of(reading=reading, typicality=typicality)
    verdict = settings.assess(drawn(5, 0, settings.geometry), settings.lists(NAMES, C))
    assert verdict.consistency.tolist() == [constant] * 5
    for name in NAMES:
        assert verdict.pseudo[name].tolist() == verdict.anchor[name].tolist() == [-1] * 5
        assert verdict.typicality[name].tolist() == [0] * 5
        assert verdict.probabilities[name].tolist() == [[0] * C] * 5


@pytest.mark.parametrize("reading", ["paper", "soft"])
def test_an_absent_modality_says_nothing_and_the_others_decide(reading):
    settings = settings_of(reading=reading)
    lists, points = filled(settings), drawn(N, 9, settings.geometry)
    present = {name: torch.ones(N, dtype=torch.bool) for name in NAMES}
    everything = settings.assess(points, lists, present=present)
    assert torch.equal(everything.consistency, settings.assess(points, lists).consistency)
    present["face"] = torch.arange(N) % 2 == 0
    verdict = settings.assess(points, lists, present=present)
    assert (verdict.pseudo["face"][1::2] == -1).all()
    assert (verdict.typicality["face"][1::2] == 0).all()
    assert torch.equal(verdict.consistency[::2], everything.consistency[::2])
    odd = {name: each[1::2] for name, each in verdict.typicality.items()}
    if reading == "paper":
        unequal = (verdict.pseudo["text"] != verdict.pseudo["voice"])[1::2].float()
        expected = (odd["text"] * odd["voice"]) ** 0.2 * (-0.5 * unequal).exp()
    else:
        both = (verdict.probabilities["text"] * verdict.probabilities["voice"]).sum(1)[1::2]
        expected = torch.where(odd["text"] * odd["voice"] > 0, both, 1)
    torch.testing.assert_close(verdict.consistency[1::2], expected)


def test_anchors_are_samples_that_are_recognised_with_confidence():
    settings = settings_of(theta=0.6)
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.55, 0.35, 0.1], [0.1, 0.2, 0.7]])
    chosen, confidence = settings.chosen(probability.log(), torch.tensor([0, 1, 0, 2]))
    assert chosen.tolist() == [True, False, False, True]
    assert confidence.tolist() == pytest.approx([0.7, 0.2, 0.55, 0.7])


def test_no_verdict_has_a_gradient():
    settings = settings_of()
    points = {name: each.requires_grad_() for name, each in drawn(4, 0, settings.geometry).items()}
    verdict = settings.assess(points, filled(settings))
    assert not verdict.consistency.requires_grad
    assert not any(each.requires_grad for each in verdict.typicality.values())


@pytest.mark.parametrize("reading", ["paper", "soft"])
def test_a_verdict_can_be_exported_for_any_number_of_clips(reading):
    settings = settings_of(reading=reading)

    class Verdict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lists = filled(settings)

        def forward(self, points):
            verdict = settings.assess(points, self.lists)
            return verdict.consistency, verdict.pseudo, verdict.anchor

    points = drawn(4, 0, settings.geometry)
    sizes = {name: {0: torch.export.Dim("clips", min=1)} for name in NAMES}
    network = torch.export.export(Verdict(), (points,), dynamic_shapes=(sizes,)).module()
    for count in (1, 9):
        points = drawn(count, 5, settings.geometry)
        for got, expected in zip(network(points), Verdict()(points), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"theta": 1.0},
        {"theta": 0.0},
        {"range_momentum": 0.0},
        {"density": 0.0},
        {"pseudo_temperature": -1.0},
        {"temperature": -0.1},
        {"warmup_epochs": -1},
        {"length": 0},
        {"reading": "hard"},
        {"typicality": "often"},
        {"typicality_range": "epoch"},
        {"disagreement": "product"},
    ],
)
def test_settings_that_make_no_sense_are_named(wrong):
    with pytest.raises(UserError, match=f"assessment.{next(iter(wrong))}: expected"):
        settings_of(**wrong)


def test_points_of_other_modalities_are_refused():
    settings = settings_of()
    with pytest.raises(UserError, match="modalities: expected text, voice, face, got text"):
        settings.assess({"text": torch.zeros(2, D)}, settings.lists(NAMES, C))
