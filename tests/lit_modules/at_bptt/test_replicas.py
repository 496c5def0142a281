"""Replicas are the runs that their seeds would make alone."""

import copy
import functools
import json

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

import leanlight
from datamodules import ImageDataModule
from leanlight.contracts import UserError
from leanlight.ops.differentiable import ALL_AUGMENTATIONS, augment_each
from lit_modules.at_bptt import (
    AdaptiveWindow,
    Adjoint,
    DatasetDistillation,
    DistributionMatching,
    Evaluation,
    FixedSet,
    FullWindow,
    InnerOptimizer,
    LastWindow,
    LowRankHessian,
    RandomWindow,
    TruncatedBPTT,
    Unrolled,
)
from lit_modules.at_bptt.distillers import Task
from lit_modules.at_bptt.evaluation import train_networks
from lit_modules.at_bptt.inner import BatchSampler, SyntheticData
from lit_modules.at_bptt.replicas import BatchedBPTT, side_by_side
from lit_modules.at_bptt.together import Course, can_stack, train_together
from lit_modules.classifier.training import Recipe
from lit_modules.nn import MLP, ConvNet

MAKE = {"in_channels": 1, "num_classes": 10, "image_size": 8, "mean": 0.0, "std": 1.0}
STAGES = ("early", "middle", "late", "early")


def mlp():
    return MLP(hidden=[12], **MAKE)


def double(make):
    return make().double()


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


def distiller(selector, engine=None, **changes):
    settings = {"inner_optimizer": InnerOptimizer(lr=0.02), "classes_per_batch": 7, "images_per_class": 1}
    return TruncatedBPTT(12, copy.deepcopy(selector), engine, **{**settings, **changes})


def begun(made, sets, stages=STAGES):
    made.prepare(Task(functools.partial(double, mlp), 10, 2, 10, learn_labels=True))
    for each, stage in zip(made.each, stages, strict=True):
        each.window_selector.stage = stage
    made.start_epoch(sets, range(len(stages)))
    return made


@pytest.mark.parametrize(
    ("selector", "changes"),
    [
        (FullWindow(), {}),
        (LastWindow(4), {"engine": Unrolled(), "augment": "flip", "outer_augment": None}),
        (RandomWindow(4), {"inner_optimizer": InnerOptimizer("sgd", 0.1), "classes_per_batch": None}),
        (RandomWindow(4, redraw="step"), {"engine": Adjoint("zero"), "augment": "dsa", "outer_chunk": 7}),
        (AdaptiveWindow(4, 3), {"inner_optimizer": InnerOptimizer(lr=0.02, eps=1e-3, eps_placement="before")}),
        (AdaptiveWindow(4, 3, length_stages="all"), {"engine": Unrolled(), "weight_by_p": True}),
    ],
)
def test_the_outer_steps_of_a_batch_of_replicas_are_those_of_each_alone(selector, changes):
    generator = torch.Generator().manual_seed(0)
    sets = SyntheticData(
        torch.randn(4, 20, 1, 8, 8, generator=generator).double(), torch.rand(4, 20, 10, generator=generator).double()
    )
    image = torch.randn(4, 30, 1, 8, 8, generator=generator).double()
    label = torch.randint(10, (4, 30), generator=generator)
    together = begun(side_by_side(distiller(selector, **changes), 4), sets)
    assert isinstance(together, BatchedBPTT)
    for step in range(2):
        seeds = [100 * step + replica for replica in range(4)]
        result = together.outer_step(sets, image, label, seeds)
        for i in range(4):
            own = SyntheticData(sets.images[i : i + 1], sets.labels[i : i + 1])
            alone = side_by_side(distiller(selector, **changes), 1)
            alone.prepare(Task(functools.partial(double, mlp), 10, 2, 10, learn_labels=True))
            alone.each[0].window_selector.stage = STAGES[i]
            alone.start_epoch(own, [i])
            for seed in range(i, seeds[i] + 1, 100):  # a window that is drawn anew follows the step's seed alone
                expected = alone.outer_step(own, image[i : i + 1], label[i : i + 1], [seed])
            assert together.each[i].metrics() == pytest.approx(alone.each[0].metrics())
            for name in ("images", "labels", "loss", "accuracy"):
                assert error(getattr(result, name)[i], getattr(expected, name)[0]) < 1e-10, (name, i)


