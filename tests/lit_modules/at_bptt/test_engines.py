"""Meta-gradients against finite differences, against each other, and against dense linear algebra."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leanlight.contracts import UserError
from leanlight.ops.differentiable import find_augmentation
from lit_modules.at_bptt import Adjoint, InnerOptimizer, LowRankHessian, Unrolled
from lit_modules.at_bptt.inner import BatchSampler, FlatNetwork, InnerProblem, RealLoss, SyntheticData
from lit_modules.at_bptt.lowrank import eigenpairs

SHAPE = (1, 6, 6)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


class Case:
    """A small bilevel problem in float64: 3 classes, 2 images each, a window of `length` steps after `warm_up` ones."""

    def __init__(
        self, network=convnet, kind="adam", augment=None, hard=False, warm_up=2, length=5, lr=0.05, images=2, **settings
    ):
        torch.manual_seed(0)
        optimizer = InnerOptimizer(kind, lr, **settings)
        self.problem = InnerProblem(FlatNetwork(network().double()), optimizer, find_augmentation(augment, "augment"))
        labels = torch.eye(3).repeat_interleave(2, 0).double()
        self.data = SyntheticData(torch.randn(6, *SHAPE).double(), labels if hard else labels + 0.1 * torch.rand(6, 3))
        self.real, self.target = torch.randn(20, *SHAPE).double(), torch.randint(3, (20,))
        self.outer = lambda theta: [F.cross_entropy(self.problem.network(theta, self.real), self.target)]
        batches = BatchSampler(3, 2, 2, images).draw(
            warm_up + length, torch.Generator().manual_seed(1), torch.device("cpu")
        )
        start = optimizer.start(self.problem.network.parameters())
        self.state = self.problem.trained(start, self.data, batches[:warm_up])
        self.batches = batches[warm_up:]

    def gradient(self, engine, weights=None):
        return engine.meta_gradient(
            self.problem, self.state, self.data, self.batches, self.outer, True, weights=weights
        )

    def loss(self, images, labels):
        """The outer loss after plain training: what the meta-gradient is the derivative of."""
        state = self.problem.trained(self.state, SyntheticData(images, labels), self.batches)
        with torch.no_grad():
            return float(self.outer(state.theta)[0])


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("network", [mlp, convnet])
def test_the_meta_gradient_is_the_derivative_of_the_outer_loss(kind, network):
    # Smooth activations: a finite difference across a kink of ReLU is no derivative.
    smooth = functools.partial(_smooth, network)
    case = Case(smooth, kind, length=4)
    result = case.gradient(Adjoint())
    generator = torch.Generator().manual_seed(0)
    for part, gradient in (("images", result.images), ("labels", result.labels)):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        moved = []
        for step in (1e-5, -1e-5):
            values = {"images": case.data.images, "labels": case.data.labels}
            values[part] = values[part] + step * direction
            moved.append(case.loss(**values))
        assert (gradient * direction).sum().item() == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-5)


def _smooth(network):
    made = network()
    for i, layer in enumerate(made):
        if isinstance(layer, nn.ReLU):
            made[i] = nn.Softplus()
    return made


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize(
    ("network", "augment", "images", "warm_up"), [(mlp, None, 2, 0), (convnet, "flip_rotate", 1, 3)]
)
def test_the_adjoint_equals_autograd_through_the_unrolled_graph(kind, hard, network, augment, images, warm_up):
    case = Case(network, kind, augment, hard, warm_up, images=images)
    unrolled, adjoint = case.gradient(Unrolled()), case.gradient(Adjoint())
    assert error(adjoint.images, unrolled.images) < 1e-10
    assert error(adjoint.labels, unrolled.labels) < 1e-10
    assert torch.allclose(adjoint.loss, unrolled.loss)
    assert torch.allclose(adjoint.norms, unrolled.norms)


def test_weights_of_steps_act_alike_in_both_engines():
    case, weights = Case(), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).double()
    unrolled, adjoint = case.gradient(Unrolled(), weights), case.gradient(Adjoint(), weights)
    assert error(adjoint.images, unrolled.images) < 1e-10
    assert error(adjoint.images, case.gradient(Adjoint()).images) > 0.1


def test_an_inner_step_equals_that_of_torch_optim():
    for kind, make in (("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)):
        optimizer = InnerOptimizer(kind, 0.03)
        parameter = nn.Parameter(torch.randn(50).double())
        state, reference = optimizer.start(parameter.detach().clone()), make([parameter], 0.03)
        for _ in range(7):
            parameter.grad = torch.randn(50).double()
            state = optimizer.step(state, parameter.grad)
            reference.step()
        assert torch.allclose(state.theta, parameter.detach(), rtol=1e-12)


def test_eps_before_the_bias_correction_is_added_to_the_plain_moment_s_root():
    optimizer, (b1, b2), lr, eps = InnerOptimizer(lr=0.03, eps=0.01, eps_placement="before"), (0.9, 0.999), 0.03, 0.01
    gradients, m, v = torch.randn(7, 50).double(), torch.zeros(50).double(), torch.zeros(50).double()
    state, theta = optimizer.start(torch.zeros(50).double()), torch.zeros(50).double()
    for count, gradient in enumerate(gradients, 1):
        state = optimizer.step(state, gradient)
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        theta = theta - lr * (1 - b2**count) ** 0.5 / (1 - b1**count) * m / (v.sqrt() + eps)
        torch.testing.assert_close(state.theta, theta, rtol=1e-12, atol=0)
    with pytest.raises(UserError, match="eps_placement: expected after or before"):
        InnerOptimizer(eps_placement="torch")


@pytest.mark.parametrize("warm_up", [0, 3])
def test_with_either_placement_of_eps_the_engines_agree_with_autograd_through_plain_adam(warm_up):
    """An eps as large as here tells the placements apart; at 1e-8 only the first steps of training do."""
    results = {}
    for placement in ("after", "before"):
        case = Case(_smooth_convnet, warm_up=warm_up, eps=1e-3, eps_placement=placement)
        expected = _plain_adam(case, placement, warm_up)
        for engine in (Unrolled(), Adjoint()):
            result = case.gradient(engine)
            assert error(result.images, expected[0]) < 1e-9
            assert error(result.labels, expected[1]) < 1e-9
        results[placement] = expected[0]
    assert error(results["after"], results["before"]) > 0.01


def _smooth_convnet():
    return _smooth(convnet)


def _plain_adam(case, placement, steps_done):
    """Autograd through the window, Adam as in a textbook."""
    images, labels = (x.detach().requires_grad_() for x in (case.data.images, case.data.labels))
    theta, m, v, lr, eps = case.state.theta, case.state.m, case.state.v, 0.05, 1e-3
    theta = theta.detach().requires_grad_()
    for count, batch in enumerate(case.batches, steps_done + 1):
        logits = case.problem.network(theta, images[batch.index])
        (g,) = torch.autograd.grad(F.cross_entropy(logits, labels[batch.index]), theta, create_graph=True)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        c1, c2, tiny = 1 - 0.9**count, 1 - 0.999**count, 1e-60  # keeps the root's derivative finite at 0
        if placement == "after":
            theta = theta - lr * (m / c1) / ((v / c2 + tiny).sqrt() + eps)
        else:
            theta = theta - lr * (m / c1) * c2**0.5 / ((v + tiny).sqrt() + eps)
    return torch.autograd.grad(case.outer(theta)[0], [images, labels])


@pytest.mark.parametrize("engine", [Unrolled(), Adjoint()])
def test_an_outer_loss_in_chunks_has_the_gradient_of_the_whole(engine):
    case = Case()
    whole, in_chunks = case.gradient(engine), RealLoss(case.problem.network, case.real, case.target, 7)
    case.outer, plain = in_chunks, case.outer
    result = case.gradient(engine)
    assert error(result.images, whole.images) < 1e-12
    assert error(result.labels, whole.labels) < 1e-12
    assert torch.allclose(result.loss, whole.loss)
    logits = case.problem.network(case.state.theta, case.real)
    parts = list(in_chunks(case.state.theta))
    assert [float(part) for part in parts] != [float(parts[0])] * 3
    assert float(in_chunks.loss) == pytest.approx(float(plain(case.state.theta)[0]))
    assert float(in_chunks.accuracy) == pytest.approx(float((logits.argmax(1) == case.target).float().mean()))


def test_an_outer_loss_in_chunks_keeps_the_activations_of_one_chunk():
    def peak(chunk):
        case, live, seen = Case(length=1), {}, [0]
        case.outer = RealLoss(case.problem.network, case.real.repeat(10, 1, 1, 1), case.target.repeat(10), chunk)

        def pack(tensor):
            handle = _Handle(tensor, live)
            seen[0] = max(seen[0], sum(live.values()))
            return handle

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
            case.gradient(Adjoint())
        return seen[0]

    assert peak(20) < 0.2 * peak(None)


@pytest.mark.parametrize("engine", [Unrolled(), Adjoint()])
def test_parameters_without_a_gradient_do_not_make_nan(engine):
    case = Case(functools.partial(_with_dead_units, convnet))
    result = case.gradient(engine)
    assert result.images.isfinite().all()
    assert result.images.abs().sum() > 0


def _with_dead_units(network):
    made = network()
    with torch.no_grad():
        made[1].bias[:2] = -100.0  # behind the norm, in front of ReLU: these channels never fire
    return made


def test_the_hessian_is_zero_exactly_where_no_step_has_had_a_gradient():
    case = Case(functools.partial(_with_dead_units, mlp))
    theta, gradient = case.problem.gradient(case.state.theta, case.data, case.batches[0], create_graph=True)
    dense = torch.stack(
        [torch.autograd.grad(gradient, theta, row, retain_graph=True)[0] for row in torch.eye(len(theta)).double()]
    )
    reached = case.problem.optimizer.reached(case.state).bool()
    assert (~reached).sum() == 2 * (36 + 1 + 3)  # weights into, biases of, and weights out of two silent units
    assert torch.equal(dense.abs().sum(1) > 0, reached)


def test_a_factor_of_another_network_does_not_explode_where_units_are_silent():
    kept = LowRankHessian(4, every=1000, drift=1e9)
    Case(mlp).gradient(Adjoint("lowrank", kept))
    case = Case(functools.partial(_with_dead_units, mlp))
    exact = case.gradient(Adjoint()).images
    assert error(case.gradient(Adjoint("lowrank", kept)).images, exact) < 3


def test_a_low_rank_hessian_of_full_rank_is_exact():
    case = Case(mlp)
    size = case.state.theta.numel()
    full = LowRankHessian(size, min_rank=size, refresh="step")
    assert error(case.gradient(Adjoint("lowrank", full)).images, case.gradient(Unrolled()).images) < 1e-8


def test_a_higher_rank_is_nearer_to_the_exact_gradient_and_any_rank_nearer_than_none():
    case = Case(length=6)
    exact = case.gradient(Unrolled()).images
    size = case.state.theta.numel()
    errors = {rank: _error_at_rank(case, exact, rank) for rank in (1, size // 2)}
    without = error(case.gradient(Adjoint("zero")).images, exact)
    assert errors[size // 2] < errors[1] < without


def _error_at_rank(case, exact, rank):
    low_rank = LowRankHessian(rank, min_rank=rank, refresh="step")
    return error(case.gradient(Adjoint("lowrank", low_rank)).images, exact)


def test_randomised_eigenpairs_equal_the_leading_ones_of_a_dense_decomposition():
    case = Case()
    theta, gradient = case.problem.gradient(case.state.theta, case.data, case.batches[0], create_graph=True)
    dense = torch.stack(
        [torch.autograd.grad(gradient, theta, row, retain_graph=True)[0] for row in torch.eye(len(theta)).double()]
    )
    expected = torch.linalg.eigvalsh(dense)
    expected = expected[expected.abs().argsort(descending=True)][:3]
    _, values = eigenpairs(lambda x: dense @ x, len(theta), 6, 4, 2, theta.detach())
    assert values[0].item() == pytest.approx(expected[0].item(), rel=0.01)
    # The spectrum behind the first value is flat: more power iterations separate it.
    vectors, values = eigenpairs(lambda x: dense @ x, len(theta), 6, 4, 12, theta.detach())
    assert torch.allclose(values[:3], expected, rtol=0.01)
    assert torch.allclose(dense @ vectors[:, :3], vectors[:, :3] * values[:3], atol=0.02 * float(expected[0].abs()))


def test_a_cached_factor_is_refreshed_by_age_and_by_drift():
    low_rank = LowRankHessian(refresh="cached", every=3, drift=0.5)
    steady, jumping = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 9.0])
    matrix = torch.eye(4).double()
    low_rank.factorize = lambda *_: (setattr(low_rank, "_vectors", matrix), setattr(low_rank, "_age", 0))
    due = []
    for norms in (steady, steady, steady, steady, jumping, steady):
        due.append(low_rank.due(norms))
        if due[-1]:
            low_rank.factorize()
    assert due == [True, False, False, True, True, False]


def test_ranks_follow_the_gradient_norm_over_its_running_maximum():
    ranks = LowRankHessian(rank=8, min_rank=2).ranks(torch.tensor([1.0, 2.0, 1.0, 0.1, 4.0]))
    assert ranks == [8, 8, 4, 2, 8]


def test_the_unrolled_graph_grows_with_the_window_and_the_adjoint_hardly_does():
    def saved(engine, length):
        case, live, peak = Case(length=length), {}, [0]

        def pack(tensor):
            handle = _Handle(tensor, live)
            peak[0] = max(peak[0], sum(live.values()))
            return handle

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
            case.gradient(engine)
        return peak[0]

    unrolled = [saved(Unrolled(), length) for length in (5, 20)]
    adjoint = [saved(Adjoint(), length) for length in (5, 20)]
    assert unrolled[1] > 3 * unrolled[0]
    assert adjoint[1] < 1.2 * adjoint[0]


class _Handle:
    """A saved tensor that counts its elements as long as the graph holds it."""

    def __init__(self, tensor, live):
        self.tensor, self.live = tensor, live
        live[id(self)] = tensor.numel()

    def __del__(self):
        self.live.pop(id(self), None)


def test_batch_norm_is_refused():
    with pytest.raises(UserError, match="without batch norm"):
        FlatNetwork(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))


def test_mini_batches_hold_so_many_distinct_images_of_so_many_classes():
    batches = BatchSampler(5, 4, 3, 2).draw(50, torch.Generator().manual_seed(0), torch.device("cpu"))
    for batch in batches:
        classes = (batch.index // 4).bincount(minlength=5)
        assert sorted(classes.tolist()) == [0, 0, 2, 2, 2]
        assert len(batch.index.unique()) == 6
    assert torch.cat([batch.index for batch in batches]).unique().numel() == 20
