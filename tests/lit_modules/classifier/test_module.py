"""The image classifier in a Trainer, on scikit-learn's digits."""

import dataclasses
import functools

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from datamodules import ImageDataModule
from leanlight.contracts import Bars, HasTerms, Heatmap, ImageBatch, ImageGrid, MethodModule, PrimaryMetric, UserError
from lit_modules.classifier import ImageClassifier, distillation_loss
from lit_modules.nn import ConvNet, LinearClassifier, ResNet18, SpikingConvNet, pooled_features

make_convnet = functools.partial(ConvNet, in_channels=1, width=8, depth=2, image_size=8)
make_linear = functools.partial(LinearClassifier, image_size=8)
make_adam = functools.partial(torch.optim.Adam, lr=1e-2)


def trainer(**options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator="cpu", logger=False, **{"max_epochs": 3, "num_sanity_val_steps": 0, **quiet, **options}
    )


@pytest.fixture(scope="module")
def fitted():
    pl.seed_everything(0)
    module = ImageClassifier(make_convnet, make_adam)
    runner, data = trainer(max_epochs=5), ImageDataModule(dataset="digits", batch_size=64)
    runner.fit(module, data)
    metrics = {name: value.item() for name, value in runner.callback_metrics.items()}
    metrics |= runner.test(module, data, verbose=False)[0]
    return module, data, metrics, runner


@pytest.fixture(scope="module")
def checkpoint(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    fitted[3].save_checkpoint(path)
    return path


def probabilities(module, split):
    with torch.no_grad():
        return module.eval()(split.images.float() / 255).softmax(1).numpy()


def test_it_is_a_method_of_the_suite(fitted):
    module = fitted[0]
    assert isinstance(module, MethodModule)
    assert isinstance(module, HasTerms)
    assert module.primary_metric == PrimaryMetric("val/accuracy", "max")
    assert module.progress().unit == "step"
    assert module.progress().value == module.global_step > 0
    assert set(module.loss_terms()) == {"cross_entropy"}
    assert module.evaluation.example().shape == (2, 1, 8, 8)


def test_it_learns_and_logs_the_agreed_names(fitted):
    metrics = fitted[2]
    assert metrics["val/accuracy"] > 0.85
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} < set(metrics)
    assert {"test/accuracy", "test/loss", "test/top5_accuracy", "test/calibration_error"} < set(metrics)


