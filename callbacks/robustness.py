"""How many test images a module still labels right when they are corrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.library_corruptions import LIBRARY_CORRUPTIONS, SMALLEST, LibraryCorruption
from callbacks.media import publish
from leanlight.contracts import (
    HasVariants,
    ImageBatch,
    ImageMeta,
    UnderNoise,
    UserError,
    isolated_rng,
    nearest,
)
from leanlight.contracts.ranges import PositiveInt, Seed
from leanlight.ops.corruptions import NOISES, Corruption, Scale


class Robustness(Callback):
    """Logs the accuracy on corrupted copies of the test images, in test alone; without `corruptions` it does nothing.

    ``test/<corruption>_<severity>`` is the share of right answers, ``test/noisy_accuracy`` their mean; ``test/drop``
    is what it lies below the accuracy on the images as they are, ``test/retention`` its ratio to that. Images are
    corrupted in [0, 1], before the network resizes or normalises them. Noise depends on seed, corruption, severity and
    the item's number in the test set alone: all methods see the same images, whatever their batch size or number of
    processes. For a module that stands for several networks (`HasVariants`) these are measured one by one:
    ``test/drop_<name>`` and so on. A curve over the severity goes to ``artifacts/media/test/robustness.png``.

    Args:
        corruptions: gaussian, shot, impulse, speckle; with the extra ``robustness`` the other 15 of ImageNet-C, too.
        severities: of each, 1 to 5.
        scale: levels of the four noises: of ``cifar_c``, of ``imagenet_c``, or by the size of the images (``auto``).
        seed: of what is random in corruptions, apart from the run's own.
    """

    def __init__(
        self,
        corruptions: Sequence[str] = (),
        severities: Sequence[PositiveInt] = (1, 2, 3, 4, 5),
        scale: Scale = "auto",
        seed: Seed = 0,
    ) -> None:
        self.corruptions = _checked_names(corruptions)
        self.severities = sorted(set(severities))
        if not self.severities or any(severity not in range(1, 6) for severity in self.severities):
            raise UserError(f"robustness.severities: expected whole numbers from 1 to 5, got {list(severities)}")
        self._conditions = [
            Corruption(name, severity, scale=scale, seed=seed)
            if name in NOISES
            else LibraryCorruption(name, severity, seed)
            for name in self.corruptions
            for severity in self.severities
        ]
        self._networks: dict[str, nn.Module] = {}
        self._right: Tensor | None = None  # (networks, 1 + conditions) right answers, without corruption first
        self._items = 0

    # -- before anything runs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.corruptions or stage not in ("fit", "test"):
            return
        meta = getattr(trainer.datamodule, "meta", None)  # type: ignore[attr-defined]
        if not isinstance(meta, ImageMeta):
            got = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
            raise UserError(f"robustness.corruptions: expected data of labelled images, got {got}; use []")
        channels, height, width = meta.shape
        if (channels not in (1, 3) or min(height, width) < SMALLEST) and (slow := self._from_library()):
            raise UserError(
                f"robustness.corruptions: {slow[0]} takes images of 1 or 3 channels and at least {SMALLEST} pixels a "
                f"side, got {channels} channels of {height} x {width}; without it: {', '.join(NOISES)}"
            )

    def _from_library(self) -> list[str]:
        return [name for name in self.corruptions if name in LIBRARY_CORRUPTIONS]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._try(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._try(trainer, pl_module)
        self._networks = dict(_networks(pl_module)) if self.corruptions else {}
        self._right, self._items = None, 0

    def _try(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whether the networks label images, before hours are spent on training or testing them."""
        if not self.corruptions:
            return
        meta: ImageMeta = trainer.datamodule.meta  # type: ignore[attr-defined]
        precision = trainer.strategy.precision_plugin
        device = next((parameter.device for parameter in pl_module.parameters()), pl_module.device)
        images = precision.convert_input(torch.zeros(2, *meta.shape, device=device))
        for name, network in _networks(pl_module).items():
            training = [child for child in network.modules() if child.training]
            with isolated_rng(), torch.no_grad(), precision.test_step_context():
                got = network.eval()(images)
            for child in training:
                child.training = True
            shape = tuple(getattr(got, "shape", ()))
            if shape != (2, meta.num_classes):
                raise UserError(
                    f"robustness.corruptions: expected a network that labels images, with outputs "
                    f"(N, {meta.num_classes}); {name or type(pl_module).__name__} gives {shape}; use []"
                )

    # -- counting

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self.corruptions:
            return
        if not isinstance(batch, ImageBatch):
            raise UserError(f"robustness.corruptions: expected batches of labelled images, got {type(batch).__name__}")
        label = batch.label.argmax(1) if batch.label.ndim == 2 else batch.label
        counts: list[Tensor] = []
        # What a network draws at random must not depend on whether it is measured here, too.
        with isolated_rng(), torch.no_grad(), trainer.strategy.precision_plugin.test_step_context():
            for condition in (None, *self._conditions):
                image = batch.image if condition is None else condition(batch.image, batch.index)
                hits = [(network(image).argmax(1) == label).sum() for network in self._networks.values()]
                counts.append(torch.stack(hits))
        right = torch.stack(counts, 1)
        self._right = right if self._right is None else self._right + right
        self._items += len(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._networks:
            return
        counts = torch.zeros(len(self._networks), 2 + len(self._conditions), dtype=torch.long, device=pl_module.device)
        if self._right is not None:
            counts[:, 0] = self._items
            counts[:, 1:] = self._right
        if trainer.world_size > 1:
            counts = trainer.strategy.reduce(counts, reduce_op="sum")
        for name, (items, clean, *noisy) in zip(self._networks, counts.tolist(), strict=True):
            if items:
                self._publish(trainer, pl_module, name, clean / items, [right / items for right in noisy])
        self._networks, self._right = {}, None

    def _publish(
        self, trainer: Trainer, pl_module: LightningModule, name: str, clean: float, noisy: Sequence[float]
    ) -> None:
        accuracy = iter(noisy)
        result = UnderNoise(clean, {c: {float(s): next(accuracy) for s in self.severities} for c in self.corruptions})
        end = f"_{name}" if name else ""
        values = result.values() | {"noisy_accuracy": result.mean} | result.losses()
        pl_module.log_dict({f"test/{key}{end}": value for key, value in values.items()}, sync_dist=True)
        publish(trainer, pl_module, "test", {f"robustness{end}": result.curve("severity", "test accuracy")})


def _networks(module: LightningModule) -> Mapping[str, nn.Module]:
    return module.variants() if isinstance(module, HasVariants) else {"": module}


def _checked_names(names: Sequence[str]) -> list[str]:
    known = (*NOISES, *LIBRARY_CORRUPTIONS)
    for name in names:
        if name not in known:
            raise UserError(
                f"robustness.corruptions: expected some of {', '.join(known)}; got {name!r}"
                f"{nearest(name.removesuffix('_noise'), known)}"
            )
    return list(dict.fromkeys(names))