def test_replicas_of_what_is_no_batch_take_turns():
    kinds = [
        distiller(FullWindow(), Adjoint("lowrank", LowRankHessian(2))),
        FixedSet(),
        DistributionMatching(),
    ]
    assert not any(isinstance(side_by_side(kind, 3), BatchedBPTT) for kind in kinds)
    assert [len(side_by_side(kind, 3).each) for kind in kinds] == [3, 3, 3]


@pytest.mark.parametrize("name", ALL_AUGMENTATIONS)
def test_batches_that_are_augmented_together_are_what_each_would_be_alone(name):
    image = torch.rand(5, 3, 3, 12, 12).double()
    generators = [[torch.Generator().manual_seed(seed) for seed in range(5)] for _ in range(2)]
    augment = ALL_AUGMENTATIONS[name]
    for _ in range(3):
        together = augment_each(augment, image, generators[0])
        alone = torch.stack([augment(*pair) for pair in zip(image, generators[1], strict=True)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "recipe", "order"),
    [
        (mlp, Recipe(lr=0.02, epochs=7, batch_size=8, augment="flip_rotate"), None),
        (mlp, Recipe(lr=0.02, epochs=7, batch_size=7, augment="flip_rotate"), BatchSampler(10, 2, 7, 1)),
        (
            mlp,
            Recipe(lr=0.1, epochs=7, optimizer="sgd", weight_decay=0.01, schedule="cosine", label_smoothing=0.1),
            None,
        ),
        (functools.partial(ConvNet, width=4, depth=1, **MAKE), Recipe(lr=0.02, epochs=3, optimizer="sgd"), None),
    ],
)
@pytest.mark.parametrize("soft", [True, False])
def test_networks_that_train_together_are_those_that_train_alone(make, recipe, order, soft):
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(20, 10, generator=generator).double() if soft else torch.arange(20) % 10
    shared, other = (torch.randn(20, 1, 8, 8, generator=generator).double() for _ in range(2))
    data, make, seeds = (
        [(shared, labels), (other, labels), (shared, labels)],
        functools.partial(double, make),
        [4, 5, 6],
    )
    before = torch.get_rng_state()
    course = Course(recipe, (2, recipe.epochs), order)
    together = train_together(data, make, course, seeds)
    assert torch.equal(torch.get_rng_state(), before)
    for own, seed, copies in zip(data, seeds, together, strict=True):
        for got, expected in zip(copies, train_networks(own, make, course, seed), strict=True):
            assert not got.training
            for name, value in expected.state_dict().items():
                torch.testing.assert_close(got.state_dict()[name], value, rtol=1e-8, atol=1e-10)


def test_networks_with_statistics_of_batches_or_compiled_do_not_train_together():
    assert can_stack(mlp)
    assert not can_stack(functools.partial(ConvNet, width=4, depth=1, norm="batch", **MAKE))


# ---- whole runs


def module(seed=0, replicas=1, kind=None, dtype=torch.float64, **changes):
    kind = kind or distiller(AdaptiveWindow(4, 2, patience_early=0.5, patience_late=0.5), classes_per_batch=None)
    settings = {
        "network": functools.partial(double, mlp) if dtype == torch.float64 else mlp,
        "image_shape": (1, 8, 8),
        "ipc": 1,
        "preprocess": "standardize",
        "mean": 0.305,
        "std": 0.376,
        "optimizer": functools.partial(torch.optim.Adam, lr=0.05),
        "evaluation": Evaluation(2, (3, 8), Recipe(lr=0.02, batch_size=512, augment="flip_rotate")),
    }
    made = DatasetDistillation(distiller=kind, replicas=replicas, seed=seed, **{**settings, **changes})
    return made.to(dtype)