def test_test_metrics_equal_those_computed_from_the_predictions(fitted):
    module, data, metrics, _ = fitted
    chances, labels = probabilities(module, data.test_split), data.test_split.labels.numpy()
    confidence, guess = chances.max(1), chances.argmax(1)
    assert metrics["test/accuracy"] == pytest.approx((guess == labels).mean())
    assert metrics["test/loss"] == pytest.approx(-np.log(chances[np.arange(len(labels)), labels]).mean(), rel=1e-4)
    assert metrics["test/top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, chances, k=5))
    matrix = confusion_matrix(labels, guess)
    assert metrics["test/accuracy_worst_class"] == pytest.approx((matrix.diagonal() / matrix.sum(1)).min())
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [
        abs((guess == labels)[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins)
    ]
    assert metrics["test/calibration_error"] == pytest.approx(sum(gaps), abs=1e-5)


def test_pictures_show_the_test_set(fitted):
    module, data, *_ = fitted
    chances, labels = probabilities(module, data.test_split), data.test_split.labels.numpy()
    media = module.media("test")
    heatmap, bars, mistakes, filters = (media[name] for name in ("confusion", "class_accuracy", "mistakes", "filters"))
    assert isinstance(heatmap, Heatmap)
    np.testing.assert_array_equal(heatmap.matrix, confusion_matrix(labels, chances.argmax(1)))
    assert isinstance(bars, Bars)
    assert bars.values["3"] == pytest.approx((chances.argmax(1) == 3)[labels == 3].mean())
    assert isinstance(mistakes, ImageGrid)
    wrong = np.flatnonzero(chances.argmax(1) != labels)
    by_confidence = wrong[np.argsort(-chances.max(1)[wrong])][:40]
    assert len(mistakes.images) == len(mistakes.captions) == len(by_confidence)
    torch.testing.assert_close(mistakes.images, data.test_split.images[by_confidence].float() / 255)
    first = by_confidence[0]
    assert mistakes.captions[0] == f"{labels[first]} → {chances[first].argmax()} {chances[first].max():.0%}"
    assert filters.images.shape == (8, 1, 3, 3)
    assert filters.images.min() == 0
    assert filters.images.max() == 1


def test_train_pictures_are_the_batch_that_was_trained_on(fitted):
    module, data, *_ = fitted
    images = module.media("train")["batch"].images
    known = {tuple(image) for image in data.train_split.images.flatten(1).tolist()}
    assert len(images) == 40
    assert all(tuple(image) in known for image in images.mul(255).round().int().flatten(1).tolist())


def test_predictions_carry_the_position_of_their_item(fitted):
    module, data, _, runner = fitted
    parts = runner.predict(module, data)
    index = torch.cat([part["index"] for part in parts])
    got = torch.cat([part["probabilities"] for part in parts])
    assert index.tolist() == list(range(len(data.test_split)))
    np.testing.assert_allclose(got.numpy(), probabilities(module, data.test_split), atol=1e-6)


def test_predictions_of_train_hold_what_selection_asks_for(fitted):
    module, data, _, runner = fitted
    data.predict_split = "train"
    try:
        parts = runner.predict(module, data)
    finally:
        data.predict_split = "test"
    got = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    split = data.train_split
    assert torch.equal(got["index"], torch.arange(len(split)))
    assert torch.equal(got["origin"], split.origin)
    assert torch.equal(got["label"], split.labels)
    image = split.images.float() / 255
    with torch.no_grad():
        expected = pooled_features(module.network.eval(), image)
        torch.testing.assert_close(got["embedding"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["logits"], module.network.head(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(got["probabilities"], got["logits"].softmax(1))


def test_a_network_without_features_is_predicted_all_the_same():
    data = ImageDataModule(dataset="digits")
    make = functools.partial(OnlyLogits, functools.partial(LinearClassifier, image_size=8))
    (part, *_) = trainer().predict(ImageClassifier(make), data)
    assert part.keys() == {"index", "origin", "label", "probabilities", "logits"}


class OnlyLogits(torch.nn.Module):
    """A network that shows nothing of its inside."""

    def __init__(self, make):
        super().__init__()
        self.network = make()

    def forward(self, image):
        return self.network(image)


@pytest.mark.parametrize("distilled", [False, True])
def test_items_of_weight_zero_do_not_train(checkpoint, distilled):
    teaching = {"teacher_checkpoint": checkpoint, "distill_weight": 0.5} if distilled else {}

    def trained(weight, labels):
        pl.seed_everything(0)
        data = ImageDataModule(dataset="digits", batch_size=64)
        data.setup()
        data.train_split = dataclasses.replace(data.train_split, labels=labels(data.train_split), weight=weight)
        module = ImageClassifier(make_linear, make_adam, label_smoothing=0.1, **teaching)
        trainer(max_epochs=1, limit_val_batches=0).fit(module, data)
        return module.network.head.weight.detach()

    size = 1293
    weight = (torch.arange(size) % 3 > 0).float()
    wrong = trained(weight, lambda split: torch.where(weight > 0, split.labels, 9 - split.labels))
    right = trained(weight, lambda split: split.labels)
    assert torch.equal(wrong, right)
    assert not torch.equal(trained(None, lambda split: split.labels), right)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (functools.partial(make_convnet, num_classes=7), ["num_classes", "10", "7"]),
        (functools.partial(make_convnet, in_channels=3), ["network:", "in_channels 1", "(1, 8, 8)"]),
        (functools.partial(make_convnet, image_size=32), ["network:", "image_size 8"]),
        (functools.partial(LinearClassifier, image_size=28), ["network:", "image_size 8"]),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_one_line(network, words):
    with pytest.raises(UserError) as caught:
        trainer().fit(ImageClassifier(network), ImageDataModule(dataset="digits"))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_loaders_without_a_datamodule_are_refused():
    with pytest.raises(UserError, match="DataModule"):
        trainer().fit(ImageClassifier(make_linear), [])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"distill_weight": 1.5}, "distill_weight"),
        ({"distill_weight": 0.5, "distill_temperature": 0.0}, "distill_temperature"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"teacher_checkpoint": "teacher.ckpt"}, "distill_weight"),
    ],
)
def test_a_setting_out_of_range_names_its_key(options, name):
    with pytest.raises(UserError, match=rf"^{name}: "):
        ImageClassifier(make_linear, **options)


def test_a_missing_teacher_names_the_pipeline_that_trains_one(tmp_path):
    module = ImageClassifier(make_linear, teacher_checkpoint=tmp_path / "none.ckpt", distill_weight=0.5)
    with pytest.raises(UserError, match="leanlight run classifier/pipelines/fashion_mnist_small"):
        trainer().fit(module, ImageDataModule(dataset="digits"))


