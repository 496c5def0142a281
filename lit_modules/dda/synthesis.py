"""Training glue of the bank: a fit without an optimiser, whose batches become images by inversion of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from leanlight.contracts import (
    Allows,
    ImageData,
    ImageMeta,
    MediaItem,
    NoiseBatch,
    Progress,
    Split,
    UserError,
    data_of,
    derived_seed,
    run_seed,
)
from leanlight.contracts.ranges import Seed
from lit_modules.dda import pictures
from lit_modules.dda.bank import ImagePool, in_8_bits, originals, teacher_digest, write_bank
from lit_modules.dda.contrastive import ContrastiveMemory
from lit_modules.dda.inversion import GeneratorInversion, Inversion, Synthesized
from lit_modules.dda.teacher import Teacher
from lit_modules.frozen import Frozen
from lit_modules.history import History
from lit_modules.hparams import save_hparams
from lit_modules.step_log import log_step


class BankSynthesis(LightningModule):
    """Make a bank of images from a teacher: each training batch is one call of the inversion.

    A batch of noise becomes as many images, which go into a file in the run folder in 8 bits. Without a contrastive
    term they are a function of teacher, seed and the numbers of their batch: several processes make the images of one.
    The export is the bank (`leanlight.contracts.bank`).

    Args:
        teacher: whose classes and statistics the images shall have.
        inversion: how images are made; `GeneratorInversion` with its defaults, the paper's, by default.
        seed: of everything that is drawn beside latents and classes; that of ``seed_everything`` by default.
    """

    allows = Allows(precision=("32-true", "bf16-mixed"), why="inversion does not scale losses")
    automatic_optimization = False

    def __init__(self, teacher: Teacher, inversion: Inversion | None = None, seed: Seed | None = None) -> None:
        super().__init__()
        save_hparams(self)
        self.teacher, self.inversion, self.seed = teacher, inversion or GeneratorInversion(), run_seed(seed)
        self._needless = nn.Parameter(torch.zeros(()))  # DistributedDataParallel wraps no module without one
        self._teacher: Frozen[nn.Module] | None = None
        self._meta: ImageMeta | None = None
        self._pool: ImagePool | None = None
        self._memory: ContrastiveMemory | None = None
        self._saved: dict[str, Any] = {}  # of the checkpoint that this module goes on from
        self._facts: dict[str, Any] = {}
        self._history = History()
        self._terms: dict[str, Tensor] = {}

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Load the teacher; check teacher and settings against the data."""
        if stage != "fit":
            raise UserError(f"leanlight {stage}: a bank is made by leanlight fit; there is nothing to {stage}")
        meta = data_of(self, ImageData).meta
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "latent_size"):
            got = type(data).__name__
            raise UserError(f"data: BankSynthesis needs noise to make images from, a NoiseDataModule; got {got}")
        if self.inversion.contrastive is not None and self.trainer.world_size > 1:
            raise UserError(
                "inversion.contrastive: expected none on several processes, since images are compared with all that "
                "were made before them; use trainer.devices 1"
            )
        self._meta, self._teacher = meta, self.teacher.load(meta)
        self.inversion.check(self._teacher.network, meta.shape)
        self._facts = {"classes": list(meta.classes), "teacher": teacher_digest(self._teacher.network)}

    def configure_optimizers(self) -> list[Any]:
        """None: an inversion has an optimiser of its own in each call."""
        return []  # for None Lightning warns

    def on_fit_start(self) -> None:
        """Move the teacher; open the file of images, that of the checkpoint where the run goes on."""
        assert self._teacher is not None
        assert self._meta is not None
        self._teacher.to(self.device)
        self._memory = self.inversion.memory(self._teacher, self._meta.shape, derived_seed(self.seed, "memory"))
        self._check_resumed()
        if not self.trainer.is_global_zero:
            self.trainer.strategy.barrier()  # one process makes the files
        folder = Path(self.trainer.default_root_dir) / "pool"
        self._pool = ImagePool(folder, self._meta.counts["train"], self._meta.shape)
        if self.trainer.is_global_zero:
            self.trainer.strategy.barrier()
        if self._saved:
            self._pool.load_state_dict(self._saved["pool"])
            if self._memory is not None:
                self._memory.load_state_dict(self._saved["memory"])

    def _check_resumed(self) -> None:
        if not self._saved:
            return
        assert self._meta is not None
        for name, got, expected in (
            ("data.items", self._meta.counts["train"], self._saved["pool"]["capacity"]),
            ("teacher", self._facts["teacher"], self._saved["facts"]["teacher"]),
        ):
            if got != expected:
                raise UserError(f"{name}: expected {expected}, that of the run which goes on; got {got}")

    # ---- a batch ----

    def training_step(self, batch: NoiseBatch, batch_idx: int) -> None:
        assert self._teacher is not None
        assert self._meta is not None
        first = int(batch.index[0])
        made = self.inversion(
            self._teacher,
            batch.latent,
            batch.label,
            self._meta.shape,
            derived_seed(self.seed, "synthesis", first),
            memory=self._memory,
        )
        agreement = self._store(batch, made)
        self._terms = made.best
        self._log(batch, made, agreement)

    @torch.no_grad()
    def _store(self, batch: NoiseBatch, made: Synthesized) -> Tensor:
        """Write the images of all processes; the share of these that the teacher takes for what they shall show."""
        assert self._teacher is not None
        assert self._pool is not None
        images = in_8_bits(made.images)
        answers = self._teacher(images.to(made.images.dtype) / 255).argmax(1)
        self._pool.put(batch.index, images, batch.label, answers)
        # Waits for the other processes: whoever saves a checkpoint then has what it counts.
        last = self.trainer.strategy.reduce(batch.index[-1].clone(), reduce_op="max")
        self._pool.grow(max(len(self._pool), int(last) + 1))
        return (answers == batch.label).float().mean()

    def _log(self, batch: NoiseBatch, made: Synthesized, agreement: Tensor) -> None:
        """Log the means over processes, and keep them for pictures."""
        values = {f"first_{name}": value for name, value in made.first.items()}
        values |= {**made.best, "teacher_accuracy": agreement}
        row = torch.stack([*values.values(), *made.bn_layers]).float()
        mean = self.trainer.strategy.reduce(row, reduce_op="mean").tolist()
        means = dict(zip(values, mean, strict=False))
        log_step(self, {f"train/{name}": value for name, value in means.items()}, len(batch))
        self._history.add(images=self.progress().value, bn_layers=mean[len(values) :], **means)

    # ---- what callbacks and commands ask ----

    def progress(self) -> Progress:
        made = len(self._pool) if self._pool is not None else self._saved.get("pool", {}).get("size", 0)
        return Progress("images", made)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """train: the bank by class, distances of statistics by layer, and losses over images."""
        pool = self._bank()
        if split != "train" or not len(pool):
            return {}
        return pictures.of_bank(pool, self._facts["classes"], self._history)

    def export(self, directory: Path) -> list[Path]:
        """Write the bank that is made so far: see `lit_modules.dda.bank.write_bank`.

        Raises:
            UserError: no image is made, or the file of images is not where this run wrote it.
        """
        pool = self._bank()
        if not len(pool):
            raise UserError("source: no image is made yet, so there is no bank to export")
        labels, answers = pool.labels[: len(pool)], pool.teacher_labels[: len(pool)]
        classes, teacher = self._facts["classes"], self._facts["teacher"]
        about = {"agreement": float(np.mean(labels == answers))}
        return write_bank(directory, pool.chunks(), originals(labels, answers), classes, teacher, about)

    def _bank(self) -> ImagePool:
        """The images of this fit, or of the run whose checkpoint this module has."""
        if self._pool is not None:
            return self._pool
        if not self._saved:
            raise UserError("source: this module has made no images; it needs a fit, or the checkpoint of one")
        return ImagePool.of_state(self._saved["pool"])

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        pool = self._bank()
        checkpoint["synthesis"] = {
            "pool": pool.state_dict(),
            "facts": self._facts,
            "history": self._history.state_dict(),
            "memory": None if self._memory is None else self._memory.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint["synthesis"]
        self._facts = self._facts or self._saved["facts"]  # in a fit, those of its teacher and data
        self._history.load_state_dict(self._saved["history"])
