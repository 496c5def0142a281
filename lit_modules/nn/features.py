"""Features of classifiers, by timm's names: `forward_features`, and `forward_head` with or without its last layer."""

from __future__ import annotations

from torch import Tensor, nn

from leanlight.contracts import UserError


class FeatureClassifier(nn.Module):
    """Base of the shared classifiers: normalise, extract features, pool them, one linear layer.

    A subclass sets the children `normalize`, `features` (images → feature maps, or vectors), `pool` (to vectors (N, D))
    and `head` (to logits), in this order where they have parameters. `forward` is the head of the features.
    """

    normalize: nn.Module
    features: nn.Module
    pool: nn.Module
    head: nn.Module

    def forward_features(self, image: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] → what is pooled, as a rule maps (N, C', H', W')."""
        return self.features(self.normalize(image))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features → logits (N, K), or with `pre_logits` the vectors (N, D) that the last linear layer sees."""
        pooled = self.pool(features)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))


def require_features(network: nn.Module) -> None:
    """Raise UserError where `pooled_features` cannot take this network."""
    if not has_features(network):
        raise UserError(
            f"network: expected one with forward_features(image) and forward_head(features, pre_logits), as those of "
            f"lit_modules.nn and timm; got a {type(network).__name__}"
        )


def has_features(network: nn.Module) -> bool:
    """Whether a network has ``forward_features(image)`` and ``forward_head(features, pre_logits)``."""
    return hasattr(network, "forward_features") and hasattr(network, "forward_head")


def logits_and_features(network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits (N, K) and the vectors (N, D) that the last linear layer sees, by one pass.

    Of a network that does not offer such vectors, the logits and None.

    Args:
        network: of any kind; see `pooled_features`.
        image: as the network takes it.
    """
    if not has_features(network):
        return network(image), None
    features = network.forward_features(image)  # type: ignore[operator]
    pooled = network.forward_head(features, pre_logits=True)  # type: ignore[operator]
    return network.forward_head(features), pooled if pooled.ndim == 2 else None  # type: ignore[operator]


def pooled_features(network: nn.Module, image: Tensor) -> Tensor:
    """What the last linear layer of a classifier sees: images (N, C, H, W) → (N, D), differentiable.

    Args:
        network: of `lit_modules.nn`, of timm, or any with timm's ``forward_features`` and ``forward_head``.
        image: as the network takes it.

    Raises:
        UserError: a network without these methods, or one whose head does not pool.
    """
    require_features(network)
    pooled = network.forward_head(network.forward_features(image), pre_logits=True)  # type: ignore[operator]
    if pooled.ndim != 2:
        raise UserError(
            f"network: expected vectors (N, D) before the last layer of {type(network).__name__}, got shape "
            f"{tuple(pooled.shape)}; give it a global pooling"
        )
    return pooled