def test_a_file_that_is_no_classifier_is_refused_as_teacher(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"teacher_checkpoint.*other\.ckpt"):
        trainer().fit(
            ImageClassifier(make_linear, teacher_checkpoint=path, distill_weight=0.5), ImageDataModule(dataset="digits")
        )


def test_a_distilled_student_follows_the_teacher_and_not_the_labels(checkpoint):
    pl.seed_everything(0)
    student = ImageClassifier(
        make_convnet, make_adam, teacher_checkpoint=checkpoint, distill_weight=1.0, distill_temperature=2.0
    )
    data = ImageDataModule(dataset="digits", batch_size=64)
    state = {name: value.clone() for name, value in student.network.state_dict().items()}
    trainer(max_epochs=1, limit_val_batches=0).fit(student, data)
    assert any(not torch.equal(state[name], value) for name, value in student.network.state_dict().items())
    teacher = ImageClassifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
    image = data.train_split.images[:16].float() / 255
    losses = []
    for label in (data.train_split.labels[:16], torch.zeros(16, dtype=torch.int64)):
        student.log_dict = lambda *args, **options: None
        losses.append(student.training_step(ImageBatch(image, label, torch.arange(16)), 1))
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[0], distillation_loss(student(image), teacher(image), 2.0))
    assert set(student.loss_terms()) == {"cross_entropy", "distillation"}


def test_the_teacher_stays_frozen_and_out_of_the_checkpoint(checkpoint, tmp_path):
    student = ImageClassifier(make_linear, make_adam, teacher_checkpoint=checkpoint, distill_weight=0.5)
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    runner = trainer(max_epochs=1, limit_val_batches=0)
    runner.fit(student, ImageDataModule(dataset="digits"))
    runner.save_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"network.{name}" for name in student.network.state_dict()}
    after = student._teacher.network.state_dict()
    assert all(torch.equal(before[f"network.{name}"], value) for name, value in after.items())
    # The teacher's file may be gone when the student is used.
    checkpoint.rename(tmp_path / "moved.ckpt")
    try:
        ImageClassifier.load_from_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    finally:
        (tmp_path / "moved.ckpt").rename(checkpoint)


def test_loading_a_teacher_does_not_change_the_training_of_the_student(checkpoint):
    def weights(**options):
        pl.seed_everything(5)
        module = ImageClassifier(make_linear, make_adam, **options)
        trainer(max_steps=1, limit_val_batches=0).fit(module, ImageDataModule(dataset="digits", augment="shift"))
        return module.network.head.weight.detach(), torch.get_rng_state()

    plain, state = weights()
    taught, same_state = weights(teacher_checkpoint=checkpoint, distill_weight=1e-9)
    torch.testing.assert_close(plain, taught, rtol=1e-4, atol=1e-6)
    assert torch.equal(state, same_state)


def test_label_smoothing_changes_training_but_not_the_validation_loss(fitted):
    module, data, *_ = fitted
    smooth = ImageClassifier(make_convnet, label_smoothing=0.1)
    smooth.network.load_state_dict(module.network.state_dict())
    runner = trainer()
    assert runner.validate(smooth, data, verbose=False)[0]["val/loss"] == pytest.approx(fitted[2]["val/loss"], rel=1e-5)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_the_schedule_counts_what_lr_interval_says(interval):
    halve = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    module = ImageClassifier(make_linear, functools.partial(torch.optim.SGD, lr=1.0), halve, interval)
    runner = trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=0)
    runner.fit(module, ImageDataModule(dataset="digits"))
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.25 if interval == "epoch" else 0.5**6)


def test_channels_last_gives_the_same_answers():
    torch.manual_seed(0)
    image = torch.rand(2, 1, 8, 8)
    plain = ImageClassifier(functools.partial(ResNet18, in_channels=1, width=8)).eval()
    other = ImageClassifier(functools.partial(ResNet18, in_channels=1, width=8), channels_last=True).eval()
    other.load_state_dict(plain.state_dict())
    assert other.network.features[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain(image), other(image), rtol=1e-4, atol=1e-5)


def test_a_spiking_network_trains_through_the_same_module():
    pl.seed_everything(0)
    make = functools.partial(SpikingConvNet, width=8, depth=2, image_size=8)
    runner = trainer()
    runner.fit(ImageClassifier(make, functools.partial(torch.optim.Adam, lr=1e-2)), ImageDataModule(dataset="digits"))
    assert runner.callback_metrics["val/accuracy"] > 0.7
