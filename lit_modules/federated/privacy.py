"""Local training that hides single images: DP-SGD (Abadi et al. 2016, arXiv:1607.00133), with opacus.

Clipping, noise and accounting are opacus' own. Gradients by image come from `torch.func`, which takes a network as a
whole: the hooks of opacus' modules take the first dimension of a layer's input for the images, and spiking networks
fold time into it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from leanlight.contracts import MissingExtraError, UserError
from leanlight.contracts.ranges import NonNegativeFloat, OpenUnitInterval, PositiveFloat
from lit_modules.nn.scan import plain_autograd

LossOf = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DPSGD:
    """Clip the gradient of each image, and add noise to their sum: (ε, δ)-differential privacy of a client's images.

    Each step takes every image of the client with the chance q = min(1, B / n), for n images and the batch size B, as
    the accounting supposes, and divides the noisy sum by q n. ε bounds what all weights that a client ever sends tell
    of whether one image was among its data.

    Args:
        noise_multiplier: σ, standard deviation of the noise over `max_grad_norm`; 0 leaves no privacy.
        max_grad_norm: C, greatest Euclidean norm of an image's gradient.
        delta: δ, chance with which ε may fail; to be well below 1 / n.
    """

    noise_multiplier: NonNegativeFloat = 1.0
    max_grad_norm: PositiveFloat = 1.0
    delta: OpenUnitInterval = 1e-5

    def __post_init__(self) -> None:
        if self.noise_multiplier < 0:
            raise UserError(f"privacy.noise_multiplier: expected at least 0, got {self.noise_multiplier}")
        if self.max_grad_norm <= 0:
            raise UserError(f"privacy.max_grad_norm: expected a number above 0, got {self.max_grad_norm}")
        if not 0 < self.delta < 1:
            raise UserError(f"privacy.delta: expected a number in (0, 1), got {self.delta}")

    def epsilon(self, steps: int, rate: float) -> float:
        """ε after `steps` that each took an image with the chance `rate`, by opacus' accountant (Rényi divergences)."""
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis.rdp import get_privacy_spent

        divergences = steps * _divergences(rate, self.noise_multiplier)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Optimal order is the")  # the bound holds at any order
            spent, _ = get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=divergences, delta=self.delta)
        return float(spent)


@cache
def _divergences(rate: float, noise_multiplier: float) -> Any:
    """Of one step, by order, as the accountant adds them up; costly, and the same for all steps of a client."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    return compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS)


def poisson_draw(items: int, rate: float, generator: torch.Generator) -> Tensor:
    """Positions of those of `items` that a step takes, each with the chance `rate`; maybe none."""
    return (torch.rand(items, generator=generator) < rate).nonzero().squeeze(1)


class _ImageLoss(nn.Module):
    """The loss of one image as a module, so that parameters can be handed in."""

    def __init__(self, network: nn.Module, loss_of: LossOf) -> None:
        super().__init__()
        self.network, self.loss_of = network, loss_of

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        return self.loss_of(self.network, image.unsqueeze(0), label.unsqueeze(0))


def image_gradients(
    network: nn.Module, loss_of: LossOf, image: Tensor, label: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (N, ...) of each image's loss by trained parameter, and the losses (N,)."""
    module = _ImageLoss(network, loss_of)
    trained = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    if not len(image):  # `vmap` takes no empty batch
        return _by_name({name: value.new_zeros(0, *value.shape) for name, value in trained.items()}), image.new_zeros(0)

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional_call(module, parameters, (image, label))

    each = vmap(grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")
    with plain_autograd():
        gradients, losses = each(trained, image, label)
    return _by_name(gradients), losses


def _by_name(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): value for name, value in values.items()}


def private_gradient(
    network: nn.Module, privacy: DPSGD, optimizer: torch.optim.Optimizer, loss_of: LossOf, expected: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (images, labels) that leaves a noisy gradient in ``p.grad``, and returns the mean loss.

    Noise is drawn from the global random state.

    Args:
        network: to be trained, in training mode.
        privacy: clipping and noise.
        optimizer: of the network's parameters; its step is left to the caller.
        loss_of: mean loss of (network, images, labels).
        expected: images of a step, in the mean.
    """
    from opacus.optimizers import DPOptimizer

    private = DPOptimizer(
        optimizer,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=expected,
    )

    def gradient(image: Tensor, label: Tensor) -> Tensor:
        gradients, losses = image_gradients(network, loss_of, image, label)
        trained = [(network.get_parameter(name), found) for name, found in gradients.items()]
        for parameter, found in trained:
            parameter.grad_sample = found  # type: ignore[attr-defined]  # where opacus looks for them
        with torch.autocast(image.device.type, enabled=False):  # bounds and noise in full precision
            private.pre_step()
        for parameter, _ in trained:
            parameter.grad_sample = parameter.summed_grad = None  # type: ignore[attr-defined]
        return losses.sum() / max(len(image), 1)

    return gradient


def check_private(network: nn.Module, loss_of: LossOf, image: Tensor, label: Tensor) -> None:
    """Raise UserError where the network's gradients cannot be taken image by image, or opacus is not there.

    Args:
        network: to be trained, in training mode.
        loss_of: mean loss of (network, images, labels).
        image: (N, C, H, W) to try it with.
        label: (N,) of them.
    """
    if find_spec("opacus") is None:
        raise MissingExtraError("opacus", "dp")
    for layer in network.modules():
        # Opacus' own validator knows the exact classes of PyTorch alone, and none without parameters.
        if isinstance(layer, _BatchNorm) or getattr(layer, "track_running_stats", False):
            raise UserError(
                f"local.privacy: expected a network without {type(layer).__name__}, whose statistics mix images; "
                "group norm mixes none"
            )
    try:
        image_gradients(network, loss_of, image, label)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            "local.privacy: expected a network that torch.func can take image by image, got "
            f"{type(network).__name__} ({reason})"
        ) from error
