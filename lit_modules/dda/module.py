"""Training glue of a student without its teacher's data: hooks, manual optimisation, logging, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from leanlight.contracts import (
    Allows,
    ImageBatch,
    ImageData,
    ImageMeta,
    MediaItem,
    NetworkFactory,
    PrimaryMetric,
    Split,
    UserError,
    data_of,
    derived_seed,
    run_seed,
)
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Seed
from leanlight.ops import counter
from lit_modules.classifier import ClassifierHooks, class_index
from lit_modules.dda import pictures
from lit_modules.dda.bank import in_8_bits, teacher_digest
from lit_modules.dda.contrastive import ContrastiveMemory
from lit_modules.dda.inversion import Adversary, Inversion
from lit_modules.dda.pool import GrowingPool
from lit_modules.dda.students import (
    RECIPES,
    AlignHead,
    Recipe,
    RotationHead,
    kd_losses,
    logits_and_map,
    rotated_features,
    rotation_labels,
)
from lit_modules.dda.teacher import Teacher
from lit_modules.frozen import Frozen
from lit_modules.history import History
from lit_modules.hparams import save_hparams
from lit_modules.nn.checks import blank_output, require_positive
from lit_modules.nn.features import require_features
from lit_modules.optim import configure
from lit_modules.step_log import log_evaluation, log_step

_TERMS = ("distillation", "cross_entropy", "features", "rotations")  # of the student's loss
_SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)


class DataFreeDistillation(ClassifierHooks):
    """Distil a teacher into a student on a bank of images that stand for the teacher's data.

    The student's loss is τ² KL to the teacher (``distillation``), plus cross entropy of the class that an image was
    made for and the mean squared difference of the last maps, as `recipe` says. Validation is on held-out images of the
    bank, whose target is the teacher's answer: ``val/agreement``. Real images are in the test alone.

    With `synthesis` a pool grows beside the bank: each epoch begins with images that are inverted from the teacher and
    made hard for the present student, and trains on bank and pool together.

    Args:
        student: makes the student: float images (N, C, H, W) in [0, 1] → logits (N, K).
        teacher: the trained classifier.
        recipe: terms of the loss: ``kl``; ``kl_ce_fea``: all three, as DDA has it; ``ce``: that of the label alone.
        temperature: τ of distillation, positive.
        ce_weight: factor of the cross entropy, at least 0.
        feature_weight: factor of the difference of maps, at least 0.
        self_weight: factor of the student's own loss in the task of rotations, at least 0; 0 in the published code.
        optimizer: makes the optimiser of student and alignment; SGD with lr 0.1, momentum 0.9 and weight decay 1e-4 by
            default.
        lr_scheduler: makes the schedule of that optimiser; constant by default.
        lr_interval: what a step of the schedule follows, ``epoch`` or ``step``.
        clip: largest norm of the gradient of student and alignment; null for no limit.
        synthesis: how the images of the pool are made, a `GeneratorInversion` or `PixelInversion`; null for no pool.
        synthesis_items: images of one call of it, a process; 400 in DDA.
        synthesis_rounds: calls of it an epoch and process.
        latent_size: length of the latents that it begins with; 256 in DDA.
        head_optimizer: makes the optimiser of the rotation head, constant; the same SGD by default.
        real_data: allow real training images, for a student that is distilled or trained with the data.
        channels_last: keep images and weights in that memory format, which GPUs' tensor cores prefer.
        seed: of what is drawn here; that of ``seed_everything`` by default.
    """

    allows = Allows(precision=("32-true", "bf16-mixed"), why="gradients that float16 has scaled cannot be clipped here")

    def __init__(
        self,
        student: NetworkFactory,
        teacher: Teacher,
        recipe: Recipe = "kl_ce_fea",
        temperature: PositiveFloat = 20.0,
        ce_weight: NonNegativeFloat = 1.0,
        feature_weight: NonNegativeFloat = 30.0,
        self_weight: NonNegativeFloat = 0.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        clip: PositiveFloat | None = None,
        synthesis: Inversion | None = None,
        synthesis_items: PositiveInt = 400,
        synthesis_rounds: PositiveInt = 1,
        latent_size: PositiveInt = 256,
        head_optimizer: OptimizerCallable | None = None,
        real_data: bool = False,
        channels_last: bool = False,
        seed: Seed | None = None,
    ) -> None:
        super().__init__()
        if recipe not in RECIPES:
            raise UserError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        for name, value in (("temperature", temperature), ("clip", 1.0 if clip is None else clip)):
            if value <= 0:
                raise UserError(f"{name}: expected a positive number, got {value}")
        factors = {"ce_weight": ce_weight, "feature_weight": feature_weight, "self_weight": self_weight}
        for name, value in factors.items():
            if value < 0:
                raise UserError(f"{name}: expected at least 0, got {value}")
        require_positive(synthesis_items=synthesis_items, synthesis_rounds=synthesis_rounds, latent_size=latent_size)
        save_hparams(self)
        self.automatic_optimization = False
        self._compose(student(), optimizer or _SGD, lr_scheduler, lr_interval, channels_last)
        self.teacher, self.recipe, self.temperature, self.clip = teacher, recipe, temperature, clip
        self.weights = dict(zip(_TERMS, (1.0, *factors.values()), strict=True))
        self.synthesis, self.synthesis_items, self.synthesis_rounds = synthesis, synthesis_items, synthesis_rounds
        self.latent_size = latent_size
        self.make_head_optimizer = head_optimizer or _SGD
        self.real_data, self._given_seed = real_data, seed
        self.align: AlignHead | None = None
        self.head: RotationHead | None = None
        self._teacher: Frozen[nn.Module] | None = None
        self._logits_and_map = logits_and_map  # compiled, where that is asked for
        self._history = History()
        self._sums: Tensor | None = None  # of the values of this epoch's steps, and their number
        self._names: list[str] = []  # of these values
        self._pool: GrowingPool | None = None
        self._memory: ContrastiveMemory | None = None
        self._bank_items = 0
        self._grown_in: int | None = None  # the epoch for which the pool has grown
        self._made: dict[str, float] = {}  # what is to be logged of that
        self._resumed: dict[str, Any] | None = None

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check the data, load the teacher, make what the student is trained with."""
        data = data_of(self, ImageData)
        self._fit_to(data.meta)
        if stage == "predict":
            return
        self._teacher = self.teacher.load(data.meta)
        # A synthesis brings it into its own format, and a run that goes on inside an epoch begins with that.
        inverted = self.synthesis is not None and self.synthesis.channels_last
        memory_format = torch.channels_last if inverted else self.memory_format
        self._teacher.network.to(memory_format=memory_format)  # type: ignore[call-overload]
        if stage == "fit":
            if not (self.real_data or getattr(data, "data_free", False)):
                raise UserError(
                    f"data: expected a bank (datamodules.BankDataModule), got {type(data).__name__}, whose training "
                    "images may be the teacher's; real_data: true trains on them"
                )
            if getattr(data, "made_from", None) not in (None, teacher_digest(self._teacher.network)):
                rank_zero_warn("banks: they were made from another teacher than the student's")
            self._make_parts(data.meta)

    def _make_parts(self, meta: ImageMeta) -> None:
        """Alignment and rotation head, where they are needed and no checkpoint has brought them."""
        assert self._teacher is not None
        if self.synthesis is not None:
            self._check_synthesis(self.synthesis, meta)
        if self.recipe == "kl_ce_fea" and self.align is None:
            self.align = AlignHead(*(_map_shape(*each, meta) for each in self._both(self._teacher.network)))
        if self._needs_head and self.head is None:
            self.head = self._make_head(meta)
        if self.head is not None:
            # It has an optimiser and a backward pass of its own, and averages its gradients over processes itself.
            ignored = [f"head.{name}" for name, _ in self.head.named_parameters()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ignored)

    def _check_synthesis(self, synthesis: Inversion, meta: ImageMeta) -> None:
        assert self._teacher is not None
        synthesis.check(self._teacher.network, meta.shape, student=True)
        if (self.trainer.max_epochs or 0) < 1:
            raise UserError(
                "trainer.max_epochs: expected a positive number, since there is room for the images of so many epochs"
            )
        if synthesis.contrastive is not None and self.trainer.world_size > 1:
            raise UserError(
                "synthesis.contrastive: expected null on several processes, since each would remember its own images "
                "alone; use one process"
            )

    @property
    def _needs_head(self) -> bool:
        adversarial = self.synthesis is not None and self.synthesis.rotation_weight > 0
        return adversarial or self.weights["rotations"] > 0

    def _both(self, teacher: nn.Module) -> Sequence[tuple[str, nn.Module]]:
        return ("student", self.network), ("teacher.network", teacher)

    def _make_head(self, meta: ImageMeta) -> RotationHead:
        if meta.shape[1] != meta.shape[2]:
            raise UserError(
                f"self_weight, synthesis.rotation_weight: expected 0 for images that are not square, got shape "
                f"{tuple(meta.shape)}"
            )
        require_features(self.network)
        width = blank_output(self.network, meta.shape, "student", rotated_features).shape[1]
        return RotationHead(width, meta.num_classes, seed=self._seed("head"))

    def _seed(self, *parts: object) -> int:
        """A seed that is a function of the run's seed and what it is for: no state, so nothing to restore."""
        return derived_seed(run_seed(self._given_seed), *parts)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Of the student and its alignment."""
        return [*self.network.parameters(), *(self.align.parameters() if self.align is not None else ())]

    def configure_optimizers(self) -> Any:
        made = configure(self.trained_parameters(), self.make_optimizer, self.make_scheduler, self.lr_interval)
        configs = [made if isinstance(made, dict) else {"optimizer": made}]
        schedule = configs[0].get("lr_scheduler", {})
        if isinstance(schedule.get("scheduler"), ReduceLROnPlateau):
            raise UserError("lr_scheduler: expected one that follows steps or epochs, got one on a plateau")
        if self.head is not None:
            configs.append({"optimizer": self.make_head_optimizer(self.head.parameters())})
        return tuple(configs)

    def compile_networks(self, **options: Any) -> None:
        super().compile_networks(**options)
        self._logits_and_map = torch.compile(logits_and_map, **options)

    def on_fit_start(self) -> None:
        """Open the pool in the run folder, or go on with it."""
        self._place()
        if self.synthesis is None:
            return
        assert self._teacher is not None
        meta, resumed = data_of(self, ImageData).meta, self._resumed
        self._bank_items = meta.counts["train"]
        capacity = self._grown_size(self.trainer.max_epochs or 0)
        folder = Path(self.trainer.default_root_dir) / "pool"
        self._pool = GrowingPool(folder, capacity, meta.shape, self.global_rank, self.trainer.world_size)
        self._memory = self.synthesis.memory(self._teacher, meta.shape, self._seed("memory"))
        if resumed is None:
            self._grown_in = None
        else:
            self._pool.take_over(resumed["pool"])
            self.trainer.strategy.barrier()
            self._pool.grow(resumed["pool"]["size"])
            if self._memory is not None:
                self._memory.load_state_dict(resumed["memory"])
        self._resumed = None

    def _grown_size(self, epochs: int) -> int:
        """Images that a process has made for so many epochs."""
        return epochs * self.synthesis_rounds * self.synthesis_items

    def on_train_start(self) -> None:
        if self._sums is not None:  # of a run that goes on inside an epoch: checkpoints are read on the CPU
            self._sums = self._sums.to(self.device)

    def on_validation_epoch_start(self) -> None:
        self._place()
        super().on_validation_epoch_start()

    def on_test_epoch_start(self) -> None:
        self._place()
        super().on_test_epoch_start()

    def _place(self) -> None:
        """The teacher belongs to no module that Lightning would move."""
        assert self._teacher is not None
        self._teacher.to(self.device)

    # ---- the pool ----

    def on_before_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Put images of the pool into a training batch, to be scaled and augmented as those of the bank.

        Here, and not where an epoch starts, the pool grows: a checkpoint may lie before it, and after it.
        """
        if self._pool is None or not self.trainer.training:
            return batch
        if self._grown_in != self.current_epoch:
            self._grow(self._pool)
        return self._pool.mix(batch, self._bank_items, self._seed("mix", self.global_step, self.global_rank))

    def _grow(self, pool: GrowingPool) -> None:
        """Make the images of this epoch, and let the head begin anew."""
        start = self._grown_size(self.current_epoch)
        made = [self._synthesize(pool, start, number) for number in range(self.synthesis_rounds)]
        self.trainer.strategy.barrier()
        pool.grow(self._grown_size(self.current_epoch + 1))
        if self.head is not None:
            self.head.reset(self._seed("head", self.current_epoch))
        means = torch.stack([torch.stack([values[name] for name in made[0]]) for values in made]).mean(0)
        self._made = dict(zip(made[0], means.tolist(), strict=True)) | {"pool_items": float(len(pool))}
        self._grown_in = self.current_epoch

    def _synthesize(self, pool: GrowingPool, start: int, number: int) -> dict[str, Tensor]:
        """One call of the synthesis against the present student; what is to be told of it.

        Images are numbered through all epochs, calls and processes, and their latents and classes follow from that.
        """
        assert self.synthesis is not None
        assert self._teacher is not None
        call = (self.current_epoch * self.synthesis_rounds + number) * self.trainer.world_size + self.global_rank
        index = torch.arange(call * self.synthesis_items, (call + 1) * self.synthesis_items, device=self.device)
        latent = counter.noise(self._seed("pool"), index, self.latent_size)
        label = counter.labels(self._seed("pool"), index, len(self.evaluation.classes))
        made = self.synthesis(
            self._teacher,
            latent,
            label,
            pool.shape,
            self._seed("synthesis", call),
            Adversary(self.network, self.head),
            self._memory,
        )
        images = in_8_bits(made.images)
        answer = self._answer(images / 255).argmax(1)
        pool.put(start + number * self.synthesis_items, images, label, answer)
        agreement = (answer == label).float().mean()
        return {f"pool_{name}": value.float() for name, value in made.best.items()} | {"pool_agreement": agreement}

    # ---- steps ----

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        if self._pool is not None and self._grown_in != self.current_epoch:
            raise UserError(
                "data: expected a DataModule without an on_before_batch_transfer of its own, beside synthesis; got "
                f"{type(self.trainer.datamodule).__name__}"  # type: ignore[attr-defined]
            )
        values = self._step_student(batch)
        if self.head is not None:
            values |= self._step_head(batch)
        self._terms = values
        self._add_to_epoch(values)
        log_step(self, {f"train/{name}": value for name, value in values.items()}, len(batch), over_processes=True)

    def _step_student(self, batch: ImageBatch) -> dict[str, Tensor]:
        """One step of the student's optimiser; the terms of its loss and its agreement with the teacher."""
        terms, agreement = self._losses(batch)
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        optimizer = self._optimizers()[0]
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.trained_parameters(), self.clip)
        optimizer.step()
        if self.lr_interval == "step":
            self._step_schedule()
        self._share_buffers()
        values = {"loss": loss, **terms} | ({} if agreement is None else {"agreement": agreement})
        return {name: value.detach() for name, value in values.items()}

    def _losses(self, batch: ImageBatch) -> tuple[dict[str, Tensor], Tensor | None]:
        """The terms of the student's loss; the share of its answers that are the teacher's, where that is asked."""
        image = self._laid_out(batch.image)
        maps: tuple[Tensor, Tensor] | None = None
        answer: Tensor | None = None
        if self.recipe == "kl_ce_fea":
            assert self._teacher is not None
            assert self.align is not None
            with torch.no_grad():
                answer, theirs = self._logits_and_map(self._teacher.network, image)
            logits, ours = self._logits_and_map(self.network, image)
            maps = self.align(ours).float(), theirs.float()
        else:
            if self.recipe == "kl":
                answer = self._answer(image)
            logits = self.network(image)
        logits = logits.float()
        target = logits.detach() if answer is None else answer.float()
        terms = kd_losses(self.recipe, logits, target, batch.label, self.temperature, maps, batch.weight)
        if self.weights["rotations"] > 0:
            terms["rotations"] = self._rotation_loss(rotated_features(self.network, image), batch)[0]
        return terms, None if answer is None else (logits.argmax(1) == answer.argmax(1)).float().mean()

    @torch.no_grad()
    def _answer(self, image: Tensor) -> Tensor:
        """Logits (N, K) of the teacher."""
        assert self._teacher is not None
        return self._teacher(self._laid_out(image))

    def _rotation_loss(self, features: Tensor, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Cross entropy of class and rotation, and the share told right. The head computes in float32."""
        assert self.head is not None
        label = rotation_labels(class_index(batch.label))
        with torch.autocast(self.device.type, enabled=False):
            logits = self.head(features.float())
        return F.cross_entropy(logits, label), (logits.detach().argmax(1) == label).float().mean()

    def _step_head(self, batch: ImageBatch) -> dict[str, Tensor]:
        """One step of the rotation head on the student as it is now, which gets no gradient and changes nothing."""
        with torch.no_grad():
            features = rotated_features(self.network, self._laid_out(batch.image))
        loss, accuracy = self._rotation_loss(features, batch)
        # Lightning's wrapper would count this step, too, and `step` would grow by two a batch.
        optimizer = self._optimizers()[1].optimizer
        optimizer.zero_grad()
        loss.backward()
        self._average_head()
        optimizer.step()
        return {"head_loss": loss.detach(), "head_accuracy": accuracy}

    def _optimizers(self) -> list[Any]:
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    # ---- several processes ----

    def _average_head(self) -> None:
        """Give every process the mean of the head's gradients."""
        if self.trainer.world_size > 1:
            assert self.head is not None
            gradients = [parameter.grad for parameter in self.head.parameters() if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            _spread(self.trainer.strategy.reduce(flat, reduce_op="mean"), gradients)

    @torch.no_grad()
    def _share_buffers(self) -> None:
        """Give every process rank zero's running statistics, which DDP forgets to under manual optimisation."""
        if self.trainer.world_size > 1:
            parts = [self.network, *([] if self.align is None else [self.align])]
            buffers = [buffer for part in parts for buffer in part.buffers() if buffer.is_floating_point()]
            if buffers:
                flat = torch.cat([buffer.flatten() for buffer in buffers])
                dist.broadcast(flat, 0)
                _spread(flat, buffers)

    # ---- epochs ----

    def _step_schedule(self) -> None:
        if (schedule := self.lr_schedulers()) is not None:
            assert not isinstance(schedule, (list, ReduceLROnPlateau))
            schedule.step()

    def _add_to_epoch(self, values: Mapping[str, Tensor]) -> None:
        self._names = [*values, "steps"]
        row = torch.stack([*values.values(), torch.ones((), device=self.device)])
        self._sums = row if self._sums is None else self._sums + row

    def on_train_epoch_end(self) -> None:
        if self.lr_interval == "epoch":
            self._step_schedule()
        if self._sums is not None:
            *sums, steps = self._sums.tolist()
            means = {name: total / steps for name, total in zip(self._names, sums, strict=False)}
            measured = self.trainer.callback_metrics.get("val/agreement")
            means["val_agreement"] = float("nan") if measured is None else float(measured)
            self._history.add(epoch=self.current_epoch + 1, **means, **self._made)
            self.log_dict({f"train/{name}": value for name, value in self._made.items()}, sync_dist=True)
        self._sums = None

    def evaluate(self, batch: ImageBatch, split: Split) -> None:
        """Measure a batch: of validation against the teacher's answers, of test against labels and answers."""
        logits, answer = self(batch.image), self._answer(batch.image).argmax(1)
        if split == "val":
            values = dict(self.evaluation.update(split, batch.image, logits, answer))
            values["val/agreement"] = values.pop("val/accuracy")
        else:
            values = dict(self.evaluation.update(split, batch.image, logits, batch.label))
            values["test/agreement"] = (logits.argmax(1) == answer).float().mean()
        log_evaluation(self, values, len(batch))

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/agreement", "max")

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """train: the student over epochs, its agreement by class, the newest images of the pool.

        val, test: see `ClassifierEvaluation.media`.
        On validation images the true class is the teacher's answer.
        """
        if split != "train":
            return super().media(split)
        items = pictures.of_student(self._history, self.weights)
        if (confusion := self.evaluation.confusion.get("val")) is not None:
            items |= pictures.agreement(confusion, self.evaluation.classes)
        if self._pool is not None and len(self._pool):
            newest = torch.arange(max(0, len(self._pool) - pictures.SHOWN), len(self._pool))
            items |= pictures.pool(*self._pool.read(newest), self.evaluation.classes)
        return items

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["student"] = {
            "align": None if self.align is None else list(self.align.shapes),
            "head": None if self.head is None else [self.head.hidden.in_features, len(self.evaluation.classes)],
            "history": self._history.state_dict(),
            "sums": self._sums,
            "grown_in": self._grown_in,
            "made": self._made,
            "pool": None if self._pool is None else self._pool.state_dict(),
            "memory": None if self._memory is None else self._memory.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["student"]
        if state["align"] is not None and self.align is None:
            self.align = AlignHead(*state["align"])
        if state["head"] is not None and self.head is None:
            self.head = RotationHead(*state["head"])
        self._history.load_state_dict(state["history"])
        self._sums, self._grown_in, self._made = state["sums"], state["grown_in"], dict(state["made"])
        self._resumed = state if state["pool"] is not None else None


def _map_shape(argument: str, network: nn.Module, meta: ImageMeta) -> tuple[int, int, int]:
    """(C, H, W) of the last map of a network; UserError for one without."""
    try:
        require_features(network)
    except UserError as error:
        raise UserError(f"{argument}: recipe kl_ce_fea compares last maps; {error}") from error
    found = blank_output(network, meta.shape, argument, lambda net, image: net.forward_features(image))  # type: ignore[operator]
    if found.ndim != 4:
        raise UserError(
            f"{argument}: expected a network whose last features are maps, for recipe kl_ce_fea; those of "
            f"{type(network).__name__} have shape {tuple(found.shape)}"
        )
    return found.shape[1], found.shape[2], found.shape[3]


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Cut a vector up into tensors that are there."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
