"""Training glue of dataset distillation: hooks, manual optimisation, evaluation, logging, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from leanlight.contracts import (
    Allows,
    ImageBatch,
    ImageData,
    ImageSplit,
    InMemoryImages,
    MediaItem,
    NetworkFactory,
    PrimaryMetric,
    Progress,
    Split,
    UserError,
    data_of,
    derived_seed,
    isolated_rng,
    run_seed,
)
from leanlight.contracts.ranges import FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt, Seed, UnitInterval
from lit_modules.at_bptt import pictures
from lit_modules.at_bptt.clipping import clip_by_average
from lit_modules.at_bptt.distillers import Distiller, FixedSet, Task, TruncatedBPTT
from lit_modules.at_bptt.evaluation import Evaluation, Processes, TrainedNetworks, hard_labels, scores_on_test
from lit_modules.at_bptt.export import export_set
from lit_modules.at_bptt.inner import SyntheticData
from lit_modules.at_bptt.preprocessing import Preprocess, Preprocessing
from lit_modules.at_bptt.synthetic import Start, noise_images, one_hot_labels, real_images
from lit_modules.classifier.losses import class_index
from lit_modules.classifier.training import LabelledImages, Recipe
from lit_modules.history import History
from lit_modules.hparams import save_hparams
from lit_modules.nn.checks import check_classifier
from lit_modules.selection import random_subset
from lit_modules.step_log import log_step


class DatasetDistillation(LightningModule):
    """Learn a few synthetic images a class on which fresh networks train well (AT-BPTT and its family).

    One batch of real images is one outer step; the parameters are the images (num_classes * ipc, C, H, W), class by
    class, and, with learn_labels, non-negative soft labels (num_classes * ipc, num_classes). Both live in preprocessed
    space.

    Args:
        network: makes the inner network, preprocessed images → logits; no batch norm, and mean 0, std 1 of its own.
        image_shape: (C, H, W) of the data.
        num_classes: number of classes of the data.
        ipc: synthetic images per class; 1, 10 or 50 in the paper.
        distiller: what an outer step computes; TruncatedBPTT with AdaptiveWindow (AT-BPTT) by default.
        learn_labels: learn soft labels too; else they stay one-hot.
        start: first images: ``noise`` (paper), or real ones, ``random`` or by ``herding``.
        optimizer: of the outer level; Adam with lr 1e-3 by default, as in the paper for CIFAR.
        clip: clip the images' gradient to this many times the moving average of its norm, null for never.
        clip_decay: share of the old average in that moving average, in [0, 1].
        preprocess: space of the set: ``zca`` whitening fitted on the training images (paper), or ``standardize``.
        zca_strength: of the whitening's regularisation, as a share of the mean eigenvalue.
        mean: of ``standardize``, pixels in [0, 1], one number or one a channel.
        std: of ``standardize``, pixels in [0, 1], one number or one a channel.
        inner_runs: inner runs averaged in one outer step of a process, each with its share of the batch.
        evaluation: how the set is evaluated: number of fresh networks, epochs, recipe.
        architectures: further networks, by name, that the test trains on the set.
        compare_with_random: also test random real images of the same number.
        full_recipe: recipe with which the test also trains on all real images, for the HLR score; null for not.
        seed: of everything drawn here; that of ``seed_everything`` by default.
    """

    allows = Allows(precision=("32-true",), why="inner steps are differentiated twice")
    automatic_optimization = False

    def __init__(
        self,
        network: NetworkFactory,
        image_shape: tuple[PositiveInt, PositiveInt, PositiveInt],
        num_classes: PositiveInt = 10,
        ipc: PositiveInt = 10,
        distiller: Distiller | None = None,
        learn_labels: bool = False,
        start: Start = "noise",
        optimizer: OptimizerCallable | None = None,
        clip: PositiveFloat | None = 2.0,
        clip_decay: UnitInterval = 0.9,
        preprocess: Preprocess = "zca",
        zca_strength: NonNegativeFloat = 0.1,
        mean: FiniteFloat | Sequence[FiniteFloat] = 0.0,
        std: PositiveFloat | Sequence[PositiveFloat] = 1.0,
        inner_runs: PositiveInt = 1,
        evaluation: Evaluation | None = None,
        architectures: dict[str, NetworkFactory] | None = None,
        compare_with_random: bool = True,
        full_recipe: Recipe | None = None,
        seed: Seed | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("ipc", ipc), ("num_classes", num_classes), ("inner_runs", inner_runs)):
            if value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        if clip is not None and clip <= 0:
            raise UserError(f"clip: expected a positive number or null, got {clip}")
        save_hparams(self)
        self.make_network, self.num_classes, self.ipc = network, num_classes, ipc
        self.image_shape: tuple[int, int, int] = tuple(image_shape)  # type: ignore[assignment]  # a config gives a list
        self.distiller = distiller or TruncatedBPTT()
        self.learn_labels, self.start, self.make_optimizer = learn_labels, start, optimizer
        self.clip, self.clip_decay, self.inner_runs = clip, clip_decay, inner_runs
        self.evaluation = evaluation or Evaluation()
        self.architectures = dict(architectures or {})
        self.compare_with_random, self.full_recipe = compare_with_random, full_recipe
        self.seed = run_seed(seed)
        self.images = nn.Parameter(torch.zeros(num_classes * ipc, *self.image_shape))
        self.labels = nn.Parameter(one_hot_labels(num_classes, ipc), requires_grad=learn_labels)
        self.preprocessing = Preprocessing(preprocess, self.image_shape, zca_strength, mean, std)
        self.gradient_ema: Tensor
        self.register_buffer("gradient_ema", torch.tensor(torch.nan))
        self.classes: tuple[str, ...] = ()
        self.scores: dict[str, float] = {}
        self.best_epochs: int | None = None  # training epochs that were best on validation data
        self.history = History()
        self._restored = False  # whether this fit goes on from a checkpoint
        self._chosen_in: int | None = None  # the epoch of the distiller's present choice
        self._epoch_sums: Tensor | None = None  # accuracy and number of outer steps of this epoch
        self._terms: dict[str, Tensor] = {}
        self._compile: dict[str, Any] | None = None  # options of `torch.compile` for evaluation networks
        self._trained: TrainedNetworks | None = None  # while an evaluation runs

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check the data; tell the distiller what it is about."""
        self._check_data(stage)
        if stage != "fit":
            return
        epochs = self.trainer.max_epochs
        if not isinstance(self.distiller, FixedSet) and (epochs is None or epochs < 1):
            raise UserError("trainer.max_epochs: expected a positive number, since stages are shares of it")
        device = self.trainer.strategy.root_device
        task = Task(self.make_network, self.num_classes, self.ipc, epochs or 1, self.learn_labels, device)
        self.distiller.prepare(task)
        self._restored = False

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Fit the preprocessing, on one process, and make the first images; a resumed run has both."""
        if self._restored:
            return
        if self.preprocessing.kind == "zca":
            if self.global_rank == 0:
                self.preprocessing.fit(self._real_images().images)
            whitening = self.preprocessing.whitening
            whitening.copy_(self.trainer.strategy.broadcast(whitening.cpu()))
        self.images.copy_(self._first_images())
        self.labels.copy_(one_hot_labels(self.num_classes, self.ipc))

    def _check_data(self, stage: str) -> None:
        meta = data_of(self, ImageData).meta
        for name, expected, got in (
            ("image_shape", tuple(meta.shape), self.image_shape),
            ("num_classes", meta.num_classes, self.num_classes),
        ):
            if expected != got:
                raise UserError(f"{name}: expected {expected}, that of the data; got {got}")
        self.classes = tuple(meta.classes)
        with isolated_rng(0):
            check_classifier(self.make_network(), self.image_shape, self.num_classes)
        if stage in ("fit", "test"):
            self._check_real_images(stage, min(meta.class_counts))

    def _check_real_images(self, stage: str, smallest_class: int) -> None:
        """Refuse, before anything is trained, what needs real images in memory, or more of them than there are."""
        fitting = stage == "fit"
        start, random = fitting and self.start != "noise", self.compare_with_random
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for needed, setting, instead in (
            (fitting and self.preprocessing.kind == "zca", "preprocess: zca", "standardize"),
            (start, f"start: {self.start}", "noise"),
            (random, "compare_with_random: true", "false"),
            (self.full_recipe is not None, "full_recipe: training on all real images", "null"),
        ):
            if needed and not isinstance(data, InMemoryImages):
                raise UserError(
                    f"{setting} needs images held in memory, and {type(data).__name__} streams them; use {instead}"
                )
        if (start or random) and self.ipc > smallest_class:
            raise UserError(f"ipc: expected at most {smallest_class}, the images of the smallest class; got {self.ipc}")

    def _real_images(self) -> ImageSplit:
        return data_of(self, InMemoryImages).train_split

    def _first_images(self) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed("start"))
        if self.start == "noise":
            return noise_images(len(self.images), self.image_shape, generator)
        real, prepare = self._real_images(), copy.deepcopy(self.preprocessing).cpu()  # where the images are
        return real_images(self.start, real.images, real.labels, self.num_classes, self.ipc, prepare, generator)

    def _seed(self, purpose: str, *numbers: int) -> int:
        """A seed that is a function of the run's seed and what it is for: no state, so nothing to restore."""
        return derived_seed(self.seed, purpose, *numbers)

    def compile_networks(self, **options: Any) -> None:
        """Compile the networks of evaluations; inner steps are differentiated twice, which compiled code cannot be."""
        self._compile = options

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [self.images, self.labels] if self.learn_labels else [self.images]
        make = self.make_optimizer or (lambda params: torch.optim.Adam(params, lr=1e-3))
        return make(parameters)

    def on_train_start(self) -> None:
        if self._epoch_sums is not None:  # of a run that goes on inside an epoch: checkpoints are read on the CPU
            self._epoch_sums = self._epoch_sums.to(self.device)

    # ---- outer steps ----

    @property
    def data(self) -> SyntheticData:
        """The set, without a graph."""
        return SyntheticData(self.images.detach(), self.labels.detach())

    def forward(self, image: Tensor) -> Tensor:
        """Images in [0, 1] → the space in which the set lives."""
        return self.preprocessing(image)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        if self._chosen_in != self.current_epoch:
            self._start_epoch()
        images, labels, loss, accuracy = self._mean_step(batch)
        norm = images.norm()
        if self.clip is not None:
            images, average = clip_by_average(images, norm, self.gradient_ema, self.clip, self.clip_decay)
            self.gradient_ema.copy_(average)
        self.images.grad = images
        if self.learn_labels:
            self.labels.grad = labels
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        with torch.no_grad():
            self.labels.clamp_(min=0)
        assert self._epoch_sums is not None
        self._epoch_sums += torch.stack([accuracy, torch.ones_like(accuracy)])
        self._terms = {"outer_loss": loss, "gradient_norm": norm}
        values = {"loss": loss, "accuracy": accuracy, "gradient_norm": norm, **self.distiller.metrics()}
        log_step(self, {f"train/{name}": value for name, value in values.items()}, len(batch))

    def _mean_step(self, batch: ImageBatch) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Gradients of images and labels, loss and accuracy, averaged over inner runs and processes."""
        runs = []
        parts = zip(batch.image.chunk(self.inner_runs), class_index(batch.label).chunk(self.inner_runs), strict=True)
        for number, (image, label) in enumerate(parts):
            seed = self._seed("step", self.global_step, self.global_rank * self.inner_runs + number)
            runs.append(self.distiller.outer_step(self.data, self.preprocessing(image), label, seed))
        reduce = self.trainer.strategy.reduce
        mean = [
            reduce(torch.stack(values).mean(0), reduce_op="mean")
            for values in zip(*((run.images, run.loss, run.accuracy) for run in runs), strict=True)
        ]
        labels = [run.labels for run in runs if run.labels is not None]
        label_gradient = reduce(torch.stack(labels).mean(0), reduce_op="mean") if labels else None
        return mean[0], label_gradient, mean[1], mean[2]

    def _start_epoch(self) -> None:
        """Let rank 0 choose and tell the others."""
        if self.global_rank == 0:
            self.distiller.start_epoch(self.data, self._seed("epoch", self.current_epoch))
        self.distiller.choice = self.trainer.strategy.broadcast(self.distiller.choice)
        self._chosen_in = self.current_epoch
        self._epoch_sums = torch.zeros(2, device=self.device)
        self.history.add(outer_step=float(self.global_step), **self.distiller.metrics())

    def on_train_epoch_end(self) -> None:
        if self._epoch_sums is not None:
            right, count = self._epoch_sums.tolist()
            self.distiller.end_epoch(100 * right / count)

    # ---- evaluation: fresh networks trained on the set ----

    def _start_evaluation(self) -> TrainedNetworks:
        # "judge" is part of the seeds: another word would be other networks.
        seeds = [self._seed("judge", number) for number in range(self.evaluation.networks)]
        self._trained = TrainedNetworks(seeds, self.device, cast(Processes, self.trainer.strategy))
        return self._trained

    def _judge(self, make: NetworkFactory) -> NetworkFactory:
        """The factory, its networks compiled where that is asked for."""
        options = self._compile
        if options is None:
            return make

        def compiled() -> nn.Module:
            network = make()
            network.compile(**options)
            return network

        return compiled

    def on_validation_epoch_start(self) -> None:
        trained, evaluation = self._start_evaluation(), self.evaluation
        if not self.trainer.sanity_checking:
            data = self.images.detach(), self.labels.detach()
            trained.train("set", data, self._judge(self.make_network), evaluation.full_recipe, evaluation.epochs)
            trained.exchange()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._count(batch)

    def on_validation_epoch_end(self) -> None:
        assert self._trained is not None
        accuracies, self._trained = self._trained.accuracies(), None
        if "set" not in accuracies:
            return
        accuracy = accuracies["set"].mean(1)
        best = int(accuracy.argmax())
        self.best_epochs = self.evaluation.epochs[best]
        values = {"val/accuracy": float(accuracy[best]), "val/best_epochs": float(self.best_epochs)}
        for epochs, value in zip(self.evaluation.epochs, accuracy.tolist(), strict=True):
            values[f"val/accuracy_{epochs}"] = value
        self.log_dict(values)
        self.scores.update(values)
        self.history.add(val_outer_step=float(self.global_step), val_accuracy=values["val/accuracy"])

    def on_test_epoch_start(self) -> None:
        trained, images, labels = self._start_evaluation(), self.images.detach(), self.labels.detach()
        runs: dict[str, tuple[LabelledImages, NetworkFactory]] = {"set": ((images, labels), self.make_network)}
        for name, make in self.architectures.items():
            runs[f"on_{name}"] = (images, labels), make
        if self.learn_labels or self.full_recipe:
            runs["hard_labels"] = (images, hard_labels(labels)), self.make_network
        if self.compare_with_random:
            runs["random"] = self._random_set(), self.make_network
        for name, (data, make) in runs.items():
            trained.train(name, data, self._judge(make), self.evaluation.full_recipe, self.evaluation.epochs)
        if self.full_recipe:
            real, recipe = self._real_images(), self.full_recipe
            data = self.preprocessing(real.images.to(self.device)), real.labels.to(self.device)
            trained.train("full", data, self._judge(self.make_network), recipe, [recipe.epochs])
        trained.exchange()

    def _random_set(self) -> LabelledImages:
        """As many random real images, under hard labels."""
        real = self._real_images()
        generator = torch.Generator().manual_seed(self._seed("random subset"))
        index = random_subset(real.labels, self.num_classes, self.ipc, generator)
        return self.preprocessing(real.images[index].to(self.device)), real.labels[index].to(self.device)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._count(batch)

    def on_test_epoch_end(self) -> None:
        assert self._trained is not None
        accuracies, self._trained = self._trained.accuracies(), None
        scores = scores_on_test(accuracies, self.evaluation.epochs, self.best_epochs)
        values = {f"test/{name}": value for name, value in scores.items()}
        self.log_dict(values)
        self.scores.update(values)

    def _count(self, batch: ImageBatch) -> None:
        assert self._trained is not None
        self._trained.count(self.preprocessing(batch.image), class_index(batch.label))

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/accuracy", "max")

    def progress(self) -> Progress:
        return Progress("outer_step", self.global_step)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """The images and labels, and over outer steps the window, its stage and the validation accuracy."""
        if split == "train":
            return {}
        items: dict[str, MediaItem] = {
            "images": pictures.image_grid(self.images, self.preprocessing.whitening, self.ipc),
            **pictures.curves(self.history),
            **self.distiller.media(),
        }
        if self.learn_labels:
            items["labels"] = pictures.label_map(self.labels, self.classes)
        return items

    def export(self, directory: Path) -> list[Path]:
        """Write the set for plain PyTorch and for `datasets`: see `lit_modules.at_bptt.export`."""
        details = {
            "classes": list(self.classes) or [str(i) for i in range(self.num_classes)],
            "ipc": self.ipc,
            "recipe": {**vars(self.evaluation.full_recipe), "epochs": self.best_epochs or self.evaluation.epochs[-1]},
            "scores": self.scores,
            "outer_steps": self.global_step if self._trainer is not None else 0,
        }
        return export_set(self.data, self.preprocessing, details, Path(directory))

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["distillation"] = {
            "distiller": self.distiller.state_dict(),
            "choice": self.distiller.choice,
            "chosen_in": self._chosen_in,
            "epoch_sums": self._epoch_sums,
            "history": self.history.state_dict(),
            "scores": self.scores,
            "best_epochs": self.best_epochs,
            "classes": list(self.classes),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = True
        state = checkpoint["distillation"]
        self.distiller.load_state_dict(state["distiller"])
        if state["choice"] is not None:
            self.distiller.choice = state["choice"]
        self._chosen_in, self._epoch_sums = state["chosen_in"], state["epoch_sums"]
        self.history.load_state_dict(state["history"])
        self.scores, self.best_epochs = dict(state["scores"]), state["best_epochs"]
        self.classes = tuple(state["classes"])
