"""Group norm whose second derivative is written out: fewer passes over activations than what PyTorch composes of it.

Double backward passes of inner steps take most of an outer step's time, and the norms a quarter of theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def twice_differentiable(network: nn.Module) -> nn.Module:
    """Give a network's affine `nn.GroupNorm` layers that second derivative, in place; all else of them stays."""
    for module in network.modules():
        if type(module) is nn.GroupNorm and module.affine:
            module.__class__ = GroupNorm
    return network


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, affine, to be differentiated at most twice."""

    def forward(self, input: Tensor) -> Tensor:
        normed: Tensor = _Norm.apply(input, self.weight, self.bias, self.num_groups, self.eps)[0]
        return normed


class _Norm(torch.autograd.Function):
    """x (N, C, …), weight and bias (C,), groups, eps → normed (N, C, …), mean and 1 / deviation (N, groups)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        n, channels = x.shape[:2]
        return torch.native_group_norm(x, weight, bias, n, channels, x[0, 0].numel(), groups, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.groups, _ = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(x, weight, mean, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        back = _NormBackward.apply(gradient, x, weight, mean, scale, ctx.groups)
        return *back, None, None


class _NormBackward(torch.autograd.Function):
    """Gradient of the normed values (N, C, …), with all that `_Norm` keeps → gradients of x, weight and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, groups: int
    ) -> tuple[Tensor, ...]:
        n, channels = x.shape[:2]
        rest = n, channels, x[0, 0].numel(), groups, [True, True, True]
        arguments = (value.contiguous() for value in (gradient, x, mean, scale, weight))
        return torch.ops.aten.native_group_norm_backward(*arguments, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        gradient, x, weight, mean, scale, ctx.groups = inputs
        ctx.save_for_backward(gradient, x, weight, mean, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, u_weight: Tensor, u_bias: Tensor) -> Any:
        """Cotangents of (gradient, x, weight) from those of the gradients of x, weight and bias.

        With h = s (x - mean) the normed x before weight and bias, y the gradient and means over a group, the gradient
        of x is g = s P(weight y), where P(v) = v - mean(v) - h mean(v h) is symmetric, dh = s P(dx), and
        ds = -s^2 mean(h dx). So, but for u_weight and u_bias, the cotangent of weight y is q = s P(u) and that of x is
        -s (mean(u g) h + mean(weight y h) q + mean(u h) g). All of that are sums of u, y, x and 1, with a factor a
        channel, and the factors follow from three products and three sums over pixels.
        """
        y, x, weight, mean, s = ctx.saved_tensors
        shape, (n, channels), groups = x.shape, x.shape[:2], ctx.groups
        per_group = n, groups, channels // groups
        y, u, x = (value.reshape(*per_group, -1) for value in (y, u, x))  # (N, G, K, pixels)
        w, u_w, u_b = (value.view(per_group[1:]) for value in (weight, u_weight, u_bias))  # (G, K)
        mean, s = mean.unsqueeze(2), s.unsqueeze(2)  # (N, G, 1)

        def average(sums: Tensor) -> Tensor:  # over pixels (N, G, K) → mean of the group (N, G, 1)
            return sums.sum(2, keepdim=True) / (x.shape[2] * x.shape[3])

        (uh, sum_u), (yh, sum_y) = _sums(u, x, mean, s), _sums(y, x, mean, s)
        uy, _ = _sums(u, y, torch.zeros_like(s), torch.ones_like(s))
        mean_u, mean_y, b, m = average(sum_u), average(w * sum_y), average(uh), average(w * yh)
        ug = s * (average(w * uy) - mean_y * mean_u - b * m)
        e = u_w - s * b * w
        for_y = _combined([(u, w * s), (x, e * s)], u_b - w * s * mean_u - e * s * mean)
        of_h = s * (2 * s * m * b - ug - average(u_w * yh))
        rest = s * (s * (m * mean_u + b * mean_y) - average(u_w * sum_y)) - of_h * s * mean
        for_x = _combined([(u, -s * s * m), (x, of_h * s), (y, s * e)], rest)
        for_weight = (s * (uy - mean_u * sum_y - b * yh)).sum(0)
        return for_y.view(shape), for_x.view(shape), for_weight.flatten(), None, None, None


def _sums(v: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pixels (N, G, K) of v (N, G, K, pixels) times scale (x - mean), and of v; mean, scale: (N, G, 1).

    A kernel that reads both once gives them as gradients of the weights of a norm with a group a channel.
    """
    each, pixels = v[..., 0].numel(), v.shape[3]
    values = (value.reshape(1, each, pixels) for value in (v, x))
    statistics = (value.expand(v.shape[:3]).reshape(1, each) for value in (mean, scale))
    _, products, sums = torch.ops.aten.native_group_norm_backward(
        *values, *statistics, v.new_ones(each), 1, each, pixels, each, [False, True, True]
    )
    return products.view(v.shape[:3]), sums.view(v.shape[:3])


def _combined(terms: list[tuple[Tensor, Tensor]], constant: Tensor) -> Tensor:
    """Sum of values (N, G, K, pixels) times factors (N, G, K or 1), and of a constant (N, G, K or 1)."""
    total = constant.unsqueeze(3)
    for value, factor in terms:
        total = torch.addcmul(total, value, factor.unsqueeze(3))
    return total
