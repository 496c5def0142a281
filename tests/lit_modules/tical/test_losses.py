"""Losses equal loops over clips, numpy's correlation, and plain cross entropy where everything is off."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from leanlight.contracts import UserError
from lit_modules.tical.assessment import Assessment, ConsistencyAssessment
from lit_modules.tical.encoders import Answer
from lit_modules.tical.hyperbolic import Geometry
from lit_modules.tical.losses import SoftLoss, hyp_cpcc, staged_loss
from lit_modules.tical.stages import StagedAnswer
from lit_modules.tical.tree import LabelTree

NAMES, N, C, D = ("text", "voice"), 12, 3, 4
KINDS = ("poincare", "lorentz", "euclidean")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def an_answer(outputs=C, stages=3):
    rows = [drawn(N, outputs, seed=k) for k in range(5)]
    advanced = dict(zip(NAMES, rows[3:], strict=True)) if stages > 2 else {}
    middle = rows[2] if stages > 1 else None
    unimodal = dict(zip(NAMES, rows[1:3], strict=True))
    return StagedAnswer(output=rows[0], early=rows[0], middle=middle, advanced=advanced, unimodal=unimodal)


def a_verdict():
    drawn_of = {name: drawn(N, seed=20 + k).sigmoid() for k, name in enumerate(NAMES)}
    nothing = dict.fromkeys(NAMES, torch.zeros(N))
    q = {name: drawn(N, C, seed=30 + k).softmax(1) for k, name in enumerate(NAMES)}
    pseudo = {name: each.argmax(1) for name, each in q.items()}
    return Assessment(pseudo, drawn_of, drawn(N, seed=9).sigmoid(), nothing, pseudo, q)


def labels(seed=0):
    return torch.randint(C, (N,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("assessed", [True, False])
@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("stages", [2, 3])
def test_the_stages_loss_is_that_of_a_loop_over_clips(assessed, scores, stages):
    answer, verdict = an_answer(1 if scores else C, stages), a_verdict() if assessed else None
    target, weights = (drawn(N, seed=7), None) if scores else (labels(), torch.tensor([0.5, 1.0, 3.0]))
    present = {"text": torch.ones(N).bool(), "voice": torch.arange(N) % 3 > 0}

    def of(output, row):
        if scores:
            return abs(output[row, 0].item() - target[row].item())
        return -output[row].log_softmax(0)[target[row]].item()

    total = below = 0.0
    for row in range(N):
        w = 1.0 if scores else weights[target[row]].item()
        kappa = 0.5 if verdict is None else verdict.consistency[row].item()
        loss = kappa * of(answer.early, row) + of(answer.middle, row)
        for name, output in answer.advanced.items():
            phi = 1.0 if verdict is None else math.exp(-verdict.typicality[name][row].item())
            loss += (1 - kappa) * phi * of(output, row) * present[name][row].item()
        total, below = total + w * loss, below + w
    got = staged_loss(answer, target, verdict, weights, present)
    assert got.item() == pytest.approx(total / below, rel=1e-5)
    everything = {name: torch.ones(N).bool() for name in NAMES}
    assert staged_loss(answer, target, verdict, weights) == staged_loss(answer, target, verdict, weights, everything)


def test_a_network_without_stages_has_its_one_loss():
    plain, weights = Answer(output=drawn(N, C)), torch.tensor([0.5, 1.0, 3.0])
    expected = F.cross_entropy(plain.output, labels(), weights)
    torch.testing.assert_close(staged_loss(plain, labels(), a_verdict(), weights), expected)
    torch.testing.assert_close(staged_loss(an_answer(stages=1), labels(), a_verdict(), weights), expected)
    scores = Answer(output=drawn(N, 1))
    torch.testing.assert_close(staged_loss(scores, drawn(N, seed=1)), F.l1_loss(scores.output[:, 0], drawn(N, seed=1)))


def cpcc_by_numpy(points, label, tree, geometry):
    """1 - ρ by sets of points and numpy."""
    means, nodes = [], []
    for node, classes in enumerate(tree.members.tolist()):
        rows = [row for row in range(len(label)) if label[row] >= 0 and classes[label[row]]]
        if rows:
            nodes.append(node)
            means.append(geometry.mean(points[rows], torch.ones(1, len(rows)))[0])
    pairs = [(a, b) for a in range(len(nodes)) for b in range(a)]
    far = [geometry.distance(means[a], means[b]).item() for a, b in pairs]
    along = [tree.distances[nodes[a], nodes[b]].item() for a, b in pairs]
    return 1 - np.corrcoef(far, along)[0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree", [LabelTree.flat(7), LabelTree.ordinal(7)], ids=["flat", "ordinal"])
def test_the_correlation_is_that_of_numpy(kind, tree):
    geometry = Geometry(kind)
    for seed in range(4):
        points = geometry.points(drawn(20, D, seed=seed).double())
        # Not all classes occur, and some clips have no pseudo label.
        label = torch.randint(-1, 5, (20,), generator=torch.Generator().manual_seed(seed))
        expected = cpcc_by_numpy(points, label, tree, geometry)
        assert hyp_cpcc(points, label, tree, geometry).item() == pytest.approx(expected, rel=1e-6)
        assert hyp_cpcc(points.float(), label, tree, geometry).item() == pytest.approx(expected, rel=1e-3)


def test_the_loss_falls_as_points_are_learned():
    geometry, tree = Geometry(), LabelTree.ordinal(3)
    u = (0.1 * drawn(N, D)).requires_grad_()
    optimizer, losses = torch.optim.Adam([u], 0.05), []
    for _ in range(60):
        loss = hyp_cpcc(geometry.points(u), labels(), tree, geometry)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.1
    assert losses[-1] < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "label", [[-1] * 6, [2] * 6, [0, 0, 0, 1, 1, 1]], ids=["nothing is known", "one class", "points are equal"]
)
def test_a_correlation_that_is_not_defined_is_1_without_gradient(kind, label):
    geometry, u = Geometry(kind), torch.full((6, D), 0.3, requires_grad=True)
    loss = hyp_cpcc(geometry.points(u), torch.tensor(label), LabelTree.flat(3), geometry)
    assert loss.item() == 1
    loss.backward()
    assert torch.equal(u.grad, torch.zeros_like(u))


def soft_setting(empty=()):
    """Lists with anchors of all classes but some, points with gradient and their verdict."""
    settings = ConsistencyAssessment(reading="soft", dim=D, length=16, neighbours=2)
    lists, generator = settings.lists(NAMES, C), torch.Generator().manual_seed(3)
    label = torch.tensor([k for k in torch.arange(N).remainder(C).tolist() if k not in empty])
    count = len(label)
    anchors = {name: settings.geometry.points(drawn(count, D, seed=40 + k)) for k, name in enumerate(NAMES)}
    lists.add(anchors, label, torch.arange(count), torch.ones(count).bool(), torch.rand(count, generator=generator))
    u = {name: drawn(N, D, seed=50 + k).requires_grad_() for k, name in enumerate(NAMES)}
    points = {name: settings.geometry.points(each) for name, each in u.items()}
    return settings, lists, u, points, settings.assess(points, lists)


@pytest.mark.parametrize("empty", [(), (1,)])
def test_soft_losses_are_those_of_loops(empty):
    settings, lists, u, points, verdict = soft_setting(empty)
    answer, label, soft = an_answer(), labels(), SoftLoss(gamma=0.7, unimodal=0.3, hyperbolic=0.2)
    terms = soft.terms(answer, label, label, verdict, points, lists, settings.geometry)
    task = unimodal = hyperbolic = 0.0
    for row in range(N):
        w = 1 + 0.7 * (1 - verdict.consistency[row].item())
        task += w * F.cross_entropy(answer.output[row], label[row]).item() / N
        for m, name in enumerate(NAMES):
            trust, q = verdict.typicality[name][row].item(), verdict.probabilities[name][row].tolist()
            target = [(1 - trust) * (k == label[row]) + trust * q[k] for k in range(C)]
            log = answer.unimodal[name][row].log_softmax(0).tolist()
            unimodal -= 0.3 * sum(t * each for t, each in zip(target, log, strict=True)) / N
            apart = {k: lists.points[m][(lists.label[m] == k) & lists.usable()[m]] for k in range(C)}
            far = {
                k: settings.geometry.distance(points[name][row], rows).mean().item()
                for k, rows in apart.items()
                if len(rows)
            }
            below = math.log(sum(math.exp(-each / 0.5) for each in far.values()))
            hyperbolic += 0.2 * sum(target[k] * (each / 0.5 + below) for k, each in far.items()) / N
    expected = {"task": task, "unimodal": unimodal, "hyperbolic": hyperbolic}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(float(value), rel=1e-4), name
    terms["hyperbolic"].backward()
    for each in u.values():
        assert torch.isfinite(each.grad).all()
        assert each.grad.abs().sum() > 0


def test_with_all_factors_off_and_in_the_warm_up_there_is_the_plain_loss_alone():
    settings, lists, _, points, verdict = soft_setting()
    answer, label, off = an_answer(), labels(), SoftLoss(gamma=0, unimodal=0, hyperbolic=0)
    plain = staged_loss(Answer(output=answer.output), label)
    terms = off.terms(answer, label, label, verdict, points, lists, settings.geometry)
    assert terms.keys() == {"task"}
    assert torch.equal(terms["task"], plain)
    warm = SoftLoss(unimodal=1.0).terms(answer, label, label)
    assert torch.equal(warm["task"], plain)
    expected = sum(F.cross_entropy(each, label) for each in answer.unimodal.values())
    torch.testing.assert_close(warm["unimodal"], expected)
    assert "hyperbolic" not in warm


def test_scores_of_modalities_are_drawn_toward_what_they_say():
    _, _, _, _, verdict = soft_setting()
    answer, target, levels = an_answer(1), drawn(N, seed=6), torch.tensor([-1.0, 0.0, 1.0])
    present = {"text": torch.arange(N) < 5, "voice": torch.ones(N).bool()}
    soft = SoftLoss(unimodal=1.0, hyperbolic=0)
    got = soft.terms(answer, target, labels(), verdict, present=present, levels=levels)["unimodal"]
    expected = 0.0
    for name in NAMES:
        rows = present[name].nonzero()[:, 0].tolist()
        for row in rows:
            trust, q = verdict.typicality[name][row].item(), verdict.probabilities[name][row].tolist()
            wanted = (1 - trust) * target[row].item() + trust * (q[2] - q[0])
            expected += abs(answer.unimodal[name][row, 0].item() - wanted) / len(rows)
    assert got.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="levels: expected the scores of the classes"):
        soft.terms(answer, target, labels(), verdict)


@pytest.mark.parametrize("wrong", [{"gamma": -1.5}, {"unimodal": -0.1}, {"hyperbolic": -1.0}, {"temperature": 0.0}])
def test_factors_that_make_no_sense_are_named(wrong):
    with pytest.raises(UserError, match=f"soft.{next(iter(wrong))}: expected"):
        SoftLoss(**wrong)
