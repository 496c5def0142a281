"""Training glue of dataset distillation: hooks, manual optimisation, evaluation, logging, checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

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
from lit_modules.at_bptt.dd_ranking import ranking_scores, teacher_labels
from lit_modules.at_bptt.distillers import Distiller, FixedSet, OuterStep, Study, Task, TruncatedBPTT
from lit_modules.at_bptt.evaluation import (
    Evaluation,
    Processes,
    TrainedNetworks,
    hard_labels,
    scores_on_test,
    train_on_sets,
)
from lit_modules.at_bptt.export import export_set
from lit_modules.at_bptt.from_file import FirstSet, FromFile
from lit_modules.at_bptt.inner import SyntheticData
from lit_modules.at_bptt.preprocessing import Preprocess, Preprocessing
from lit_modules.at_bptt.replicas import side_by_side, unstacked
from lit_modules.at_bptt.synthetic import Start, noise_images, one_hot_labels, real_images
from lit_modules.at_bptt.together import Course
from lit_modules.classifier.losses import class_index
from lit_modules.classifier.training import LabelledImages, Recipe
from lit_modules.history import History
from lit_modules.hparams import save_hparams
from lit_modules.nn.checks import check_classifier
from lit_modules.optim import configure
from lit_modules.selection import random_subset
from lit_modules.step_log import log_step

_ADAM = functools.partial(torch.optim.Adam, lr=1e-3)


class DatasetDistillation(LightningModule):
    """Learn a few synthetic images a class on which fresh networks train well (AT-BPTT and its family).

    One batch of real images is one outer step; the parameters are the images (num_classes * ipc, C, H, W), class by
    class, and, with learn_labels, non-negative soft labels (num_classes * ipc, num_classes). Both live in preprocessed
    space. With replicas there are so many sets, one after another; metrics are their means.

    Args:
        network: makes the inner network, preprocessed images → logits; no batch norm, and mean 0, std 1 of its own.
        image_shape: (C, H, W) of the data.
        num_classes: number of classes of the data.
        ipc: synthetic images per class; 1, 10 or 50 in the paper.
        distiller: what an outer step computes; TruncatedBPTT with AdaptiveWindow (AT-BPTT) by default.
        learn_labels: learn soft labels too; else they stay one-hot.
        start: first images: ``noise`` (paper), or real ones, ``random`` or by ``herding``.
        init: first images and labels from a file, in place of `start`; null for none.
        optimizer: of the outer level; Adam with lr 1e-3 by default, as in the paper for CIFAR.
        lr_scheduler: makes the schedule of its learning rate, a step an outer epoch; constant by default.
        clip: clip the images' gradient to this many times the moving average of its norm, null for never.
        clip_decay: share of the old average in that moving average, in [0, 1].
        preprocess: space of the set: ``zca`` whitening fitted on the training images (paper), or ``standardize``.
        zca_strength: of the whitening's regularisation, as a share of the mean eigenvalue.
        mean: of ``standardize``, pixels in [0, 1], one number or one a channel.
        std: of ``standardize``, pixels in [0, 1], one number or one a channel.
        inner_runs: inner runs averaged in one outer step of a process, each with its share of the batch.
        evaluation: how the set is evaluated: number of fresh networks, epochs or steps, recipe.
        architectures: further networks, by name, that the test trains on the set.
        compare_with_random: also test random real images of the same number.
        full_recipe: recipe with which the test also trains on all real images, for the HLR score; null for not.
        without_augmentation: also train without the recipe's augmentation in the test, for the ARS score.
        replicas: runs of the seeds `seed`, `seed` + 1, … that are advanced as one; each is what it would be alone.
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
        init: FromFile | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
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
        without_augmentation: bool = False,
        replicas: PositiveInt = 1,
        seed: Seed | None = None,
    ) -> None:
        super().__init__()
        counts = {"ipc": ipc, "num_classes": num_classes, "inner_runs": inner_runs, "replicas": replicas}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        if clip is not None and clip <= 0:
            raise UserError(f"clip: expected a positive number or null, got {clip}")
        save_hparams(self)
        self.make_network, self.num_classes, self.ipc = network, num_classes, ipc
        self.image_shape: tuple[int, int, int] = tuple(image_shape)  # type: ignore[assignment]  # a config gives a list
        self.distiller = distiller or TruncatedBPTT()
        self.replicas, self.side_by_side = replicas, side_by_side(self.distiller, replicas)
        self.learn_labels, self.start, self.init = learn_labels, start, init
        self.make_optimizer, self.make_scheduler = optimizer or _ADAM, lr_scheduler
        self.clip, self.clip_decay, self.inner_runs = clip, clip_decay, inner_runs
        self.evaluation = evaluation or Evaluation()
        self.architectures = dict(architectures or {})
        self.compare_with_random, self.full_recipe = compare_with_random, full_recipe
        self.without_augmentation = without_augmentation
        if without_augmentation and (self.evaluation.recipe.augment is None or not compare_with_random):
            raise UserError("without_augmentation: true needs evaluation.recipe.augment, and compare_with_random: true")
        self.seed = run_seed(seed)
        self.images = nn.Parameter(torch.zeros(replicas * num_classes * ipc, *self.image_shape))
        self.labels = nn.Parameter(one_hot_labels(num_classes, ipc).repeat(replicas, 1), requires_grad=learn_labels)
        self.preprocessing = Preprocessing(preprocess, self.image_shape, zca_strength, mean, std)
        self.gradient_ema: Tensor
        self.register_buffer("gradient_ema", torch.full((replicas,), torch.nan))
        self.classes: tuple[str, ...] = ()
        self.scores: dict[str, list[float]] = {}  # of each replica
        self.best_epochs: list[int] = []  # of each replica, epochs (or steps) that were best on validation data
        self._best: dict[str, Any] = {}  # with replicas: of each what `as_best` shows, and its accuracy
        self.history = History()
        self._first: FirstSet | None = None  # what `init` has read
        self._restored = False  # whether this fit goes on from a checkpoint
        self._chosen_in: int | None = None  # the epoch of the distiller's present choice
        self._epoch_sums: Tensor | None = None  # (S + 1,) accuracies and number of outer steps of this epoch
        self._terms: dict[str, Tensor] = {}
        self._compile: dict[str, Any] | None = None  # options of `torch.compile` for evaluation networks
        self._trained: list[TrainedNetworks] = []  # of each replica, while an evaluation runs

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
        self.side_by_side.prepare(task)
        self._restored = False
        if self.init is not None and self.trainer.ckpt_path is None:
            self._first = self.init.read(self.num_classes, self.ipc, self.image_shape)
            if self._first.own_space:
                self.preprocessing.take(self._first.own_space, f"the set of init ({self.init.file})")

    def on_fit_start(self) -> None:
        """Make preprocessing and first images, which a resumed run has; let a distiller study real images."""
        if not self._restored:
            self._make_set()
        if self.side_by_side.studies:
            seeds, folder = self._seeds("study"), Path(self.trainer.default_root_dir)
            study = Study(self._all_real(), folder, seeds[0], self.global_rank, self.trainer.world_size, rank_zero_info)
            self.side_by_side.study(study, seeds)
            self.trainer.strategy.barrier()
            if not self._restored:
                self.side_by_side.first_set(self._stacked, study, seeds)

    @torch.no_grad()
    def _make_set(self) -> None:
        """Fit the preprocessing, on one process, and make the first images."""
        first = self._first
        if self.preprocessing.kind == "zca" and not (first and first.own_space):
            if self.global_rank == 0:
                self.preprocessing.fit(self._real_images().images)
            whitening = self.preprocessing.whitening
            whitening.copy_(self.trainer.strategy.broadcast(whitening.cpu()))
        if first is not None:
            self.images.copy_(first.preprocessed(self.preprocessing).repeat(self.replicas, 1, 1, 1))
            self.labels.copy_(first.labels.repeat(self.replicas, 1))
            self._first = None
            return
        self.images.copy_(torch.cat([self._first_images(replica) for replica in range(self.replicas)]))
        self.labels.copy_(one_hot_labels(self.num_classes, self.ipc).repeat(self.replicas, 1))

    def _check_data(self, stage: str) -> None:
        meta = data_of(self, ImageData).meta
        for name, expected, got in (
            ("image_shape", tuple(meta.shape), self.image_shape),
            ("num_classes", meta.num_classes, self.num_classes),
        ):
            if expected != got:
                raise UserError(f"{name}: expected {expected}, that of the data; got {got}")
        self.classes = tuple(meta.classes)
        self.evaluation.course(self.num_classes, self.ipc)  # refuses mini-batches that a set of this size has not
        with isolated_rng(0):
            check_classifier(self.make_network(), self.image_shape, self.num_classes)
        if stage in ("fit", "test"):
            self._check_real_images(stage, min(meta.class_counts))

    def _check_real_images(self, stage: str, smallest_class: int) -> None:
        """Refuse, before anything is trained, what needs real images in memory, or more of them than there are."""
        fitting = stage == "fit"
        start, random = fitting and self.start != "noise" and self.init is None, self.compare_with_random
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for needed, setting, instead in (
            (fitting and self.preprocessing.kind == "zca", "preprocess: zca", "standardize"),
            (start, f"start: {self.start}", "noise"),
            (random, "compare_with_random: true", "false"),
            (fitting and self.distiller.studies, f"distiller: {type(self.distiller).__name__}", "another"),
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

    def _first_images(self, replica: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed(replica, "start"))
        if self.start == "noise":
            return noise_images(self.num_classes * self.ipc, self.image_shape, generator)
        real, prepare = self._real_images(), copy.deepcopy(self.preprocessing).cpu()  # where the images are
        return real_images(self.start, real.images, real.labels, self.num_classes, self.ipc, prepare, generator)

    def _seed(self, replica: int, purpose: str, *numbers: int) -> int:
        """A seed that is a function of the replica's seed and what it is for: no state, so nothing to restore."""
        return derived_seed(self.seed + replica, purpose, *numbers)

    def _seeds(self, purpose: str, *numbers: int) -> list[int]:
        return [self._seed(replica, purpose, *numbers) for replica in range(self.replicas)]

    def compile_networks(self, **options: Any) -> None:
        """Compile the networks of evaluations; inner steps are differentiated twice, which compiled code cannot be."""
        self._compile = options

    def configure_optimizers(self) -> Any:
        parameters = [self.images, self.labels] if self.learn_labels else [self.images]
        made = configure(parameters, self.make_optimizer, self.make_scheduler)
        if self.make_scheduler and isinstance(made["lr_scheduler"]["scheduler"], ReduceLROnPlateau):
            raise UserError("lr_scheduler: expected one that follows epochs, got one on a plateau")
        return made

    def on_train_start(self) -> None:
        order = getattr(self.trainer.train_dataloader, "sampler", None)
        if getattr(order, "replicas", 1) != self.replicas:
            raise UserError(
                f"replicas: expected 1, since the data has no loader that draws a batch for each; got {self.replicas}"
            )
        if self._epoch_sums is not None:  # of a run that goes on inside an epoch: checkpoints are read on the CPU
            self._epoch_sums = self._epoch_sums.to(self.device)

    # ---- outer steps ----

    @property
    def data(self) -> SyntheticData:
        """The set, without a graph; of replicas all sets, one after another."""
        return SyntheticData(self.images.detach(), self.labels.detach())

    def _each(self, value: Tensor) -> Tensor:
        """(S * n, …) → (S, n, …)."""
        return value.unflatten(0, (self.replicas, -1))

    @property
    def _stacked(self) -> SyntheticData:
        """(S, …) the sets of all replicas, without a graph."""
        return SyntheticData(self._each(self.images.detach()), self._each(self.labels.detach()))

    def forward(self, image: Tensor) -> Tensor:
        """Images in [0, 1] → the space in which the set lives."""
        return self.preprocessing(image)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        if self._chosen_in != self.current_epoch:
            self._start_epoch()
        step = self._mean_step(batch)
        images, norm = step.images, step.images.flatten(1).norm(dim=1)
        if self.clip is not None:
            images, average = clip_by_average(images, norm, self.gradient_ema, self.clip, self.clip_decay)
            self.gradient_ema.copy_(average)
        self.images.grad = images.flatten(0, 1)
        if step.labels is not None:
            self.labels.grad = step.labels.flatten(0, 1)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        with torch.no_grad():
            self.labels.clamp_(min=0)
        self.side_by_side.updated(self._stacked, step.own)
        assert self._epoch_sums is not None
        self._epoch_sums += torch.cat([step.accuracy, step.accuracy.new_ones(1)])
        means = {"loss": step.loss.mean(), "accuracy": step.accuracy.mean(), "gradient_norm": norm.mean()}
        self._terms = {"outer_loss": means["loss"], "gradient_norm": means["gradient_norm"]}
        values = {**means, **self.side_by_side.metrics()}
        log_step(self, {f"train/{name}": value for name, value in values.items()}, len(batch))

    def _mean_step(self, batch: ImageBatch) -> OuterStep:
        """(S, …) gradients, losses and accuracies, averaged over inner runs and processes."""
        runs = []
        image, label = self._each(self.preprocessing(batch.image)), self._each(class_index(batch.label))
        parts = zip(image.chunk(self.inner_runs, 1), label.chunk(self.inner_runs, 1), strict=True)
        for number, part in enumerate(parts):
            seeds = self._seeds("step", self.global_step, self.global_rank * self.inner_runs + number)
            runs.append(self.side_by_side.outer_step(self._stacked, *part, seeds))

        def mean(values: list[Tensor]) -> Tensor:
            return self.trainer.strategy.reduce(torch.stack(values).mean(0), reduce_op="mean")

        labels, own = (
            [value for value in values if value is not None]
            for values in zip(*((r.labels, r.own) for r in runs), strict=True)
        )
        return OuterStep(
            mean([run.images for run in runs]),
            mean(labels) if labels else None,
            mean([run.loss for run in runs]),
            mean([run.accuracy for run in runs]),
            mean(own) if own else None,
        )

    def _start_epoch(self) -> None:
        """Let rank 0 choose and tell the others."""
        if self.global_rank == 0:
            self.side_by_side.start_epoch(self._stacked, self._seeds("epoch", self.current_epoch))
        self.side_by_side.choice = self.trainer.strategy.broadcast(self.side_by_side.choice)
        self._chosen_in = self.current_epoch
        self._epoch_sums = torch.zeros(self.replicas + 1, device=self.device)
        self.history.add(outer_step=float(self.global_step), **self.side_by_side.metrics())

    def on_train_epoch_end(self) -> None:
        if self._epoch_sums is not None:
            *right, count = self._epoch_sums.tolist()
            self.side_by_side.end_epoch([100 * each / count for each in right])
        if (schedule := self.lr_schedulers()) is not None:
            schedule.step()  # type: ignore[union-attr]  # one, and none on a plateau

    # ---- evaluation: fresh networks trained on the set ----

    def _start_evaluation(self) -> list[TrainedNetworks]:
        # "judge" is part of the seeds: another word would be other networks.
        self._trained = [
            TrainedNetworks(
                [self._seed(replica, "judge", number) for number in range(self.evaluation.networks)],
                self.device,
                cast(Processes, self.trainer.strategy),
            )
            for replica in range(self.replicas)
        ]
        return self._trained

    def _end_evaluation(self) -> list[dict[str, Tensor]]:
        """Of each replica, accuracies by set."""
        accuracies, self._trained = [trained.accuracies() for trained in self._trained], []
        return accuracies

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
            sets, make = self._sets(), self._judge(self.make_network)
            train_on_sets(trained, "set", sets, make, evaluation.course(self.num_classes, self.ipc))
            for each in trained:
                each.exchange()

    def _sets(self) -> list[LabelledImages]:
        """Images and labels of each replica."""
        return [(each.images, each.labels) for each in unstacked(self._stacked)]

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._count(batch)

    def on_validation_epoch_end(self) -> None:
        accuracies = self._end_evaluation()
        if "set" not in accuracies[0]:
            return
        by_length = torch.stack([each["set"].mean(1) for each in accuracies])  # (S, lengths of training)
        accuracy, lengths = by_length.amax(1), self.evaluation.lengths
        self.best_epochs = [lengths[position] for position in by_length.argmax(1).tolist()]
        values = {"val/accuracy": accuracy, f"val/best_{self.evaluation.unit}": torch.tensor(self.best_epochs)}
        for length, column in zip(lengths, by_length.T, strict=True):
            values[f"val/accuracy_{length}"] = column
        if self.replicas > 1:
            values["val/accuracy_best"] = self._keep_best(accuracy)
        self._log_scores({name: value.tolist() for name, value in values.items()})
        self.history.add(val_outer_step=float(self.global_step), val_accuracy=float(accuracy.mean()))

    def _log_scores(self, scores: Mapping[str, list[float]]) -> None:
        """Log the means over replicas; keep the values of each."""
        self.log_dict({name: fmean(values) for name, values in scores.items()})
        self.scores.update(scores)

    def _keep_best(self, accuracy: Tensor) -> Tensor:
        """Keep of each replica what was best on validation data so far; return its accuracy (S,)."""
        now = {"images": self._stacked.images.clone(), "labels": self._stacked.labels.clone()}
        now |= {"accuracy": accuracy, "best_epochs": torch.tensor(self.best_epochs)}
        if not self._best:
            self._best = now
        better = accuracy > self._best["accuracy"]
        for name, value in now.items():
            chosen = better.to(value.device).view(-1, *[1] * (value.dim() - 1))
            self._best[name] = torch.where(chosen, value, self._best[name].to(value.device))
        return self._best["accuracy"]

    @contextmanager
    def as_best(self) -> Iterator[None]:
        """Inside, the sets, and numbers of epochs to train on them, are those of each replica's best validation."""
        if not self._best:
            yield
            return
        now = self.images.detach().clone(), self.labels.detach().clone(), self.best_epochs, self.scores
        images, labels = (self._best[name].flatten(0, 1) for name in ("images", "labels"))
        scores = {**self.scores, "val/accuracy": self._best["accuracy"].tolist()}
        self._become(images, labels, self._best["best_epochs"].tolist(), scores)
        try:
            yield
        finally:
            self._become(*now)

    @torch.no_grad()
    def _become(
        self, images: Tensor, labels: Tensor, best_epochs: list[int], scores: Mapping[str, list[float]]
    ) -> None:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.best_epochs, self.scores = best_epochs, dict(scores)

    def on_test_epoch_start(self) -> None:
        trained = self._start_evaluation()
        for name, (data, make, course) in self._test_runs().items():
            train_on_sets(trained, name, data, self._judge(make), course)
        for each in trained:
            each.exchange()

    def _test_runs(self) -> dict[str, tuple[list[LabelledImages], NetworkFactory, Course]]:
        """By name, what is trained on in the test: of each replica a set, networks, how they train."""
        sets, make, course = self._sets(), self.make_network, self.evaluation.course(self.num_classes, self.ipc)
        runs = {"set": (sets, make, course)}
        for name, other in self.architectures.items():
            runs[f"on_{name}"] = sets, other, course
        if self._soft:
            runs["hard_labels"] = [(images, hard_labels(labels)) for images, labels in sets], make, course
        if self.full_recipe:
            runs["full"] = [self._all_real()] * self.replicas, make, Course(self.full_recipe, [self.full_recipe.epochs])
        if not self.compare_with_random:
            return runs
        random = alike = [self._random_set(replica) for replica in range(self.replicas)]
        runs["random"] = random, make, course
        if self._soft:
            if self.full_recipe is None:
                return runs
            seeds = self._seeds("teacher")
            alike = [
                (images, teacher_labels(images, self._all_real(), make, self.full_recipe, seed))
                for (images, _), seed in zip(random, seeds, strict=True)
            ]
            runs["random_soft"] = alike, make, course
        if self.without_augmentation:
            bare = dataclasses.replace(course, recipe=dataclasses.replace(course.recipe, augment=None))
            runs["unaugmented"], runs["random_unaugmented"] = (sets, make, bare), (alike, make, bare)
        return runs

    def _all_real(self) -> LabelledImages:
        """All real images to train on, preprocessed."""
        real = self._real_images()
        return self.preprocessing(real.images.to(self.device)), real.labels.to(self.device)

    @property
    def _soft(self) -> bool:
        """Whether labels are other than one-hot."""
        return self.learn_labels or not bool(torch.isin(self.labels.detach(), self.labels.new_tensor([0, 1])).all())

    def _random_set(self, replica: int) -> LabelledImages:
        """As many random real images, under hard labels."""
        real = self._real_images()
        generator = torch.Generator().manual_seed(self._seed(replica, "random subset"))
        index = random_subset(real.labels, self.num_classes, self.ipc, generator)
        return self.preprocessing(real.images[index].to(self.device)), real.labels[index].to(self.device)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._count(batch)

    def on_test_epoch_end(self) -> None:
        best: Sequence[int | None] = self.best_epochs or [None] * self.replicas
        scores = [
            scores_on_test(each, self.evaluation, epochs)
            for each, epochs in zip(self._end_evaluation(), best, strict=True)
        ]
        scores = [each | ranking_scores(each, self._soft) for each in scores]
        self._log_scores({f"test/{name}": [each[name] for each in scores] for name in scores[0]})

    def _count(self, batch: ImageBatch) -> None:
        image, label = self.preprocessing(batch.image), class_index(batch.label)
        for trained in self._trained:
            trained.count(image, label)

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        """With replicas a new best of any of them counts."""
        return PrimaryMetric("val/accuracy" if self.replicas == 1 else "val/accuracy_best", "max")

    def replica_metrics(self) -> Mapping[str, Sequence[float]]:
        return self.scores

    def progress(self) -> Progress:
        return Progress("outer_step", self.global_step)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """The first replica's images and labels, and over outer steps windows, stages and validation accuracy."""
        if split == "train":
            return {}
        images, labels = self._sets()[0]
        items: dict[str, MediaItem] = {
            "images": pictures.image_grid(images, self.preprocessing.whitening, self.ipc),
            **pictures.curves(self.history),
            **self.side_by_side.media(),
        }
        if self._soft:
            items["labels"] = pictures.label_map(labels, self.classes)
        return items

    def export(self, directory: Path) -> list[Path]:
        """Write the set for plain PyTorch and for `datasets`, of replicas each into a folder ``replica_0``, …

        See `lit_modules.at_bptt.export`.
        """
        paths: list[Path] = []
        for replica, data in enumerate(unstacked(self._stacked)):
            folder = Path(directory) / f"replica_{replica}" if self.replicas > 1 else Path(directory)
            folder.mkdir(exist_ok=True)
            length = self.best_epochs[replica] if self.best_epochs else self.evaluation.lengths[-1]
            details = {
                "classes": list(self.classes) or [str(i) for i in range(self.num_classes)],
                "ipc": self.ipc,
                "recipe": self.evaluation.described(length),
                "scores": {name: values[replica] for name, values in self.scores.items()},
                "outer_steps": self.global_step if self._trainer is not None else 0,
            }
            paths += export_set(data, self.preprocessing, details, folder)
        return paths

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["distillation"] = {
            "distiller": self.side_by_side.state_dict(),
            "choice": self.side_by_side.choice,
            "chosen_in": self._chosen_in,
            "epoch_sums": self._epoch_sums,
            "history": self.history.state_dict(),
            "scores": self.scores,
            "best_epochs": self.best_epochs,
            "best": self._best,
            "classes": list(self.classes),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = True
        state = checkpoint["distillation"]
        self.side_by_side.load_state_dict(state["distiller"])
        self.side_by_side.choice = state["choice"]
        self._chosen_in, self._epoch_sums = state["chosen_in"], state["epoch_sums"]
        self.history.load_state_dict(state["history"])
        self.scores, self.best_epochs = dict(state["scores"]), state["best_epochs"]
        self._best, self.classes = state["best"], tuple(state["classes"])
