"""The trained classifier whose data may not be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from leanlight.contracts import ImageMeta, NetworkFactory, UserError, same_classes
from lit_modules.classifier import frozen_teacher
from lit_modules.frozen import Frozen, frozen_network
from lit_modules.nn.checks import blank_output

_HELPS = "leanlight run dda/pipelines/fashion_mnist_small trains one first"


@dataclass(frozen=True)
class Teacher:
    """Where the teacher comes from: a checkpoint of the suite's classifier, or any network with weights from a file.

    Args:
        checkpoint: of an ImageClassifier.
        network: makes a network, images (N, C, H, W) in [0, 1] → logits (N, K), in place of `checkpoint`.
        weights: ``.safetensors`` or a state dict for `network`; None for those that it makes itself.
    """

    checkpoint: Path | None = None
    network: NetworkFactory | None = None
    weights: Path | None = None

    def load(self, meta: ImageMeta) -> Frozen[nn.Module]:
        """Build it, frozen, on the CPU.

        Args:
            meta: of the data, whose shape and classes it must be for.

        Raises:
            UserError: no teacher given, or not the one file expected, or one for other images or classes.
        """
        if self.network is None:
            if self.weights is not None:
                raise UserError(f"teacher.network: expected what makes the network that {self.weights} is for")
            shape, classes = tuple(meta.shape), tuple(meta.classes)
            return Frozen(frozen_teacher(self.checkpoint, "teacher.checkpoint", _HELPS, shape, classes, same_classes))
        if self.checkpoint is not None:
            raise UserError("teacher.checkpoint: expected none beside teacher.network; give one of them")
        network = frozen_network(self.network, self.weights, "teacher.weights")
        logits = blank_output(network, tuple(meta.shape), "teacher.network")
        if logits.shape != (1, meta.num_classes):
            raise UserError(
                f"teacher.network: expected one with num_classes {meta.num_classes}, that of the data; its output has "
                f"shape {tuple(logits.shape)}"
            )
        return Frozen(network)
