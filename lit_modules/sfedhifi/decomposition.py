"""Convolutions whose weight is a basis shared by all widths times a scale factor of one width (FLANC, Mei et al.,
NeurIPS 2022; `docs/methods/sfedhifi.md`).

With g = C / a1 groups of input channels, basis B (a2, a1, k, k) and factor M (D, g·a2, 1, 1), the weight is
``W[d, i·a1 + c] = Σ_j M[d, i·a2 + j] · B[j, c]``: every group of channels meets the same a2 filters.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveInt

# What the memory traffic of one intermediate number costs, in multiplications: fitted to measured forward and backward
# passes on a CPU core (docs/methods/sfedhifi.md). Only speed depends on it. A GPU needs no other: an H100 makes about
# 160 float32 multiplications while it writes and reads a number forward and backward (16 bytes of 3.35 TB/s against
# 33 T/s; derived from its data sheet, not measured).
_RESPONSE_COST = 200


class DecomConv(nn.Module):
    """Factorised convolution (N, in_channels, H, W) → (N, out_channels, H / stride, W / stride), without bias.

    `basis` is B, (filters, group_channels, kernel_size, kernel_size), rows orthonormal at the start; `factor` is M,
    (out_channels, groups · filters, 1, 1), Kaiming-normal by fan-out.

    Training composes the weight first where that is cheaper. Evaluation runs basis and factor one after the other, the
    form whose operations are to be counted; `fold_network` is faster there.

    Args:
        in_channels: C at this width, a multiple of `group_channels`.
        out_channels: D at this width.
        group_channels: a1, the channels that the basis reads.
        filters: a2, the filters of the basis.
        kernel_size: k, odd; padding is k // 2.
        stride: of the basis.
        inner: a non-linearity between basis and factor; it forbids `fold`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        group_channels: int,
        filters: int,
        kernel_size: PositiveInt = 3,
        stride: PositiveInt = 1,
        inner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if in_channels % group_channels:
            raise UserError(
                f"width: {in_channels} input channels are no multiple of the {group_channels} that the basis reads; "
                "choose another width or basis_fraction"
            )
        self.stride = stride
        self.inner = inner
        self.basis = nn.Parameter(torch.empty(filters, group_channels, kernel_size, kernel_size))
        self.factor = nn.Parameter(torch.empty(out_channels, in_channels // group_channels * filters, 1, 1))
        make_orthonormal([self])
        nn.init.kaiming_normal_(self.factor, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.inner is None and self._composing_pays(x):
            weight = composed_weight(self.basis, self.factor)
            return F.conv2d(x, weight, stride=self.stride, padding=weight.shape[-1] // 2)
        responses = group_responses(x, self.basis, self.stride)
        if self.inner is not None:
            responses = self.inner(responses)
        return F.conv2d(responses, self.factor)

    def _composing_pays(self, x: Tensor) -> bool:
        """Whether the composed form costs less, in multiplications for each output pixel."""
        filters, kernel = len(self.basis), self.basis[0].numel()
        out_channels, responses = self.factor.shape[:2]
        pixels = x[:, 0].numel() / self.stride**2
        two_stages = responses * (kernel + out_channels + _RESPONSE_COST)
        composed = out_channels * responses // filters * kernel * (1 + filters / pixels)
        return composed <= two_stages

    def fold(self) -> nn.Conv2d:
        """The ordinary convolution that computes the same; UserError where `inner` stands between."""
        if self.inner is not None:
            raise UserError(
                f"fold: a {type(self.inner).__name__} stands between basis and factor, so no single convolution "
                "computes the same; it takes a network built with inner_neuron: false"
            )
        weight = composed_weight(self.basis, self.factor).detach()
        out_channels, in_channels, size, _ = weight.shape
        conv = nn.Conv2d(in_channels, out_channels, size, self.stride, size // 2, bias=False)
        conv.weight = nn.Parameter(weight)
        return conv

    def extra_repr(self) -> str:
        return f"basis={tuple(self.basis.shape)}, factor={tuple(self.factor.shape[:2])}, stride={self.stride}"


def make_orthonormal(convolutions: Sequence[DecomConv]) -> None:
    """Draw the bases of `convolutions`, of one shape, as parts of one matrix with orthonormal rows.

    Raises UserError where there are more rows than a row has weights.
    """
    bases = [conv.basis for conv in convolutions]
    rows, size = sum(map(len, bases)), bases[0][0].numel()
    if rows > size:
        raise UserError(
            f"n_basis: {rows} filters of {size} weights each cannot be orthonormal; lower n_basis or raise "
            "basis_fraction"
        )
    drawn = nn.init.orthogonal_(bases[0].new_empty(rows, size))
    with torch.no_grad():
        for basis, part in zip(bases, drawn.split([len(basis) for basis in bases]), strict=True):
            basis.copy_(part.view_as(basis))


def group_responses(x: Tensor, basis: Tensor, stride: PositiveInt = 1) -> Tensor:
    """Every group of a1 channels of x through the basis → (N, g·a2, H', W').

    On a CPU one grouped convolution with channels last in memory, which was measured to be faster there. Elsewhere
    groups are folded into the batch, a view of the memory that an ordinary convolution can read.

    Args:
        x: (N, g·a1, H, W).
        basis: (a2, a1, k, k).
        stride: of the convolution.
    """
    groups, padding = x.shape[1] // basis.shape[1], basis.shape[-1] // 2
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, basis.repeat(groups, 1, 1, 1), stride=stride, padding=padding, groups=groups)
    return fold_groups(x, basis, stride)


def fold_groups(x: Tensor, basis: Tensor, stride: PositiveInt = 1) -> Tensor:
    """`group_responses` with groups folded into the batch.

    Args:
        x: (N, g·a1, H, W).
        basis: (a2, a1, k, k).
        stride: of the convolution.
    """
    channels, size = basis.shape[1], basis.shape[-1]
    folded = x.unflatten(1, (-1, channels)).flatten(0, 1)
    return F.conv2d(folded, basis, stride=stride, padding=size // 2).unflatten(0, (len(x), -1)).flatten(1, 2)


def composed_weight(basis: Tensor, factor: Tensor) -> Tensor:
    """W (D, g·a1, k, k) of a basis (a2, a1, k, k) and a factor (D, g·a2, 1, 1)."""
    return (factor.reshape(-1, len(basis)) @ basis.flatten(1)).view(len(factor), -1, *basis.shape[2:])


def factorised_layers(network: nn.Module) -> dict[str, DecomConv]:
    """The factorised convolutions of `network` by path, in order of registration, which is that of execution."""
    return {name: module for name, module in network.named_modules() if isinstance(module, DecomConv)}


def basis_keys(network: nn.Module) -> list[str]:
    """Names of all bases in the network's state dict."""
    return [f"{name}.basis" for name in factorised_layers(network)]


def factor_key(layer: str) -> str:
    """Name in the state dict of the factor of the factorised convolution at path `layer`."""
    return f"{layer}.factor"


def can_fold(network: nn.Module) -> bool:
    """Whether `network` has factorised convolutions and nothing stands between their bases and factors."""
    layers = factorised_layers(network).values()
    return bool(layers) and all(layer.inner is None for layer in layers)


def fold_network(network: nn.Module) -> nn.Module:
    """A copy of `network` with an ordinary convolution for every factorised one; see `DecomConv.fold`."""
    folded = copy.deepcopy(network)
    for name, conv in factorised_layers(folded).items():
        parent, _, child = name.rpartition(".")
        setattr(folded.get_submodule(parent), child, conv.fold())
    return folded
