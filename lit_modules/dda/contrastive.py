"""CMI's contrastive term (Fang et al. 2021): images shall differ from one another and from those made before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError, isolated_rng, to_device
from leanlight.contracts.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lit_modules.nn.checks import require_positive


@dataclass(frozen=True)
class Contrastive:
    """Settings of the term.

    Args:
        weight: its factor in the loss of the inversion; 0.8 in CMI.
        temperature: τ_c of the similarities, positive; 0.1 to 0.2 in CMI.
        rows: features of earlier images that are kept, the newest ones.
        sampled: of these, how many a step looks at.
        width: of the projection in which images are compared.
        layers: positions of the teacher's batch norms whose inputs are the features; None: all. A projection has as
            many rows and columns as these have channels: CMI takes the inputs of the four stages of a ResNet-34.
    """

    weight: NonNegativeFloat = 0.8
    temperature: PositiveFloat = 0.2
    rows: PositiveInt = 40_960
    sampled: PositiveInt = 4_096
    width: PositiveInt = 256
    layers: Sequence[NonNegativeInt] | None = None

    def __post_init__(self) -> None:
        require_positive(**{f"contrastive.{name}": getattr(self, name) for name in ("rows", "sampled", "width")})
        for name in ("weight", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"contrastive.{name}: expected a positive number, got {getattr(self, name)}")


def contrastive_loss(local: Tensor, whole: Tensor, current: int, temperature: float) -> Tensor:
    """Cross entropy of each local view's similarities, its own whole view being right.

    Args:
        local: (M, D) projections of local views; gradients pass through these alone.
        whole: (M, D) projections of whole views.
        current: the first so many rows are of the images in the making, the others of earlier ones; the loss is the
            mean of the former and, where there are any, of the latter, added.
        temperature: τ_c.
    """
    similarity = F.normalize(local, dim=1) @ F.normalize(whole, dim=1).detach().T / temperature
    losses = F.cross_entropy(similarity, torch.arange(len(local), device=local.device), reduction="none")
    loss = losses[:current].mean()
    return loss + losses[current:].mean() if len(losses) > current else loss


class ContrastiveMemory:
    """A learned projection, and a ring of features of images that are made. A synthesis with it depends on its past.

    Args:
        settings: of the term.
        channels: of the inputs of all the teacher's batch norms, in their order.
        lr: learning rate of the projection's Adam.
        seed: of the projection's first weights.
        device: of the projection; the ring lies on the CPU.

    Raises:
        UserError: `settings.layers` names a layer that is not there.
    """

    def __init__(
        self,
        settings: Contrastive,
        channels: Sequence[int],
        lr: float,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings = settings
        self.layers = list(range(len(channels)) if settings.layers is None else settings.layers)
        if not self.layers or not all(0 <= layer < len(channels) for layer in self.layers):
            raise UserError(
                f"contrastive.layers: expected positions of the {len(channels)} batch norms of the teacher, got "
                f"{self.layers}"
            )
        features = sum(channels[layer] for layer in self.layers)
        with isolated_rng(seed):
            self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, settings.width)).to(
                device
            )
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=lr)
        self._ring = torch.zeros(settings.rows, 2 * features)
        self._count = 0  # rows ever written; row r lies at r modulo rows

    def __len__(self) -> int:
        return min(self._count, self.settings.rows)

    def features(self, means: Sequence[Tensor]) -> Tensor:
        """Means (N, C) of the inputs of all batch norms → features (N, D)."""
        return torch.cat([means[layer] for layer in self.layers], 1)

    def loss(self, local: Tensor, whole: Tensor, draws: torch.Generator) -> Tensor:
        """The term for images in the making, beside earlier ones.

        Args:
            local: (N, D) `features` of local views.
            whole: (N, D) `features` of whole views.
            draws: picks the earlier ones; of the CPU.
        """
        rows = torch.randperm(len(self), generator=draws)[: self.settings.sampled]
        earlier = to_device(self._ring[rows], local.device).to(local.dtype)
        features = torch.cat([local, earlier.chunk(2, 1)[0], whole, earlier.chunk(2, 1)[1]])
        of_local, of_whole = self.head(features).float().chunk(2)
        return contrastive_loss(of_local, of_whole, len(local), self.settings.temperature)

    def remember(self, local: Tensor, whole: Tensor) -> None:
        """Keep the features (N, D) of images that are made."""
        rows = torch.cat([local, whole], 1).detach().float().cpu()[-self.settings.rows :]
        self._ring[(self._count + torch.arange(len(rows))) % self.settings.rows] = rows
        self._count += len(rows)

    def state_dict(self) -> dict[str, Any]:
        """Projection, optimiser and ring, for a checkpoint."""
        ring = self._ring[: len(self)].clone()
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ring": ring,
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._count = state["count"]
        self._ring[: len(self)] = state["ring"]
