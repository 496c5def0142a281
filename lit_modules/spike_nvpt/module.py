"""Training glue of tuning a pre-trained network: hooks, optimisers, logging."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from leanlight.contracts import (
    ImageBatch,
    ImageData,
    InMemoryImages,
    MediaItem,
    Split,
    UserError,
    data_of,
)
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, Share
from lit_modules.classifier import ClassifierHooks, class_index, cross_entropy
from lit_modules.history import History
from lit_modules.hparams import save_hparams
from lit_modules.nn import TimmNet
from lit_modules.optim import parameter_groups
from lit_modules.spike_nvpt import checkpoints, pictures
from lit_modules.spike_nvpt.export import export_tuned
from lit_modules.spike_nvpt.packing import pack, unpack
from lit_modules.spike_nvpt.tuning import PromptTuning, Tuning
from lit_modules.spike_nvpt.vit import TunedNetwork
from lit_modules.step_log import log_step

_STORE_BYTES = 2**31


class TunedClassifier(ClassifierHooks):
    """Adapt a pre-trained network to a task by a rule of tuning: prompts, spiking or not, or one of their baselines.

    Args:
        network: makes the pre-trained network, of `lit_modules.nn.TimmNet` with ``num_classes: null``.
        tuning: which parameters train and what is added; None for `PromptTuning`'s defaults, that is Spike-NVPT.
        optimizer: makes the optimiser from groups of trained parameters; Adam with lr 0.001 by default.
        lr_scheduler: makes the learning-rate schedule from the optimiser; constant by default.
        lr_interval: what a step of the schedule follows, ``epoch`` or ``step``.
        prompt_lr: learning rate of the prompts, positive; None for that of the rest. Latents of bits have to move by
            about 1, so they want 10 to 20 times as much.
        prompt_weight_decay: weight decay of the prompts, at least 0; it would draw latents below their threshold.
        label_smoothing: share of the label spread over all classes in training, in [0, 1).
        store_frozen: compute what no training changes once, where data are in memory and not augmented.
    """

    network: TunedNetwork

    def __init__(
        self,
        network: Callable[[], TimmNet],
        tuning: Tuning | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "step",
        prompt_lr: PositiveFloat | None = None,
        prompt_weight_decay: NonNegativeFloat = 0.0,
        label_smoothing: Share = 0.0,
        store_frozen: bool = True,
    ) -> None:
        super().__init__()
        if prompt_lr is not None and prompt_lr <= 0:
            raise UserError(f"prompt_lr: expected a positive number, got {prompt_lr}")
        if prompt_weight_decay < 0:
            raise UserError(f"prompt_weight_decay: expected at least 0, got {prompt_weight_decay}")
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
        save_hparams(self)
        net = network()
        if not isinstance(net, TimmNet):
            raise UserError(f"network: expected a lit_modules.nn.TimmNet, got a {type(net).__name__}")
        pretrained = list(net.parameters())
        tuning = tuning or PromptTuning()
        self._compose(tuning.adapt(net), optimizer, lr_scheduler, lr_interval)
        self._from_file = checkpoints.from_file(self, net, pretrained)
        self._rule = type(tuning).__name__
        self.prompt_lr, self.prompt_weight_decay = prompt_lr, prompt_weight_decay
        self.label_smoothing, self.store_frozen = label_smoothing, store_frozen
        #: What `TunedNetwork.prefix` gave for every training item; None where it is computed anew.
        self._stored: Tensor | None = None
        self._bits: Tensor | None = None
        self._history = History()
        self._shown: Tensor | None = None  # first images of the test data
        self._warned = False

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check the network against the data, make its last layer and the metrics."""
        self._fit_to(data_of(self, ImageData).meta)

    def trained_parameters(self) -> list[dict[str, Any]]:
        """Two groups: prompts, with a rate and a decay of their own, and the rest of what trains."""
        options: dict[str, Any] = {"weight_decay": self.prompt_weight_decay}
        if self.prompt_lr is not None:
            options["lr"] = self.prompt_lr
        return parameter_groups(self.network, {"prompts": options})

    def on_train_start(self) -> None:
        self._bits = self._present_bits() if self._bits is None else self._bits.to(self.device)
        self._stored = self._store() if self.store_frozen and self.network.stores else None

    @torch.no_grad()
    def _store(self) -> Tensor | None:
        """What no training changes, for every training item in order; None where it cannot be kept."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, InMemoryImages) or getattr(data, "augment", None) is not None:
            return None
        split, pieces = data.train_split, []
        for index in torch.arange(len(split)).split(256):
            batch = data.on_after_batch_transfer(split.batch(index).to(self.device), 0)  # type: ignore[attr-defined]
            pieces.append(self.network.prefix(self._laid_out(batch.image)))
            if pieces[0].nbytes / len(pieces[0]) * len(split) > _STORE_BYTES:
                rank_zero_info(
                    f"frozen layers run in every step: what they give of {len(split):,} items needs over 2 GiB"
                )
                return None
        return torch.cat(pieces)

    # ---- steps ----

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        logits = self(batch.image) if self._stored is None else self.network.suffix(self._stored[batch.index])
        loss = cross_entropy(logits, batch.label, batch.weight, self.label_smoothing)
        self._terms = {"cross_entropy": loss.detach()}
        right = (logits.detach().argmax(1) == class_index(batch.label)).float().mean()
        log_step(self, {"train/loss": loss, "train/accuracy": right}, len(batch), over_processes=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log how many bits are ones, by layer, and how many changed in the epoch."""
        bits = self._present_bits()
        if bits is None or self._bits is None:
            return
        by_layer = bits.float().mean((1, 2))
        values = {f"train/density_{i}": density for i, density in enumerate(by_layer)} if len(by_layer) > 1 else {}
        density = bits.float().mean()
        values |= {"train/density": density, "train/flips": (bits ^ self._bits).sum().float()}
        self.log_dict(values, sync_dist=True)
        self._bits = bits
        kept = {name.removeprefix("train/"): float(value) for name, value in values.items()}
        self._history.add(epoch=self.current_epoch + 1, **kept)
        if not self._warned and not 0.01 <= float(density) <= 0.99:
            self._warned = True
            rank_zero_warn(
                f"{float(density):.1%} of the prompts' bits are ones: latents all on one side of the threshold"
            )

    def _present_bits(self) -> Tensor | None:
        return None if self.network.prompts is None else self.network.prompts.bits()

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        if batch_idx == 0:
            self._shown = batch.image[: pictures.SHOWN].clone()

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.log_dict(self.sizes(), sync_dist=True)

    def sizes(self) -> Mapping[str, float]:
        """``test/trained_parameters`` and ``test/stored_bits``: what a task adds to the network that tasks share.

        A trained number is stored as 32 bits, a bit of a prompt as one.
        """
        trained = {name: p.numel() for name, p in self.network.named_parameters() if p.requires_grad}
        stored = 32 * sum(trained.values())
        if (bits := self._present_bits()) is not None:
            stored += bits.numel() - 32 * trained.get("prompts.latents", 0)
        return {"test/trained_parameters": float(sum(trained.values())), "test/stored_bits": float(stored)}

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """train: prompts. val, test: see `ClassifierEvaluation.media`; test: attention, too."""
        if split == "train":
            return pictures.of_prompts(self.network.prompts, self._history)
        items = dict(super().media(split))
        if split == "test" and self._shown is not None:
            items |= pictures.of_attention(self.network, self._shown)
        return items

    # ---- checkpoints and export ----

    def export(self, directory: Path) -> list[Path]:
        """Write the network and its prompts for plain PyTorch: see `lit_modules.spike_nvpt.export`."""
        net, sizes = self.network.net, {name.split("/")[1]: int(value) for name, value in self.sizes().items()}
        about: dict[str, Any] = {"tuning": self._rule, **sizes, "pretrained_weights": None}
        if net.weights_file is not None:
            about["pretrained_weights"] = {"file": net.weights_file.name, "sha256": net.weights_sha256}
        names = [name.removeprefix("network.") for name in self._from_file]
        example, classes = self.evaluation.example(), self.evaluation.classes
        return export_tuned(self.network, example, Path(directory), classes, about, names)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoints.leave_out(checkpoint, self._from_file, self.network.net)
        checkpoint["history"] = self._history.state_dict()
        # Those that the present epoch began with.
        checkpoint["prompt_bits"] = None if self._bits is None else pack(self._bits).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        checkpoints.complete(checkpoint, self._from_file, self.network.net, dict(self.named_parameters()))
        self._history.load_state_dict(checkpoint["history"])
        if (packed := checkpoint["prompt_bits"]) is not None and self.network.prompts is not None:
            self._bits = unpack(packed, self.network.prompts.shape)
