"""One-line errors for sizes that make no sense."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError, isolated_rng


def require_positive(**sizes: int) -> None:
    """Raise UserError naming the first of `sizes` that is not at least 1."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name}: expected an integer of at least 1, got {value}")


def require_share(**shares: float) -> None:
    """Raise UserError naming the first of `shares` that is not in [0, 1)."""
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise UserError(f"{name}: expected a number in [0, 1), got {value}")


def pooled_size(image_size: int, halvings: int) -> int:
    """Side length of an `image_size` map after `halvings` poolings by 2; UserError when nothing is left."""
    size = image_size >> halvings
    if size < 1:
        raise UserError(f"image_size: expected at least {1 << halvings} for {halvings} poolings by 2, got {image_size}")
    return size


def device_of(network: nn.Module) -> torch.device:
    """Where the weights of a network lie; a LightningModule's ``device`` is ahead of them in `setup`."""
    return next(itertools.chain(network.parameters(), network.buffers()), torch.empty(0)).device


def follow_classes(network: nn.Module, num_classes: int) -> None:
    """Give a network that leaves the number of classes open a last layer for so many; any other stays as it is."""
    if hasattr(network, "follow_classes"):
        network.follow_classes(num_classes)  # type: ignore[operator]


def blank_output(
    network: nn.Module,
    image_shape: tuple[int, ...],
    argument: str = "network",
    call: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
) -> Tensor:
    """What a network gives for a blank image, so that a mismatch is one line before anything is computed.

    Leaves the network's mode and the random states as they were.

    Args:
        network: on any device.
        image_shape: (C, H, W) of the data's images.
        argument: name of the caller's argument that made the network, for errors.
        call: how to ask it.
    """
    was_training = network.training
    with isolated_rng(), torch.no_grad():
        try:
            return call(network.eval(), torch.zeros(1, *image_shape, device=device_of(network)))
        except (RuntimeError, ValueError, AssertionError) as error:
            channels, size = image_shape[0], image_shape[-1]
            raise UserError(
                f"{argument}: expected one for images of shape {image_shape}, that is in_channels {channels} "
                f"and, where it has one, image_size {size}; got {first_line(error)}"
            ) from error
        finally:
            network.train(was_training)


def check_classifier(network: nn.Module, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Run a blank image through a classifier, see `blank_output`. Errors name the argument ``network``.

    Args:
        network: the classifier.
        image_shape: (C, H, W) of the data's images.
        num_classes: number of the data's classes.
    """
    logits = blank_output(network, image_shape)
    if logits.shape != (1, num_classes):
        raise UserError(
            f"network: expected one with num_classes {num_classes}, that of the data; its output has shape "
            f"{tuple(logits.shape)}"
        )


def first_line(error: Exception) -> str:
    """An error of a library, in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