def trainer(epochs=2, **changes):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"max_epochs": epochs, "accelerator": "cpu", "num_sanity_val_steps": 0, **dict.fromkeys(quiet, False)}
    return Trainer(**{**settings, "limit_train_batches": 2, "check_val_every_n_epoch": epochs, **changes})


def digits(seed=0):
    return ImageDataModule("digits", batch_size=400, seed=seed)


def fitted(seed=0, replicas=1, **changes):
    made, run = module(seed, replicas, **changes), trainer()
    run.fit(made, digits(seed))
    run.test(made, digits(seed), verbose=False)
    return made


@pytest.mark.parametrize("learn_labels", [True, False])
def test_a_run_of_replicas_is_the_runs_of_its_seeds(learn_labels):
    """A seed decides first images, networks, batches, augmentation, windows, stages and evaluation."""
    decay = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    changes = {"learn_labels": learn_labels, "lr_scheduler": decay}
    if not learn_labels:
        changes |= {"full_recipe": Recipe(epochs=1, lr=0.02), "inner_runs": 2, "clip": 1.0}
        changes["evaluation"] = Evaluation(2, recipe=Recipe(lr=0.02, augment="flip"), steps=(3, 8), classes_per_batch=7)
    together = fitted(seed=3, replicas=3, **changes)
    alone = [fitted(seed=seed, **changes) for seed in (3, 4, 5)]
    assert together.optimizers().param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**2)
    for name in ("images", "labels", "gradient_ema"):
        values = torch.cat([getattr(each, name).detach() for each in alone])
        assert error(getattr(together, name).detach(), values) < 1e-8, name
    assert together.best_epochs == [epochs for each in alone for epochs in each.best_epochs]
    for name, values in alone[0].scores.items():
        expected = [each.scores[name][0] for each in alone]
        assert together.scores[name] == pytest.approx(expected), name
        assert len(values) == 1
    stages = [each.window_selector.stage for each in together.side_by_side.each]
    assert stages == [each.distiller.window_selector.stage for each in alone]
    assert together.trainer.callback_metrics["test/accuracy"] == pytest.approx(
        sum(each.scores["test/accuracy"][0] for each in alone) / 3
    )


def test_in_float32_a_run_of_replicas_is_close_to_those_of_its_seeds():
    together = fitted(replicas=2, dtype=torch.float32)
    alone = [fitted(seed=seed, dtype=torch.float32) for seed in (0, 1)]
    assert error(together.images.detach(), torch.cat([each.images.detach() for each in alone])) < 0.05


def test_random_real_images_and_distribution_matching_have_replicas_too():
    for kind, changes in ((FixedSet(), {"start": "random"}), (DistributionMatching(), {"compare_with_random": False})):
        changes["dtype"] = torch.float32
        together = fitted(seed=1, replicas=2, kind=kind, **changes)
        alone = [fitted(seed=seed, kind=kind, **changes) for seed in (1, 2)]
        assert error(together.images.detach(), torch.cat([each.images.detach() for each in alone])) < 1e-5
        assert together.scores["test/accuracy"] == pytest.approx([each.scores["test/accuracy"][0] for each in alone])


