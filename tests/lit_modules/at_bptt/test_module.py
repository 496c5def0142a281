"""Distillation as a whole: what it learns, what it scores, what it writes."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from datamodules import DistilledDataModule, ImageDataModule, ImageFolderStream
from leanlight.contracts import UserError, isolated_rng
from leanlight.ops.differentiable import ALL_AUGMENTATIONS, DIFFERENTIABLE, siamese_dsa
from leanlight.ops.whitening import apply_zca, fit_zca
from lit_modules.at_bptt import (
    AdaptiveWindow,
    DatasetDistillation,
    DistributionMatching,
    Evaluation,
    FixedSet,
    InnerOptimizer,
    TruncatedBPTT,
)
from lit_modules.at_bptt.clipping import clip_by_average
from lit_modules.at_bptt.dd_ranking import label_robust_score
from lit_modules.at_bptt.distillers import Task
from lit_modules.at_bptt.evaluation import train_networks
from lit_modules.at_bptt.inner import SyntheticData
from lit_modules.at_bptt.synthetic import noise_images
from lit_modules.at_bptt.together import Course
from lit_modules.classifier import ImageClassifier
from lit_modules.classifier.training import Recipe, accuracy, train_and_score
from lit_modules.nn import MLP, ConvNet, pooled_features

MAKE = {"in_channels": 1, "num_classes": 10, "image_size": 8, "mean": 0.0, "std": 1.0}
NETWORK = functools.partial(ConvNet, width=8, depth=2, **MAKE)
RECIPE = Recipe(lr=0.02, batch_size=512)


def module(distiller=None, **changes):
    distiller = distiller or TruncatedBPTT(
        inner_steps=12,
        selector=AdaptiveWindow(4, 1),
        inner_optimizer=InnerOptimizer(lr=0.02),
        augment=None,
        outer_augment=None,
    )
    settings = {
        "network": NETWORK,
        "image_shape": (1, 8, 8),
        "ipc": 1,
        "learn_labels": not isinstance(distiller, (FixedSet, DistributionMatching)),
        "optimizer": functools.partial(torch.optim.Adam, lr=0.02),
        "evaluation": Evaluation(2, (10, 30), RECIPE),
        "seed": 0,
    }
    return DatasetDistillation(distiller=distiller, **{**settings, **changes})


def trainer(epochs=1, **changes):
    return Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": epochs,
            **changes,
        }
    )


def digits(**changes):
    return ImageDataModule(dataset="digits", **{"batch_size": 256, **changes})


def test_a_distilled_set_beats_real_images_of_the_same_number():
    distiller = TruncatedBPTT(
        inner_steps=30,
        selector=AdaptiveWindow(8, 3),
        inner_optimizer=InnerOptimizer(lr=0.01),
        augment=None,
        outer_augment=None,
    )
    model, run = (
        module(
            distiller,
            network=functools.partial(MLP, hidden=[32], **MAKE),
            preprocess="standardize",
            mean=0.305,
            std=0.376,
            optimizer=functools.partial(torch.optim.Adam, lr=0.1),
            evaluation=Evaluation(4, (100, 200), Recipe(lr=0.01, batch_size=512)),
            full_recipe=Recipe(epochs=10, lr=0.01),
            architectures={"wide": functools.partial(MLP, hidden=[64], **MAKE)},
        ),
        trainer(30),
    )
    run.fit(model, digits())
    (metrics,) = run.test(model, digits(), verbose=False)
    assert metrics["test/accuracy"] > metrics["test/accuracy_random"] + 0.04
    assert metrics["test/ior"] == pytest.approx(metrics["test/accuracy"] - metrics["test/accuracy_random_soft"])
    assert metrics["test/above_random"] == pytest.approx(metrics["test/accuracy"] - metrics["test/accuracy_random"])
    assert metrics["test/accuracy_full"] > metrics["test/accuracy"]
    assert metrics["test/hlr"] == pytest.approx(metrics["test/accuracy_full"] - metrics["test/accuracy_hard_labels"])
    assert metrics["test/lrs"] == pytest.approx(label_robust_score(metrics["test/ior"], metrics["test/hlr"]))
    assert metrics["test/accuracy_on_wide"] > metrics["test/accuracy_random"]
    assert metrics["test/accuracy_best_on_test"] >= metrics["test/accuracy"]
    assert model.labels.min() >= 0
    assert set(model.media("test")) >= {"images", "window", "stage", "labels"}


def test_distribution_matching_brings_the_class_means_of_features_together():
    torch.manual_seed(0)
    image, label = torch.randn(200, 1, 8, 8), torch.arange(200) % 10
    distiller = DistributionMatching(augment=False)
    distiller.prepare(Task(NETWORK, 10, 2, 1, False))
    images = torch.randn(20, 1, 8, 8)
    losses = []
    for seed in range(60):
        step = distiller.outer_step(SyntheticData(images, torch.zeros(20, 10)), image, label, seed)
        losses.append(float(step.loss))
        images = images - 0.3 * step.images
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_distribution_matching_s_loss_is_the_distance_of_class_means_without_classes_that_are_missing():
    image, label = torch.randn(30, 1, 8, 8), torch.arange(30) % 9  # no image of class 9
    data = SyntheticData(torch.randn(20, 1, 8, 8), torch.zeros(20, 10))
    distiller = DistributionMatching(augment=False)
    distiller.prepare(Task(NETWORK, 10, 2, 1, False))
    with isolated_rng(5):
        network = NETWORK()
    real, synthetic = pooled_features(network, image), pooled_features(network, data.images)
    expected = sum(
        (real[label == c].mean(0) - synthetic[2 * c : 2 * c + 2].mean(0)).square().sum() for c in range(9)
    ).detach()
    assert float(distiller.outer_step(data, image, label, 5).loss) == pytest.approx(float(expected), rel=1e-4)


def test_a_fixed_set_holds_whitened_real_images_and_stays_as_it_is():
    data, model = digits(), module(FixedSet(), start="random", compare_with_random=False)
    trainer().fit(model, data)
    real = apply_zca(data.train_split.images.float() / 255, model.preprocessing.whitening)
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(model.images.detach().flatten(1), real.flatten(1), compute_mode=exact).min(1)
    assert distance.values.max() < 1e-5
    assert torch.equal(data.train_split.labels[distance.indices], torch.arange(10))


def test_gradients_are_clipped_by_the_moving_average_of_their_norm():
    average, expected = torch.tensor(torch.nan), None
    for norm in (1.0, 1.0, 10.0, 1.0):
        gradient = torch.zeros(3, 4)
        gradient[0, 0] = norm
        clipped, average = clip_by_average(gradient, gradient.norm(), average, 2.0, 0.9)
        expected = norm if expected is None else 0.9 * expected + 0.1 * norm
        assert float(average) == pytest.approx(expected)
        assert float(clipped.norm()) == pytest.approx(min(norm, 2 * expected))


def test_the_score_in_a_run_is_that_of_train_and_score_and_of_a_classifier_on_the_exported_set(tmp_path):
    recipe, model, data = Recipe(epochs=30, lr=0.02, batch_size=512), module(compare_with_random=False), digits()
    model.evaluation = Evaluation(1, (30,), recipe)
    run = trainer(2)
    run.fit(model, data)
    seed = model._seed(0, "judge", 0)
    test = model.preprocessing(data.test_split.images), data.test_split.labels
    (score,) = train_and_score((model.images.detach(), model.labels.detach()), NETWORK, recipe, [seed], test)
    (metrics,) = run.test(model, data, verbose=False)
    assert metrics["test/accuracy"] == pytest.approx(score, abs=1e-6)

    model.export(tmp_path)
    distilled = DistilledDataModule(tmp_path, dataset="digits", batch_size=512)
    with isolated_rng(seed):
        classifier = ImageClassifier(NETWORK, functools.partial(torch.optim.Adam, lr=0.02))
    judge = trainer(30, check_val_every_n_epoch=30)
    judge.fit(classifier, distilled)
    (metrics,) = judge.test(classifier, distilled, verbose=False)
    assert metrics["test/accuracy"] == pytest.approx(score, abs=0.005)
    assert distilled.meta.counts["train"] == 10


def test_copies_after_fewer_epochs_see_the_same_training_at_different_times():
    data = torch.randn(10, 1, 8, 8), torch.arange(10)
    early, late = train_networks(data, NETWORK, Course(Recipe(epochs=20), (5, 20)), 3)
    (alone,) = train_networks(data, NETWORK, Course(Recipe(epochs=5), (5,)), 3)
    assert all(torch.equal(a, b) for a, b in zip(early.state_dict().values(), alone.state_dict().values(), strict=True))
    assert accuracy(late, data) > accuracy(early, data) - 0.2


def test_with_steps_each_mini_batch_is_one_of_inner_training_s_kind():
    seen = []

    class Watching(nn.Linear):
        def forward(self, image):
            seen.append(image[:, 0, 0, 0].long())
            return super().forward(image.flatten(1))

    data = torch.arange(20.0).view(20, 1, 1, 1), torch.arange(10).repeat_interleave(2)
    evaluation = Evaluation(1, recipe=Recipe(lr=0.1), steps=(10, 40), classes_per_batch=3, images_per_class=1)
    train_networks(data, lambda: Watching(1, 10), evaluation.course(10, 2), 0)
    assert len(seen) == 40
    assert all(len(index) == 3 == len((index // 2).unique()) for index in seen)
    assert torch.cat(seen).unique().numel() == 20


def test_steps_of_the_whole_set_are_those_of_plain_pytorch():
    data, make = (torch.randn(10, 1, 8, 8), torch.rand(10, 10)), functools.partial(MLP, hidden=[6], **MAKE)
    course = Evaluation(1, recipe=Recipe(lr=0.1), steps=(4, 9)).course(10, 1)
    with isolated_rng(5):
        network = make()
    optimizer, expected = torch.optim.Adam(network.parameters(), 0.1), []
    for step in range(1, 10):
        optimizer.zero_grad()
        F.cross_entropy(network(data[0]), data[1]).backward()
        optimizer.step()
        if step in (4, 9):
            expected.append([value.detach().clone() for value in network.parameters()])
    for values, got in zip(expected, train_networks(data, make, course, 5), strict=True):
        for value, parameter in zip(values, got.parameters(), strict=True):
            torch.testing.assert_close(parameter, value, rtol=1e-4, atol=1e-5)


def test_a_set_evaluated_in_steps_says_so(tmp_path):
    evaluation = Evaluation(1, recipe=RECIPE, steps=(2, 5), classes_per_batch=4)
    model, run, data = module(evaluation=evaluation), trainer(limit_train_batches=1), digits()
    run.fit(model, data)
    (metrics,) = run.test(model, data, verbose=False)
    assert metrics["test/steps"] == model.scores["val/best_steps"][0] in (2.0, 5.0)
    assert "test/epochs" not in metrics
    model.export(tmp_path)
    recipe = json.loads((tmp_path / "card.json").read_text())["recipe"]
    assert recipe["steps"] == metrics["test/steps"]
    assert recipe["classes_per_batch"] == 4
    assert not {"epochs", "batch_size"} & set(recipe)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": (3,), "steps": (3,)}, "epochs: expected null beside steps"),
        ({"steps": (5, 3)}, "steps: expected ascending"),
        ({"epochs": ()}, "epochs: expected ascending"),
        ({"images_per_class": 3}, "images_per_class: expected null where epochs count"),
    ],
)
def test_lengths_of_evaluation_are_epochs_or_steps(settings, words):
    with pytest.raises(UserError, match=words):
        Evaluation(1, **settings)
    assert Evaluation(1).lengths == (300, 600, 1000, 3000)


def test_an_export_trains_in_plain_pytorch_and_reads_as_a_folder(tmp_path):
    model, data = module(FixedSet(), start="random"), digits()
    trainer().fit(model, data)
    model.export(tmp_path)
    tensors, card = load_file(tmp_path / "distilled.safetensors"), json.loads((tmp_path / "card.json").read_text())
    assert torch.equal(tensors["images"], model.images.detach())
    flat = data.test_split.images.flatten(1).float() / 255
    flat = flat - flat.mean(1, keepdim=True)
    test = (flat / flat.norm(dim=1, keepdim=True)) @ tensors["whitening"]
    assert torch.allclose(test.view(-1, 1, 8, 8), model.preprocessing(data.test_split.images), atol=1e-6)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), card["recipe"]["lr"])
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(tensors["images"]), tensors["labels"]).backward()
        optimizer.step()
    assert (network(test).argmax(1) == data.test_split.labels).float().mean() > 0.3
    rows = [json.loads(line) for line in (tmp_path / "dataset" / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == list(range(10))
    assert np.asarray(Image.open(tmp_path / "dataset" / rows[3]["file_name"])).shape == (8, 8)
    assert Image.open(tmp_path / "images.png").size == (9, 90)


def test_the_export_folder_loads_with_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra vision")
    model = module()
    trainer().fit(model, digits())
    model.export(tmp_path)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "dataset"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 10
    assert loaded["train"][2]["label"] == 2


def test_whitening_makes_the_second_moment_the_identity_up_to_its_strength():
    images = (torch.rand(500, 1, 4, 4) * 255).byte()
    flat = images.flatten(1).double().numpy()
    flat = flat - flat.mean(1, keepdims=True)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(flat.T @ flat / 500)
    expected = vectors @ np.diag((np.maximum(values, 0) + 0.1 * values.mean()) ** -0.5) @ vectors.T
    matrix = fit_zca(images, 0.1)
    assert np.allclose(matrix.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert np.allclose(apply_zca(images.float(), matrix).flatten(1).numpy(), flat @ expected, atol=1e-4)


def test_differentiable_augmentations_follow_their_generator_and_pass_gradients():
    image = torch.randn(6, 3, 16, 16, requires_grad=True)
    for name, augment in ALL_AUGMENTATIONS.items():
        first, again = (augment(image, torch.Generator().manual_seed(2)) for _ in range(2))
        assert first.shape == image.shape, name
        assert torch.equal(first, again), name
        if name in DIFFERENTIABLE:
            (gradient,) = torch.autograd.grad(first.square().sum(), image)
            assert gradient.abs().sum() > 0, name


def test_a_rotation_equals_that_of_torchvision():
    from torchvision.transforms.functional import InterpolationMode, rotate

    image = torch.rand(1, 1, 17, 17)
    generator = torch.Generator().manual_seed(4)
    turned = DIFFERENTIABLE["rotate"](image, torch.Generator().manual_seed(4))
    torch.randint(1, (), generator=generator)
    degrees = 15 * (2 * float(torch.rand(1, 1, 1, 1, generator=generator)) - 1)
    assert torch.allclose(turned, rotate(image, degrees, InterpolationMode.BILINEAR), atol=1e-4)


def test_siamese_augmentation_treats_batches_of_any_size_alike():
    image = torch.randn(1, 3, 16, 16)
    for seed in range(12):
        one = siamese_dsa(image, torch.Generator().manual_seed(seed))
        many = siamese_dsa(image.expand(5, -1, -1, -1), torch.Generator().manual_seed(seed))
        assert torch.allclose(many, one.expand_as(many), atol=1e-6)


def test_noise_images_have_norm_one():
    images = noise_images(7, (3, 5, 5), torch.Generator().manual_seed(0))
    assert torch.allclose(images.flatten(1).norm(dim=1), torch.ones(7))


def test_lrs_runs_from_0_to_1():
    assert label_robust_score(1.0, -1.0) == pytest.approx(1.0)
    assert label_robust_score(-1.0, 1.0) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ipc": 0}, "ipc"),
        ({"clip": -1.0}, "clip"),
        ({"num_classes": 7}, "num_classes"),
        ({"ipc": 1000, "start": "random"}, "ipc"),
        ({"distiller": DistributionMatching(), "learn_labels": True}, "learn_labels"),
        ({"distiller": TruncatedBPTT(inner_steps=3)}, "window"),
        ({"evaluation": Evaluation(1, steps=(3,), images_per_class=2)}, "images_per_class: expected 1 to 1"),
        ({"network": functools.partial(ConvNet, norm="batch", **MAKE)}, "batch norm"),
        ({"network": functools.partial(ConvNet, **{**MAKE, "num_classes": 9})}, "num_classes"),
    ],
)
def test_bad_settings_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        trainer().fit(module(**changes), digits())


def picture_folders(root):
    """Grey squares, bright for one class and dark for the other, as PNG files; returns the folder."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 6)):
        for label, level in (("bright", 200), ("dark", 40)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(level - 30, level + 30, (10, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def streamed(root):
    return ImageFolderStream(root, image_size=8, batch_size=16, num_workers=0, val_fraction=0.2)


def streamed_module(**changes):
    network = functools.partial(ConvNet, 3, 2, width=8, depth=2, image_size=8, mean=0.0, std=1.0)
    settings = {"network": network, "num_classes": 2, "preprocess": "standardize", "mean": 0.47, "std": 0.32}
    return module(image_shape=(3, 8, 8), **{**settings, "compare_with_random": False, **changes})


def test_a_stream_of_pictures_is_distilled_and_tested(tmp_path):
    model, data, run = streamed_module(), streamed(picture_folders(tmp_path)), trainer(4)
    run.fit(model, data)
    (metrics,) = run.test(model, data, verbose=False)
    assert metrics["test/accuracy"] > 0.9
    assert "test/accuracy_random" not in metrics


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preprocess": "zca"}, "preprocess: zca needs .* ImageFolderStream .* standardize"),
        ({"start": "herding"}, "start: herding needs .* noise"),
        ({"compare_with_random": True}, "compare_with_random: true needs .* false"),
        ({"full_recipe": RECIPE}, "full_recipe: .* needs .* null"),
    ],
)
def test_what_needs_images_in_memory_is_refused_before_training_on_a_stream(tmp_path, changes, words):
    model, data = streamed_module(**changes), streamed(picture_folders(tmp_path))
    with pytest.raises(UserError, match=words):
        trainer().fit(model, data)
    assert model.global_step == 0
    if "needs" in words and not changes.keys() & {"preprocess", "start"}:
        with pytest.raises(UserError, match=words):
            trainer().test(model, data)


def test_a_network_without_features_is_refused_for_distribution_matching():
    network = functools.partial(nn.Linear, 8, 10)
    with pytest.raises(UserError, match="network: expected one with forward_features"):
        DistributionMatching().prepare(Task(network, 10, 1, 1, False))


def test_pictures_show_the_set_and_what_the_distiller_chose():
    model = module()
    trainer(2, check_val_every_n_epoch=1).fit(model, digits())
    items = model.media("val")
    assert set(items) == {"images", "labels", "window", "stage", "entropy", "accuracy", "inner_gradient_norm"}
    assert items["images"].images.shape == (10, 1, 8, 8)
    assert items["inner_gradient_norm"].series["this epoch's probe"] == model.distiller.choice["norms"].tolist()
    start, end = items["window"].series["start"], items["window"].series["end"]
    assert all(3 <= last - first <= 5 for first, last in zip(start, end, strict=True))
    assert not module(FixedSet()).distiller.media()


def test_a_distilled_set_of_other_data_is_refused(tmp_path):
    model = module()
    trainer().fit(model, digits())
    model.export(tmp_path)
    with pytest.raises(UserError, match="images of shape"):
        DistilledDataModule(tmp_path, dataset="fashion_mnist", variant="subset").setup()
    with pytest.raises(UserError, match="leanlight export"):
        DistilledDataModule(tmp_path / "none", dataset="digits").ensure_available()


def test_a_resumed_distillation_fits_no_whitening_and_keeps_its_images(tmp_path, monkeypatch):
    fitted = []

    def counting(images, *args, **kwargs):
        fitted.append(len(images))
        return fit_zca(images, *args, **kwargs)

    monkeypatch.setattr("lit_modules.at_bptt.preprocessing.fit_zca", counting)
    first, data = module(FixedSet(), start="random"), ImageDataModule("digits", batch_size=500, seed=0)
    run = trainer(limit_val_batches=0)
    run.fit(first, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert len(fitted) == 1
    again = module(FixedSet(), start="random", seed=1)
    trainer(2, limit_val_batches=0).fit(again, data, ckpt_path=tmp_path / "last.ckpt")
    assert len(fitted) == 1
    assert torch.equal(again.images, first.images)  # those of another seed would be others
    assert torch.equal(again.preprocessing.whitening, first.preprocessing.whitening)
    trainer(limit_val_batches=0).fit(again, data)  # a fit of its own starts anew
    assert len(fitted) == 2
