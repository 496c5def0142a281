"""Geometry equals formulas in float64, geoopt and brute force, at the centre and at the rim."""

import math

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.tical.hyperbolic import Geometry

KINDS = ("poincare", "lorentz", "euclidean")


def vectors(count=20, dim=8, length=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=dtype) * length / dim**0.5


def by_formula(geometry, x, y):
    """Distance of two points of Python floats, by arcosh and, in the ball, by Moebius addition."""
    c = geometry.curvature
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    if geometry.kind == "euclidean":
        return math.dist(x, y)
    if geometry.kind == "lorentz":
        return math.acosh(max(c * (2 * x[0] * y[0] - dot), 1)) / c**0.5
    xx, yy = sum(a * a for a in x), sum(b * b for b in y)
    above = [-(1 - 2 * c * dot + c * yy) * a + (1 - c * xx) * b for a, b in zip(x, y, strict=True)]
    below = 1 - 2 * c * dot + c * c * xx * yy
    return 2 / c**0.5 * math.atanh(c**0.5 * math.hypot(*above) / below)


@pytest.mark.parametrize("curvature", [1.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0.01, 1.0, 9.0])
def test_distances_are_those_of_the_formulas(kind, curvature, length):
    geometry = Geometry(kind, curvature)
    x, y = geometry.points(vectors(length=length)), geometry.points(vectors(length=length, seed=1))
    expected = torch.tensor([by_formula(geometry, *pair) for pair in zip(x.tolist(), y.tolist(), strict=True)])
    torch.testing.assert_close(geometry.distance(x, y), expected.double(), rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(geometry.distance(x.float(), y.float()), expected, rtol=2e-4, atol=1e-7)
    table = torch.tensor([[by_formula(geometry, one, other) for other in y.tolist()] for one in x.tolist()])
    torch.testing.assert_close(geometry.pairwise(x, y), table.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(geometry.pairwise(x.float(), y.float()), table, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("curvature", [1.0, 0.1])
@pytest.mark.parametrize("length", [0.01, 1.0, 9.0])
def test_the_ball_is_that_of_geoopt(curvature, length):
    geoopt = pytest.importorskip("geoopt")
    geometry, ball = (
        Geometry("poincare", curvature, clip=9.0),
        geoopt.PoincareBall(c=torch.tensor(curvature, dtype=torch.float64)),
    )
    u, weights = vectors(length=length), torch.rand(3, 20, dtype=torch.float64)
    x, y = geometry.points(u), geometry.points(vectors(length=length, seed=1))
    away = x.norm(dim=1) < 0.99 / curvature**0.5  # geoopt draws points back from the rim less far
    torch.testing.assert_close(x[away], ball.expmap0(u)[away])
    torch.testing.assert_close(geometry.log(x), ball.logmap0(x))
    torch.testing.assert_close(geometry.distance(x, y), ball.dist(x, y))
    midpoints = torch.stack([ball.weighted_midpoint(x, each, reducedim=[0]) for each in weights])
    torch.testing.assert_close(geometry.mean(x, weights), midpoints)


@pytest.mark.parametrize("curvature", [1.0, 0.5])
def test_the_hyperboloid_is_that_of_geoopt(curvature):
    geoopt = pytest.importorskip("geoopt")
    geometry, lorentz = Geometry("lorentz", curvature), geoopt.Lorentz(k=1 / curvature)
    u = vectors()
    x, y = geometry.points(u), geometry.points(vectors(seed=1))
    torch.testing.assert_close(x, lorentz.expmap0(torch.cat([torch.zeros(20, 1), u], 1)))
    torch.testing.assert_close(geometry.log(x), lorentz.logmap0(x)[:, 1:])
    torch.testing.assert_close(geometry.distance(x, y), lorentz.dist(x, y))


@pytest.mark.parametrize("kind", KINDS)
def test_log_undoes_points_and_lengths_stop_at_the_clip(kind):
    geometry = Geometry(kind, 0.7, clip=2.0)
    u = vectors(length=2.0)
    short = u.norm(dim=1) <= 2
    assert short.any()
    assert not short.all()
    back = geometry.log(geometry.points(u))
    torch.testing.assert_close(back[short], u[short])
    torch.testing.assert_close(back[~short].norm(dim=1), torch.full([int((~short).sum())], 2.0, dtype=torch.float64))
    assert geometry.points(u).shape[1] == geometry.width(8)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_symmetric_and_no_detour_is_shorter(kind):
    geometry = Geometry(kind)
    x = geometry.points(vectors(length=3.0))
    table = geometry.distance(x[:, None], x)
    torch.testing.assert_close(table, table.T)
    assert (table[:, :, None] + table > table[:, None, :] - 1e-9).all()
    assert (table.diagonal() == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_the_origin_at_the_rim_and_between_equal_points(kind, dtype):
    geometry = Geometry(kind, clip=20.0)
    u = torch.stack([torch.zeros(8), torch.full((8,), 1e-30), torch.full((8,), 1e-3), torch.full((8,), 50.0)]).to(dtype)
    u.requires_grad_()
    x = geometry.points(u)
    total = geometry.distance(x[:, None], x).sum() + geometry.pairwise(x, x).sum() + geometry.log(x).sum()
    total = total + geometry.mean(x, torch.ones(1, 4)).sum() + geometry.radius(x).sum()
    (gradient,) = torch.autograd.grad(total, u)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0.1, 1.0, 9.0])
def test_the_nearest_anchor_is_that_of_brute_force(kind, length):
    geometry = Geometry(kind)
    query, anchors = geometry.points(vectors(length=length)), geometry.points(vectors(50, length=length, seed=1))
    allowed = torch.rand(20, 50, generator=torch.Generator().manual_seed(2)) < 0.3
    allowed[4] = False
    distance, position = geometry.nearest(query, anchors, allowed)
    shared, _ = geometry.nearest(query, anchors, allowed[0])
    for row, point in enumerate(query.tolist()):
        known = {place: by_formula(geometry, point, anchor) for place, anchor in enumerate(anchors.tolist())}
        those = {place: each for place, each in known.items() if allowed[row, place]}
        expected = min(those, key=those.__getitem__) if those else -1
        assert position[row] == expected
        assert distance[row].item() == pytest.approx(those.get(expected, math.inf))
        assert shared[row].item() == pytest.approx(min(known[place] for place in known if allowed[0, place]))


def test_a_search_does_not_spread_vectors_over_all_pairs(monkeypatch):
    """The largest tensor of a search has a number a pair, not a vector a pair."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in (out if isinstance(out, tuple) else (out,)))
            return out

    geometry = Geometry()
    query, anchors = geometry.points(vectors(20, 16)), geometry.points(vectors(60, 16, seed=1))
    with Sizes():
        geometry.nearest(query, anchors, torch.ones(60, dtype=torch.bool))
    assert max(sizes) == 20 * 60


def test_hyperbolic_means_agree_between_the_models():
    """The ball is the hyperboloid seen from (-1/√c, 0, …); a point of the ball lies twice as far for the same u."""
    c, u, weights = 0.6, vectors(length=0.6), torch.rand(3, 20, dtype=torch.float64)
    ball, sheet = Geometry("poincare", c), Geometry("lorentz", c)
    x = sheet.points(2 * u)
    assert (2 * u).norm(dim=1).max() < 2.3
    seen = x[:, 1:] / (1 + c**0.5 * x[:, :1])
    torch.testing.assert_close(seen, ball.points(u))
    mean = sheet.mean(x, weights)
    torch.testing.assert_close(mean[:, 1:] / (1 + c**0.5 * mean[:, :1]), ball.mean(seen, weights))
    torch.testing.assert_close(sheet.radius(x), ball.radius(seen))
    torch.testing.assert_close(ball.radius(seen), (c**0.5 * u.norm(dim=1)).tanh())


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_of_nothing_is_the_origin_and_of_one_point_is_it(kind):
    geometry = Geometry(kind)
    x = geometry.points(vectors())
    weights = torch.zeros(2, 20)
    weights[1, 3] = 5
    mean = geometry.mean(x, weights)
    torch.testing.assert_close(mean[0], geometry.points(torch.zeros(8, dtype=torch.float64)))
    torch.testing.assert_close(mean[1], x[3])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_half_precision_change_nothing(kind):
    geometry = Geometry(kind)
    x, y = geometry.points(vectors(dtype=torch.float32)), geometry.points(vectors(30, seed=1, dtype=torch.float32))
    allowed = torch.ones(30, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = geometry.pairwise(x, y), *geometry.nearest(x, y, allowed), geometry.mean(y, torch.ones(2, 30))
    without = geometry.pairwise(x, y), *geometry.nearest(x, y, allowed), geometry.mean(y, torch.ones(2, 30))
    for one, other in zip(within, without, strict=True):
        assert torch.equal(one, other)
    assert geometry.points(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("wrong", [{"kind": "sphere"}, {"curvature": 0.0}, {"clip": -1.0}, {"clip": math.inf}])
def test_settings_that_make_no_sense_are_named(wrong):
    with pytest.raises(UserError, match=f"geometry.{next(iter(wrong))}: expected"):
        Geometry(**wrong)