def test_the_best_of_a_replica_is_its_own_best_validation():
    made = module(replicas=3)
    made.log_dict, made._trainer = lambda values: None, trainer()
    validated = [[0.5, 0.9, 0.2], [0.7, 0.3, 0.2], [0.6, 0.8, 0.4]]  # of three validations, of each replica
    for number, accuracies in enumerate(validated):
        made.images.data.fill_(float(number))
        made._trained = [_Scored(accuracy) for accuracy in accuracies]
        made.on_validation_epoch_end()
    assert made.primary_metric.name == "val/accuracy_best"
    assert made.scores["val/accuracy_best"] == pytest.approx([0.7, 0.9, 0.4])
    with made.as_best():
        assert made.images.unflatten(0, (3, -1)).flatten(1).mean(1).tolist() == [1.0, 0.0, 2.0]
        assert made.best_epochs == [8, 3, 8]
        assert made.scores["val/accuracy"] == pytest.approx([0.7, 0.9, 0.4])
    assert made.images.unique().tolist() == [2.0]
    assert made.scores["val/accuracy"] == pytest.approx(validated[-1])


class _Scored:
    """Of accuracies above three quarters those after fewer epochs are best, else those after more."""

    def __init__(self, accuracy):
        self.accuracy = accuracy

    def accuracies(self):
        high = self.accuracy > 0.75
        return {"set": torch.tensor([[self.accuracy], [0.1]] if high else [[0.1], [self.accuracy]]).double()}


def test_a_replicated_run_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    def kind():
        return distiller(AdaptiveWindow(4, 2, patience_early=0.5, patience_late=0.5), classes_per_batch=None)

    whole, run = module(replicas=2, kind=kind()), trainer(3, check_val_every_n_epoch=1)
    whole.on_validation_end = lambda: run.save_checkpoint(tmp_path / "at.ckpt") if run.current_epoch == 1 else None
    run.fit(whole, digits())
    rest, run = module(replicas=2, kind=kind()), trainer(3, check_val_every_n_epoch=1)
    run.fit(rest, digits(), ckpt_path=tmp_path / "at.ckpt", weights_only=True)
    assert run.global_step == 6
    assert torch.equal(rest.images, whole.images)
    assert rest.scores == whole.scores
    assert all(torch.equal(rest._best[name], value) for name, value in whole._best.items())


def test_each_replica_is_exported_by_itself(tmp_path):
    made = module(replicas=2, dtype=torch.float32)
    trainer(1).fit(made, digits())
    paths = made.export(tmp_path)
    assert {path.relative_to(tmp_path).parts[0] for path in paths} == {"replica_0", "replica_1"}
    card = json.loads((tmp_path / "replica_1" / "card.json").read_text())
    assert card["images"] == [10, 1, 8, 8]
    assert card["scores"]["val/accuracy"] == made.scores["val/accuracy"][1]
    assert made.media("val")["images"].images.shape == (10, 1, 8, 8)


def test_a_run_folder_tells_what_each_replica_scored_and_keeps_the_best_of_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"model.init_args.replicas": 2, "trainer.max_epochs": 2, "trainer.limit_train_batches": 2}
    changes |= {"trainer.check_val_every_n_epoch": 1, "trainer.accelerator": "cpu", "trainer.logger": False}
    changes |= {"model.init_args.evaluation.init_args.epochs": [3, 6], "trainer.enable_progress_bar": False}
    run, made, data = leanlight.build("at_bptt/digits_small", changes)
    run.fit(made, data)
    run.test(made, data, verbose=False)
    (folder,) = tmp_path.glob("runs/at_bptt/digits/*")
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("val/accuracy", "test/accuracy"):
        values = summary["replicas"][name]
        assert len(values) == 2
        assert summary["metrics"][name] == pytest.approx(sum(values) / 2)
    best = leanlight.load(folder, "best")
    assert torch.equal(best.images, made._best["images"].flatten(0, 1))
    assert best.best_epochs == made._best["best_epochs"].tolist()


def test_loaders_that_know_no_replicas_are_refused():
    class Plain(ImageDataModule):
        def train_dataloader(self):
            return DataLoader(range(4))

    with pytest.raises(UserError, match="replicas: expected 1"):
        trainer().fit(module(replicas=2), Plain("digits", batch_size=400, seed=0))
