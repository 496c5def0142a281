"""Recorded inner steps give the ordinary engine's meta-gradients: with a stand-in for CUDA graphs, and on a GPU."""

import pytest
import torch
from torch import nn

from leanlight.contracts import UserError, isolated_rng
from lit_modules.at_bptt import Adjoint, InnerOptimizer, LowRankHessian, RandomWindow, TruncatedBPTT
from lit_modules.at_bptt.distillers import Task
from lit_modules.at_bptt.graphs import RecordedSteps
from lit_modules.at_bptt.inner import SyntheticData

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


class Recorder:
    """Acts as a CUDA graph does: results are void until a replay, which reads and writes the recorded tensors only."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        results = tuple(torch.full_like(result, torch.nan) for result in work())
        self.recorded += 1

        def replay():
            self.replayed += 1
            for result, value in zip(results, work(), strict=True):
                result.copy_(value)

        return replay, results


class Scaled(nn.Module):
    """A network with a buffer that differs from one fresh network to the next."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(144, 3)
        self.register_buffer("scale", torch.rand(()) + 0.5)

    def forward(self, image):
        return self.head(self.layers(image * self.scale)) * self.scale


def outer_steps(engine, number=3, learn_labels=True, device="cpu", **settings):
    """Images, labels and losses of outer steps of RaT-BPTT in float64, and the norms of a probe."""
    settings = {"inner_steps": 6, "augment": "dsa", "classes_per_batch": 2, **settings}
    distiller = TruncatedBPTT(selector=RandomWindow(3), engine=engine, **settings)
    task = Task(lambda: Scaled().double(), 3, 2, 4, learn_labels, torch.device(device))
    distiller.prepare(task)
    with isolated_rng(0):
        images, real = torch.randn(6, 1, 6, 6).double().to(device), torch.randn(20, 1, 6, 6).double().to(device)
    data = SyntheticData(images, torch.eye(3).repeat_interleave(2, 0).double().to(device))
    label, results = torch.arange(20, device=device) % 3, []
    for seed in range(number):
        distiller.start_epoch(data, seed)
        step = distiller.outer_step(data, real, label, seed)
        results += [step.images, step.loss] + ([step.labels] if learn_labels else [])
    generator = torch.Generator().manual_seed(0)
    return [*results, distiller._probe(data, 5, generator)]


def recording(recorder, **settings):
    """An adjoint engine whose steps are recorded by a stand-in for CUDA graphs."""
    engine = Adjoint(**settings)
    engine._recorded = RecordedSteps(recorder)
    return engine


CASES = [
    ({}, {}),
    ({}, {"learn_labels": False, "augment": None, "classes_per_batch": None}),
    ({"hessian": "zero", "offload": True}, {"inner_optimizer": InnerOptimizer(eps=1e-3, eps_placement="before")}),
    (
        {"hessian": "lowrank", "low_rank": LowRankHessian(3, refresh="window")},
        {"inner_optimizer": InnerOptimizer("sgd", 0.05)},
    ),
]


@pytest.mark.parametrize(("settings", "outer"), CASES)
def test_recorded_steps_give_the_ordinary_meta_gradients_over_several_networks(settings, outer):
    recorder = Recorder()
    got, expected = outer_steps(recording(recorder, **settings), **outer), outer_steps(Adjoint(**settings), **outer)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert recorder.recorded == 2  # one step, one adjoint of it, for three outer steps and the probe
    assert recorder.replayed > 6 + 3 * (3 + 3)


def test_mini_batches_of_another_size_are_recorded_anew():
    recorder = Recorder()
    engine = recording(recorder)
    outer_steps(engine, number=1)
    outer_steps(engine, number=1, classes_per_batch=3)
    assert recorder.recorded == 4


def test_another_inner_optimizer_is_recorded_anew():
    engine, optimizer = recording(Recorder()), InnerOptimizer(lr=0.05)
    outer_steps(engine, number=1)
    got = outer_steps(engine, number=1, inner_optimizer=optimizer)
    expected = outer_steps(Adjoint(), number=1, inner_optimizer=optimizer)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=1e-12)


def test_graphs_are_refused_where_they_cannot_be_recorded():
    with pytest.raises(UserError, match="graph: expected a CUDA device to record on, got cpu"):
        outer_steps(Adjoint(graph=True))
    with pytest.raises(UserError, match="graph: a factorisation at each step"):
        Adjoint("lowrank", LowRankHessian(refresh="step"), graph=True)


@cuda
@pytest.mark.parametrize(("settings", "outer"), CASES)
def test_cuda_graphs_give_the_ordinary_meta_gradients(settings, outer):
    got, expected = (outer_steps(Adjoint(**settings, graph=graph), **outer, device="cuda") for graph in (True, False))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # float64; atomic sums in another order
