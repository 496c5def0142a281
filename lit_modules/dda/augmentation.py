"""Glue of the stage that varies a bank: predictions by item, and the bank of variations that they end in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from leanlight.contracts import (
    Allows,
    ImageBatch,
    InMemoryImages,
    MediaItem,
    Split,
    UserError,
    data_of,
    derived_seed,
    predicted_origin,
    run_seed,
)
from leanlight.contracts.ranges import FiniteFloat, PositiveInt, PositiveShare
from lit_modules.dda import pictures
from lit_modules.dda.bank import ImagePool, in_8_bits, teacher_digest, write_bank
from lit_modules.dda.diffusion import Backend, Variations
from lit_modules.dda.filtering import cosine_scores, keep_above, keep_top
from lit_modules.dda.sampling import in_chunks
from lit_modules.dda.teacher import Teacher
from lit_modules.frozen import Frozen
from lit_modules.hparams import save_hparams
from lit_modules.nn import pooled_features
from lit_modules.nn.checks import blank_output, require_positive

Encoder = Literal["clip", "teacher"]
Mode = Literal["threshold", "top_fraction"]
_CHUNK = 256  # images that are embedded and judged at once


class DiffusionAugmentation(LightningModule):
    """Vary the images of a bank, score each variation against its source, and keep those that stay near it (DDA).

    `predict` over a BankDataModule makes the variations; what it wrote is collected into a bank of its own, with every
    variation, its score, and whether it is kept. Of a source all of whose variations drop out, the original is left.

    Args:
        teacher: of the distillation; it says which class it takes each variation for.
        backend: what varies images, of `lit_modules.dda`: ImageVariation, ImageToImage, Tiny or Identity.
        k: variations of each image (K).
        encoder: whose embeddings the filter compares: ``teacher``: its pooled features; ``clip``: those that a
            back-end with CLIP goes by.
        center: whether to take the mean embedding of the bank from all embeddings first: the teacher's features are
            not negative, and raw cosines crowd high.
        mode: ``threshold`` keeps what scores at least `omega`, ``top_fraction`` the best `fraction` of all.
        omega: smallest score that is kept (ω), in [-1, 1].
        fraction: share of all variations that is kept, in (0, 1].
    """

    allows = Allows()

    def __init__(
        self,
        teacher: Teacher,
        backend: Backend,
        k: PositiveInt = 4,
        encoder: Encoder = "teacher",
        center: bool = True,
        mode: Mode = "threshold",
        omega: FiniteFloat = 0.6,
        fraction: PositiveShare = 0.5,
    ) -> None:
        super().__init__()
        require_positive(k=k)
        for name, given, known in (("encoder", encoder, get_args(Encoder)), ("mode", mode, get_args(Mode))):
            if given not in known:
                raise UserError(f"{name}: expected one of {', '.join(known)}, got {given!r}")
        if not -1 <= omega <= 1:
            raise UserError(f"omega: expected a number in [-1, 1], since no cosine lies outside; got {omega}")
        if not 0 < fraction <= 1:
            raise UserError(f"fraction: expected a number above 0 and at most 1, got {fraction}")
        save_hparams(self)
        self.teacher, self.backend, self.k = teacher, backend, k
        self.encoder, self.center = encoder, center
        self.mode, self.omega, self.fraction = mode, omega, fraction
        self._teacher: Frozen[nn.Module] | None = None
        self._variations: Variations | None = None
        self._mean: Tensor | None = None
        self._pictures: dict[str, MediaItem] = {}

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check the data; load teacher and back-end onto the device."""
        data = data_of(self, InMemoryImages)
        if not getattr(data, "data_free", False):
            raise UserError(f"data: expected a BankDataModule, whose images are varied; got a {type(data).__name__}")
        if self._split() == "test":
            raise UserError("predict_split: expected train, since the images of test are real ones; got test")
        if getattr(data, "originals_sha256", None) is None:
            raise UserError("instead: expected a bank to vary, got a control in its place")
        if len(getattr(data, "folders", ())) > 1:
            raise UserError("banks: expected one, of the originals that are varied; variations are not varied again")
        device = self.trainer.strategy.root_device
        self._teacher = self.teacher.load(data.meta)
        blank_output(self._teacher.network, data.meta.shape, "teacher", pooled_features)
        self._variations = self.backend.prepare(data.meta, self._teacher.to(device), device)
        if self.encoder == "clip" and self._variations.embed is None:
            raise UserError(f"encoder: expected teacher, since {type(self.backend).__name__} has no CLIP; got clip")

    def _split(self) -> Split:
        return self.trainer.datamodule.predict_split  # type: ignore[attr-defined]

    def _images(self) -> Tensor:
        """(N, C, H, W) uint8: the images that are varied."""
        data = data_of(self, InMemoryImages)
        split = data.train_split if self._split() == "train" else data.val_split
        assert split is not None  # the loader has asked for it
        return split.images

    # ---- predictions ----

    def on_predict_start(self) -> None:
        """Learn the mean embedding, on every process alike."""
        if not self.center:
            return
        images = self._images()
        rank_zero_info(f"mean embedding of {len(images):,} images, by {self.encoder}")
        total = sum(self._embed(piece.to(self.device).float() / 255).double().sum(0) for piece in images.split(_CHUNK))
        self._mean = torch.as_tensor(total) / len(images)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``index``, ``origin``, ``label`` (N,), ``image`` (N, K, C, H, W) uint8, and (N, K) of each
        variation: ``seed``, ``score``, ``teacher_label``.

        Scores and classes are of the 8-bit image, as the student will see it.
        """
        assert self._teacher is not None
        assert self._variations is not None
        origin = predicted_origin(self, batch.index)
        seeds = self._seeds(origin.get("origin", batch.index))
        made = in_8_bits(self._variations.vary(batch.image, batch.label, seeds).clamp(0, 1))
        seen = made.flatten(0, 1).float() / 255
        source = in_8_bits(batch.image).float() / 255  # as `seen`, so that equal images are equal bit by bit
        features = self._embed(torch.cat([source, seen]))
        own, others = features[: len(batch)], features[len(batch) :].unflatten(0, seeds.shape)
        logits = in_chunks(self._teacher, _CHUNK, seen)
        return {
            "index": batch.index,
            **origin,
            "label": batch.label,
            "image": made,
            "seed": seeds,
            "score": cosine_scores(own, others, self._mean),
            "teacher_label": logits.argmax(1).view(seeds.shape),
        }

    def _seeds(self, source: Tensor) -> Tensor:
        """(N, K): a function of the run's seed, the source's number in its bank, and k."""
        numbers = [
            [derived_seed(run_seed(), "variation", item, k) for k in range(1, self.k + 1)] for item in source.tolist()
        ]
        return torch.tensor(numbers, dtype=torch.int64)

    @torch.no_grad()
    def _embed(self, image: Tensor) -> Tensor:
        """(N, D) embeddings of images (N, C, H, W) in [0, 1], for the filter."""
        assert self._teacher is not None
        assert self._variations is not None
        if self.encoder == "clip":
            assert self._variations.embed is not None
            return self._variations.embed(image)
        network = self._teacher.network
        return in_chunks(lambda piece: pooled_features(network, piece), _CHUNK, image)

    # ---- the bank ----

    def collect(self, pieces: Callable[[], Iterator[Mapping[str, Any]]], directory: Path) -> dict[str, float]:
        """Filter all variations and write their bank: see `leanlight.contracts.CollectsPredictions`.

        Returns:
            ``kept``, share of the variations; mean ``score``; ``agreement``, the share that the teacher takes for their
            source's class, of all, and ``agreement_kept`` and ``agreement_dropped``, of those.
        """
        data = data_of(self, InMemoryImages)
        columns = _gathered(pieces())
        score, label = columns["score"], columns["label"][:, None].expand(-1, self.k)
        kept = keep_above(score, self.omega) if self.mode == "threshold" else keep_top(score, self.fraction)
        numbers = _numbers(score, columns["teacher_label"] == label, kept)
        if not kept.any():
            rank_zero_warn(
                f"omega: {self.omega} keeps none of {kept.numel():,} variations, whose highest score is "
                f"{score.max():.4g}: originals alone are left"
            )
        k = torch.arange(1, self.k + 1).expand_as(score)
        rows = {
            "item": torch.arange(score.numel()),
            "source": columns["origin"][:, None].expand_as(score),
            "k": k,
            "seed": columns["seed"],
            "score": score,
            "kept": kept.long(),
            "label": label,
            "teacher_label": columns["teacher_label"],
        }
        assert self._teacher is not None
        about = {
            "source_sha256": data.originals_sha256,  # type: ignore[attr-defined]  # `setup` has asked
            "backend": type(self.backend).__name__,
            "encoder": self.encoder,
            "center": self.center,
            **({"omega": self.omega} if self.mode == "threshold" else {"fraction": self.fraction}),
            **numbers,
        }
        pool = _in_order(pieces, columns["index"], directory / ".images", self.k, data.meta.shape)
        flat = {name: column.flatten().numpy() for name, column in rows.items()}
        write_bank(directory, pool.chunks(), flat, data.meta.classes, teacher_digest(self._teacher.network), about)
        self._pictures = self._draw(pool, columns, kept)
        pool.delete()
        return numbers

    def _draw(self, pool: ImagePool, columns: Mapping[str, Tensor], kept: Tensor) -> dict[str, MediaItem]:
        """Some sources with their variations, at even distances, and what the filter did."""
        rows = torch.linspace(0, len(kept) - 1, min(pictures.SOURCES, len(kept))).long()
        positions = (rows[:, None] * self.k + torch.arange(self.k)).flatten()
        varied = pool.read(positions)[0].unflatten(0, (len(rows), self.k))
        source = self._images()[columns["index"][rows]]
        agrees = columns["teacher_label"] == columns["label"][:, None]
        return {
            "variations": pictures.variations(source, varied, columns["score"][rows], kept[rows]),
            "scores": pictures.scores(columns["score"], kept),
            "label_agreement": pictures.label_agreement(agrees, kept),
        }

    # ---- what callbacks and commands ask ----

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """test: what `collect` found: sources with their variations, scores, label agreement; nothing before."""
        return self._pictures if split == "test" else {}


def _gathered(pieces: Iterator[Mapping[str, Any]]) -> dict[str, Tensor]:
    """All of the predictions but their images, in order of their items."""
    parts = [{name: value for name, value in piece.items() if name != "image"} for piece in pieces]
    if not parts:
        raise UserError("data: expected images to vary, got none")
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = columns["index"].argsort()
    return {"origin": columns["index"][order]} | {name: column[order] for name, column in columns.items()}


def _in_order(
    pieces: Callable[[], Iterator[Mapping[str, Any]]], index: Tensor, folder: Path, k: int, shape: tuple[int, ...]
) -> ImagePool:
    """The images of all pieces in a file, in order of their items: processes and resumed runs write them in another.

    index: (N,) int64, sorted.
    """
    pool = ImagePool(folder, len(index) * k, shape)
    for piece in pieces():
        rows = torch.searchsorted(index, piece["index"].contiguous())
        positions = (rows[:, None] * k + torch.arange(k)).flatten()
        pool.put(positions, piece["image"].flatten(0, 1), piece["label"].repeat_interleave(k))
    pool.grow(len(index) * k)
    return pool


def _numbers(score: Tensor, agrees: Tensor, kept: Tensor) -> dict[str, float]:
    """What the filter did, by name; shares of nothing are left out."""
    numbers = {
        "kept": float(kept.double().mean()),
        "score": float(score.double().mean()),
        "agreement": float(agrees.double().mean()),
        "agreement_kept": float(agrees[kept].double().mean()),
        "agreement_dropped": float(agrees[~kept].double().mean()),
    }
    return {name: value for name, value in numbers.items() if not math.isnan(value)}
