"""What a student is taught by: its teacher's answers, its teacher's maps, and the task of telling rotations apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import Seed
from lit_modules.classifier.losses import cross_entropy, distillation_loss
from lit_modules.nn import pooled_features

Recipe = Literal["kl", "kl_ce_fea", "ce"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)

_STD = 0.02  # of the weights of a fresh head


def rotations(x: Tensor) -> Tensor:
    """Every image turned by 0, 90, 180 and 270 degrees.

    Args:
        x: (N, C, S, S).

    Returns:
        (4N, C, S, S), the four of an image one after another.
    """
    return torch.stack([torch.rot90(x, turns, (2, 3)) for turns in range(4)], 1).flatten(0, 1)


def rotation_labels(y: Tensor) -> Tensor:
    """Joint labels 4y + r of what `rotations` returns: (N,) int64 in [0, C) → (4N,) in [0, 4C)."""
    return (4 * y[:, None] + torch.arange(4, device=y.device)).flatten()


class RotationHead(nn.Module):
    """ψ: class and rotation from a student's features, (N, D) → (N, 4C).

    With outputs of length 1 cross entropy stays near that of a guess, between 2.72 and 4.69 for ten classes, however
    well the head does; without, a generator that maximises it finds no end.

    Args:
        features: D, width of the features.
        num_classes: C.
        normalize: whether outputs are scaled to length 1.
        seed: of the first weights.
    """

    def __init__(self, features: int, num_classes: int, normalize: bool = True, seed: Seed = 0) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(features, features), nn.Linear(features, 4 * num_classes)
        self.normalize = normalize
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Begin anew: weights from N(0, 0.02²), the same on every device; biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.hidden, self.output):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * _STD)
            layer.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        output = self.output(self.hidden(features).relu())
        return F.normalize(output, dim=1) if self.normalize else output


class AlignHead(nn.Sequential):
    """A student's last map as its teacher's would be: (N, C_s, H_s, W_s) → (N, C_t, H_t, W_t).

    Average pooling where sizes differ, then three convolutions, 1x1, 3x3 and 1x1, through twice the teacher's channels.

    Args:
        student: (C_s, H_s, W_s) of the student's map.
        teacher: (C_t, H_t, W_t) of the teacher's.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        channels, wide, size = teacher[0], 2 * teacher[0], tuple(teacher[1:])
        super().__init__(
            nn.Identity() if tuple(student[1:]) == size else nn.AdaptiveAvgPool2d(size),
            nn.Conv2d(student[0], wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, channels, 1, bias=False),
        )
        self.shapes = list(student), list(teacher)


def logits_and_map(network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and the last map (N, C', H', W') of a classifier, by one pass.

    Args:
        network: with timm's ``forward_features`` and ``forward_head``.
        image: as the network takes it.
    """
    features = network.forward_features(image)  # type: ignore[operator]
    return network.forward_head(features), features  # type: ignore[operator]


def rotated_features(network: nn.Module, image: Tensor) -> Tensor:
    """φ: (4N, D) features of `rotations`, in evaluation mode, in which the network does not stay.

    Args:
        network: a student; see `lit_modules.nn.pooled_features`.
        image: (N, C, S, S).
    """
    was_training = network.training
    try:
        return pooled_features(network.eval(), rotations(image))
    finally:
        network.train(was_training)


def kd_losses(
    recipe: Recipe,
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float = 20.0,
    maps: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of a student's loss by name, each without its factor.

    ``distillation`` is τ² KL(softmax(t / τ) || softmax(s / τ)), ``cross_entropy`` that of the label, ``features`` the
    mean squared difference of the last maps.

    Args:
        recipe: ``kl``, ``kl_ce_fea`` (all three terms) or ``ce``.
        student: s, (N, K) logits.
        teacher: t, (N, K) logits.
        label: (N,) int64 class that an image was made for, or (N, K) soft.
        temperature: τ, positive.
        maps: aligned map of the student and map of the teacher, of one shape; for ``kl_ce_fea``.
        weight: (N,) float of the items, in the first two terms; None: all alike.

    Raises:
        UserError: an unknown recipe, or no maps where they are needed.
    """
    if recipe not in RECIPES:
        raise UserError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    terms = {}
    if recipe != "ce":
        terms["distillation"] = distillation_loss(student, teacher, temperature, weight)
    if recipe != "kl":
        terms["cross_entropy"] = cross_entropy(student, label, weight)
    if recipe == "kl_ce_fea":
        if maps is None:
            raise UserError("maps: expected the last maps of student and teacher with recipe kl_ce_fea, got none")
        terms["features"] = F.mse_loss(*maps)
    return terms
