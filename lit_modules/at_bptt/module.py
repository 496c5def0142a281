"""Training glue of dataset distillation: hooks, manual optimisation, evaluation, logging, pictures, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from leanlight.contracts import (
    Curve,
    Heatmap,
    ImageBatch,
    ImageData,
    ImageGrid,
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
from leanlight.ops.whitening import apply_zca, fit_zca
from lit_modules.at_bptt.distillers import Distiller, FixedSet, Setting, TruncatedBPTT
from lit_modules.at_bptt.evaluation import Evaluation, hard_labels, label_robust_score, train_networks
from lit_modules.at_bptt.export import drawable, export_set
from lit_modules.at_bptt.inner import SyntheticData
from lit_modules.at_bptt.synthetic import Start, herding_subset, noise_images, one_hot_labels, random_subset
from lit_modules.classifier.losses import class_index
from lit_modules.classifier.training import LabelledImages, Recipe
from lit_modules.hparams import save_hparams
from lit_modules.nn.checks import check_classifier

_SHOWN = 10  # images of a class in a grid
_MAIN = "set"  # the judged set among its variants


class DatasetDistillation(LightningModule):
    """Learn a few synthetic images a class on which fresh networks train well.

    One batch of real images is one outer step; the parameters are the images (num_classes * ipc, C, H, W), class by
    class, and, with learn_labels, non-negative soft labels (num_classes * ipc, num_classes). Both live in preprocessed
    space.

    network: makes the inner network, preprocessed images → logits; without batch norm, and without a normalisation of
    its own (mean 0, std 1). image_shape, num_classes: of the data. ipc: images per class. distiller: what an outer step
    computes. start: ``noise``, or real images, ``random`` or by ``herding``. optimizer: of the outer level, Adam with
    lr 1e-3 by default. clip: the images' gradient is clipped to this many times the moving average of its norm (Feng et
    al. 2024), None for never; clip_decay: of that average. preprocess: ``zca`` whitening fitted on the training images
    (zca_strength), or ``standardize`` with `mean` and `std`. inner_runs: inner runs averaged in one outer step of a
    process, each with its share of the batch. evaluation: how the set is judged. architectures: further networks that
    the test trains on the set. compare_with_random: also test random real images of the same number. full_recipe: with
    it the test also trains on all real images, for the HLR score. seed: of everything drawn here; that of
    ``seed_everything`` by default.
    """

    automatic_optimization = False

    def __init__(
        self,
        network: NetworkFactory,
        image_shape: tuple[int, int, int],
        num_classes: int = 10,
        ipc: int = 10,
        distiller: Distiller | None = None,
        learn_labels: bool = False,
        start: Start = "noise",
        optimizer: OptimizerCallable | None = None,
        clip: float | None = 2.0,
        clip_decay: float = 0.9,
        preprocess: Literal["zca", "standardize"] = "zca",
        zca_strength: float = 0.1,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        inner_runs: int = 1,
        evaluation: Evaluation | None = None,
        architectures: dict[str, NetworkFactory] | None = None,
        compare_with_random: bool = True,
        full_recipe: Recipe | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("ipc", ipc), ("num_classes", num_classes), ("inner_runs", inner_runs)):
            if value < 1:
                raise UserError(f"model.init_args.{name}: expected at least 1, got {value}")
        if clip is not None and clip <= 0:
            raise UserError(f"model.init_args.clip: expected a positive number or null, got {clip}")
        save_hparams(self)
        self.make_network, self.num_classes, self.ipc = network, num_classes, ipc
        self.image_shape = tuple(image_shape)
        self.distiller = distiller or TruncatedBPTT()
        self.learn_labels, self.start, self.make_optimizer = learn_labels, start, optimizer
        self.clip, self.clip_decay, self.inner_runs = clip, clip_decay, inner_runs
        self.preprocess, self.zca_strength = preprocess, zca_strength
        self.evaluation = evaluation or Evaluation()
        self.architectures = dict(architectures or {})
        self.compare_with_random, self.full_recipe = compare_with_random, full_recipe
        self.seed = run_seed(seed)
        self.images = nn.Parameter(torch.zeros(num_classes * ipc, *self.image_shape))
        self.labels = nn.Parameter(one_hot_labels(num_classes, ipc), requires_grad=learn_labels)
        pixels = self.images[0].numel()
        channel = (1, self.image_shape[0], 1, 1)
        self.whitening: Tensor
        self.gradient_ema: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("whitening", torch.zeros((pixels, pixels) if preprocess == "zca" else (0, 0)))
        self.register_buffer("gradient_ema", torch.tensor(torch.nan))
        self.register_buffer("mean", torch.as_tensor(mean).float().reshape(-1, 1, 1).expand(channel[1:]).clone())
        self.register_buffer("std", torch.as_tensor(std).float().reshape(-1, 1, 1).expand(channel[1:]).clone())
        self.classes: tuple[str, ...] = ()
        self.scores: dict[str, float] = {}
        self.best_epochs: int | None = None  # the mark that was best on validation data
        self._chosen_in: int | None = None  # the epoch of the distiller's present choice
        self._epoch_sums: Tensor | None = None  # accuracy and number of outer steps of this epoch
        self._history: dict[str, list[float]] = {}
        self._terms: dict[str, Tensor] = {}
        self._judges: dict[str, list[list[nn.Module]]] = {}  # variant → mark → networks
        self._right: dict[str, Tensor] = {}
        self._judged = 0

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check the data; when fitting, fit the whitening and make the first images."""
        meta = data_of(self, ImageData).meta
        for name, expected, got in (
            ("image_shape", tuple(meta.shape), self.image_shape),
            ("num_classes", meta.num_classes, self.num_classes),
        ):
            if expected != got:
                raise UserError(f"model.init_args.{name}: expected {expected}, that of the data; got {got}")
        self.classes = tuple(meta.classes)
        with isolated_rng(0):
            check_classifier(self.make_network(), self.image_shape, self.num_classes)
        if stage != "fit":
            return
        if self.trainer.precision not in ("32-true", "64-true"):
            raise UserError(
                f"trainer.precision: expected 32-true, since inner steps are differentiated twice; "
                f"got {self.trainer.precision}"
            )
        epochs = self.trainer.max_epochs
        if not isinstance(self.distiller, FixedSet) and (epochs is None or epochs < 1):
            raise UserError("trainer.max_epochs: expected a positive number, since stages are shares of it")
        self.distiller.prepare(Setting(self.make_network, self.num_classes, self.ipc, epochs or 1, self.learn_labels))
        if self.preprocess == "zca":
            self.whitening.copy_(fit_zca(self._real().images, self.zca_strength))
        with torch.no_grad():
            self.images.copy_(self._first_images())
            self.labels.copy_(one_hot_labels(self.num_classes, self.ipc))

    def _real(self) -> Any:
        """The training split, in memory."""
        split = getattr(self.trainer.datamodule, "train_split", None)  # type: ignore[attr-defined]
        if split is None:
            raise UserError(
                "model.init_args: preprocess zca, start random or herding, compare_with_random and full_recipe need "
                "data that is held in memory; use standardize, noise, false and null with this DataModule"
            )
        return split

    def _first_images(self) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed("start"))
        if self.start == "noise":
            return noise_images(len(self.images), self.image_shape, generator)
        real = self._real()
        if self.start == "random":
            index = random_subset(real.labels, self.num_classes, self.ipc, generator)
        else:
            index = herding_subset(self.prepare_images(real.images).flatten(1), real.labels, self.num_classes, self.ipc)
        return self.prepare_images(real.images[index])

    def prepare_images(self, image: Tensor) -> Tensor:
        """Bring images (N, C, H, W), uint8 or float in [0, 1], into the space in which the set lives."""
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        if self.preprocess == "zca":
            return apply_zca(image, self.whitening)
        return (image - self.mean) / self.std

    def _seed(self, purpose: str, *numbers: int) -> int:
        """A seed that is a function of the run's seed and what it is for: no state, so nothing to restore."""
        return derived_seed(self.seed, purpose, *numbers)

    def configure_optimizers(self) -> Any:
        parameters = [self.images, self.labels] if self.learn_labels else [self.images]
        make = self.make_optimizer or (lambda params: torch.optim.Adam(params, lr=1e-3))
        return make(parameters)

    # ---- outer steps ----

    @property
    def data(self) -> SyntheticData:
        """The set, without a graph."""
        return SyntheticData(self.images.detach(), self.labels.detach())

    def forward(self, image: Tensor) -> Tensor:
        """Images in [0, 1] → the space in which the set lives."""
        return self.prepare_images(image)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        if self._chosen_in != self.current_epoch:
            self._start_epoch()
        step = self._mean_step(batch)
        norm = self._set_gradients(step[0], step[1])
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        with torch.no_grad():
            self.labels.clamp_(min=0)
        loss, accuracy = step[2], step[3]
        assert self._epoch_sums is not None
        self._epoch_sums += torch.stack([accuracy, torch.ones_like(accuracy)])
        self._terms = {"outer_loss": loss, "gradient_norm": norm}
        values = {"train/loss": loss, "train/accuracy": accuracy, "train/gradient_norm": norm}
        facts = {f"train/{name}": value for name, value in self.distiller.facts().items()}
        self.log_dict({**values, **facts}, on_step=True, on_epoch=False, batch_size=len(batch))

    def _mean_step(self, batch: ImageBatch) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Gradients of images and labels, loss and accuracy, averaged over inner runs and processes."""
        runs = []
        parts = zip(batch.image.chunk(self.inner_runs), class_index(batch.label).chunk(self.inner_runs), strict=True)
        for number, (image, label) in enumerate(parts):
            seed = self._seed("step", self.global_step, self.global_rank * self.inner_runs + number)
            runs.append(self.distiller.outer_step(self.data, self.prepare_images(image), label, seed))
        reduce = self.trainer.strategy.reduce
        mean = [
            reduce(torch.stack(values).mean(0), reduce_op="mean")
            for values in zip(*((run.images, run.loss, run.accuracy) for run in runs), strict=True)
        ]
        labels = [run.labels for run in runs if run.labels is not None]
        label_gradient = reduce(torch.stack(labels).mean(0), reduce_op="mean") if labels else None
        return mean[0], label_gradient, mean[1], mean[2]

    def _set_gradients(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Clip the images' gradient by the moving average of its norm, set both; return the norm before."""
        norm = images.norm()
        if self.clip is not None:
            ema = torch.where(self.gradient_ema.isnan(), norm, torch.lerp(norm, self.gradient_ema, self.clip_decay))
            self.gradient_ema.copy_(ema)
            images = images * (self.clip * ema / norm.clamp(min=1e-30)).clamp(max=1)
        self.images.grad = images
        if self.learn_labels:
            self.labels.grad = labels
        return norm

    def _start_epoch(self) -> None:
        """Let rank 0 choose and tell the others."""
        if self.global_rank == 0:
            self.distiller.start_epoch(self.data, self._seed("epoch", self.current_epoch))
        self.distiller.choice = self.trainer.strategy.broadcast(self.distiller.choice)
        self._chosen_in = self.current_epoch
        self._epoch_sums = torch.zeros(2, device=self.device)
        facts = {"outer_step": float(self.global_step), **self.distiller.facts()}
        for name, value in facts.items():
            self._history.setdefault(name, []).append(value)

    def on_train_epoch_end(self) -> None:
        if self._epoch_sums is not None:
            right, count = self._epoch_sums.tolist()
            self.distiller.end_epoch(100 * right / count)

    # ---- evaluation: fresh networks trained on the set ----

    def on_validation_epoch_start(self) -> None:
        self._judges = {}
        if not self.trainer.sanity_checking:
            self._prepare_judges({_MAIN: (self.data.images, self.data.labels)}, {_MAIN: self.make_network})
        self._reset_counts()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._judge(batch)

    def on_validation_epoch_end(self) -> None:
        if not self._judges:
            return
        accuracy = self._accuracies(_MAIN).mean(1)
        best = int(accuracy.argmax())
        self.best_epochs = self.evaluation.epochs[best]
        values = {"val/accuracy": float(accuracy[best]), "val/best_epochs": float(self.best_epochs)}
        for epochs, value in zip(self.evaluation.epochs, accuracy.tolist(), strict=True):
            values[f"val/accuracy_{epochs}"] = value
        self.log_dict(values)
        self.scores.update(values)
        self._history.setdefault("val_outer_step", []).append(float(self.global_step))
        self._history.setdefault("val_accuracy", []).append(values["val/accuracy"])
        self._judges = {}

    def on_test_epoch_start(self) -> None:
        self._judges = {}
        own = (self.data.images, self.data.labels)
        sets: dict[str, LabelledImages] = {_MAIN: own} | {f"on_{name}": own for name in self.architectures}
        networks = {_MAIN: self.make_network} | {f"on_{name}": make for name, make in self.architectures.items()}
        if self.learn_labels or self.full_recipe:
            sets["hard_labels"], networks["hard_labels"] = (own[0], hard_labels(own[1])), self.make_network
        if self.compare_with_random:
            sets["random"], networks["random"] = self._random_set(), self.make_network
        self._prepare_judges(sets, networks)
        if self.full_recipe:
            real, recipe = self._real(), self.full_recipe
            full = (self.prepare_images(real.images.to(self.device)), real.labels.to(self.device))
            self._judges["full"] = self._train_all(full, self.make_network, recipe, [recipe.epochs])
        self._reset_counts()

    def _random_set(self) -> LabelledImages:
        """As many random real images, under hard labels."""
        real = self._real()
        generator = torch.Generator().manual_seed(self._seed("random subset"))
        index = random_subset(real.labels, self.num_classes, self.ipc, generator)
        return self.prepare_images(real.images[index].to(self.device)), real.labels[index].to(self.device)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._judge(batch)

    def on_test_epoch_end(self) -> None:
        marks = self.evaluation.epochs
        chosen = marks.index(self.best_epochs) if self.best_epochs in marks else len(marks) - 1
        own = self._accuracies(_MAIN)
        values = {
            "accuracy": float(own[chosen].mean()),
            "accuracy_spread": float(own[chosen].std(correction=0)),
            "accuracy_best_on_test": float(own.mean(1).max()),
            "epochs": float(marks[chosen]),
        }
        for name in self._judges:
            if name not in (_MAIN, "full"):
                values[f"accuracy_{name}"] = float(self._accuracies(name)[chosen].mean())
        if "accuracy_random" in values:
            values["ior"] = values["accuracy"] - values["accuracy_random"]
        if "full" in self._judges:
            values["accuracy_full"] = float(self._accuracies("full").mean())
            values["hlr"] = values["accuracy_full"] - values["accuracy_hard_labels"]
            if "ior" in values:
                values["lrs"] = label_robust_score(values["ior"], values["hlr"])
        values = {f"test/{name}": value for name, value in values.items()}
        self.log_dict(values)
        self.scores.update(values)
        self._judges = {}

    def _prepare_judges(self, sets: Mapping[str, LabelledImages], networks: Mapping[str, NetworkFactory]) -> None:
        recipe, marks = self.evaluation.full_recipe, self.evaluation.epochs
        for name, data in sets.items():
            self._judges[name] = self._train_all(data, networks[name], recipe, marks)

    def _train_all(
        self, data: LabelledImages, factory: NetworkFactory, recipe: Recipe, marks: Sequence[int]
    ) -> list[list[nn.Module]]:
        """Train the evaluation's networks, spread over the processes; every process gets all of them, by mark."""
        world, rank = self.trainer.world_size, self.global_rank
        trained: list[list[nn.Module]] = []
        for number in range(self.evaluation.networks):
            mine = number % world == rank
            copies = train_networks(data, factory, recipe, self._seed("judge", number), marks) if mine else []
            if world > 1:
                copies = self.trainer.strategy.broadcast([copy.cpu() for copy in copies], src=number % world)
                copies = [copy.to(self.device) for copy in copies]
            trained.append(copies)
        return [list(group) for group in zip(*trained, strict=True)]

    def _reset_counts(self) -> None:
        networks = self.evaluation.networks
        self._right = {
            name: torch.zeros(len(marks), networks, device=self.device) for name, marks in self._judges.items()
        }
        self._judged = 0

    def _judge(self, batch: ImageBatch) -> None:
        image, label = self.prepare_images(batch.image), class_index(batch.label)
        for name, marks in self._judges.items():
            for row, networks in zip(self._right[name], marks, strict=True):
                row += torch.stack([(network(image).argmax(1) == label).sum() for network in networks])
        self._judged += len(batch)

    def _accuracies(self, name: str) -> Tensor:
        """(marks, networks), on the CPU, over the data of all processes."""
        counts = torch.cat([self._right[name].flatten(), self._right[name].new_tensor([self._judged])])
        counts = cast(Tensor, self.trainer.strategy.reduce(counts, reduce_op="sum")).cpu()
        return (counts[:-1] / counts[-1]).view_as(self._right[name])

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/accuracy", "max")

    def progress(self) -> Progress:
        return Progress("outer_step", self.global_step)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """The images, and over outer steps the window, its stage, the entropy of P and the validation accuracy."""
        if split == "train":
            return {}
        shown = min(self.ipc, _SHOWN)
        rows = self.images.detach().view(self.num_classes, self.ipc, *self.image_shape)[:20, :shown].flatten(0, 1)
        items: dict[str, MediaItem] = {"images": ImageGrid(drawable(rows, self.whitening), columns=shown)}
        history, steps = self._history, self._history.get("outer_step", [])
        if "window_start" in history:
            start = history["window_start"]
            end = [first + length for first, length in zip(start, history["window_length"], strict=True)]
            items["window"] = Curve(steps, {"start": start, "end": end}, "outer step", "inner step")
        if "stage" in history:
            items["stage"] = Curve(steps, {"stage": history["stage"]}, "outer step", "0 early, 1 middle, 2 late")
        if len(entropy := history.get("entropy", [])) > 1:
            items["entropy"] = Curve(range(len(entropy)), {"of P(t), over log T": entropy}, "probe", "relative entropy")
        if len(history.get("val_accuracy", [])) > 1:
            accuracy = {"validation": history["val_accuracy"]}
            items["accuracy"] = Curve(history["val_outer_step"], accuracy, "outer step", "accuracy")
        norms = getattr(self.distiller, "norms", None)
        if norms is not None:
            series = {"this epoch's probe": norms.tolist()}
            items["inner_gradient_norm"] = Curve(range(1, len(norms) + 1), series, "inner step", "gradient norm")
        if self.learn_labels:
            columns = self.classes if self.num_classes <= 20 else ()
            items["labels"] = Heatmap(self.labels.detach().cpu()[:50], "class", "image", columns=columns)
        return items

    def export(self, directory: Path) -> list[Path]:
        """Write the set for plain PyTorch and for `datasets`: see `lit_modules.at_bptt.export`."""
        facts = {
            "classes": list(self.classes) or [str(i) for i in range(self.num_classes)],
            "ipc": self.ipc,
            "recipe": {**vars(self.evaluation.full_recipe), "epochs": self.best_epochs or self.evaluation.epochs[-1]},
            "scores": self.scores,
            "outer_steps": self.global_step if self._trainer is not None else 0,
        }
        statistics = None if self.preprocess == "zca" else (self.mean, self.std)
        return export_set(self.data, self.whitening, statistics, facts, Path(directory))

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["distillation"] = {
            "distiller": self.distiller.state_dict(),
            "choice": self.distiller.choice,
            "chosen_in": self._chosen_in,
            "epoch_sums": self._epoch_sums,
            "history": self._history,
            "scores": self.scores,
            "best_epochs": self.best_epochs,
            "classes": list(self.classes),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["distillation"]
        self.distiller.load_state_dict(state["distiller"])
        if state["choice"] is not None:
            self.distiller.choice = state["choice"]
        self._chosen_in, self._epoch_sums = state["chosen_in"], state["epoch_sums"]
        self._history = {name: list(values) for name, values in state["history"].items()}
        self.scores, self.best_epochs = dict(state["scores"]), state["best_epochs"]
        self.classes = tuple(state["classes"])
