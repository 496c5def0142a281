"""Distillers of gradients, trajectories and statistics: their losses against plain loops, runs that go on exactly."""

import copy
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from datamodules import ImageDataModule
from leanlight.contracts import UserError, derived_seed, isolated_rng
from lit_modules.at_bptt import (
    DatasetDistillation,
    Evaluation,
    GradientMatching,
    SqueezeRecoverRelabel,
    TrajectoryMatching,
)
from lit_modules.at_bptt.difficulty import DifficultyAlignment, mean_logits, rightly_labelled
from lit_modules.at_bptt.distillers import Study, Task
from lit_modules.at_bptt.gradient_matching import gradient_distance
from lit_modules.at_bptt.inner import SyntheticData
from lit_modules.classifier.training import Recipe, train
from lit_modules.nn import MLP, ConvNet

MAKE = {"in_channels": 1, "num_classes": 3, "image_size": 8, "mean": 0.0, "std": 1.0}
NETWORK = functools.partial(ConvNet, width=4, depth=1, **MAKE)
TASK = Task(NETWORK, 3, 2, 1, False)
EXPERTS = Recipe(epochs=3, batch_size=16, lr=0.05, optimizer="sgd", momentum=0.0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(classes=3):
    """A set of two images a class, and real images without any of the last class but `classes`."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 1, 8, 8, generator=generator)
    real = torch.randn(20, 1, 8, 8, generator=generator)
    return SyntheticData(images, torch.eye(3).repeat_interleave(2, 0)), real, torch.arange(20) % classes


def test_the_distance_of_gradients_is_one_minus_cosine_of_each_output_node(double):
    one, other = ([torch.randn(shape) for shape in ((4, 3, 2, 2), (4,), (5, 7), (5,))] for _ in range(2))
    expected = 0.0
    for a, b in zip(one, other, strict=True):
        if a.dim() == 1:
            continue
        for node in range(len(a)):
            u, v = a[node].reshape(-1), b[node].reshape(-1)
            expected += 1 - float(u @ v) / (float(u.norm()) * float(v.norm()))
    assert float(gradient_distance(one, other)) == pytest.approx(expected, abs=1e-5)
    assert float(gradient_distance(one, one)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("classes", [3, 2])
def test_an_outer_step_of_gradient_matching_is_autograd_s_of_the_sum_over_classes(double, classes):
    data, real, label = problem(classes)
    distiller = GradientMatching()
    distiller.prepare(TASK)
    distiller.choice = {"seed": 5, "networks": 0}
    step = distiller.outer_step(data, real, label, 1)
    with isolated_rng(derived_seed(5, "network", 0)):
        network = NETWORK()
    leaf, loss = data.images.clone().requires_grad_(), torch.zeros(())
    for c in range(classes):
        grads = []
        for images in (real[label == c], leaf[2 * c : 2 * c + 2]):
            target = torch.full((len(images),), c)
            grads.append(
                torch.autograd.grad(F.cross_entropy(network(images), target), network.parameters(), create_graph=True)
            )
        for a, b in zip(*grads, strict=True):
            if a.dim() > 1:
                loss = loss + (1 - F.cosine_similarity(a.flatten(1).detach(), b.flatten(1))).sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    assert float(step.loss) == pytest.approx(float(loss.detach()), rel=1e-3)
    assert F.cosine_similarity(step.images.flatten(), expected.flatten(), dim=0) > 0.9999
    assert (step.images[2 * classes :] == 0).all()


def test_real_and_synthetic_images_that_are_the_same_match_under_siamese_augmentation():
    data, _, _ = problem()
    distiller = GradientMatching(augment=True)
    distiller.prepare(TASK)
    label = torch.arange(3).repeat_interleave(2)
    losses = [float(distiller.outer_step(data, data.images, label, seed).loss) for seed in range(8)]
    assert max(losses) < 0.05
    assert float(distiller.outer_step(data, data.images.flip(0), label, 0).loss) > 1


def test_a_network_trains_on_the_set_between_outer_steps_and_is_then_replaced():
    data, real, label = problem()
    distiller = GradientMatching(outer_loop=2, inner_loop=3, lr=0.1, momentum=0.5)
    distiller.prepare(TASK)
    distiller.choice = {"seed": 5, "networks": 0}
    distiller.outer_step(data, real, label, 1)
    with isolated_rng(derived_seed(5, "network", 0)):
        network = NETWORK()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(data.images), torch.arange(3).repeat_interleave(2)).backward()
        optimizer.step()
    distiller.updated(data, None)
    trained = nn.utils.parameters_to_vector(distiller._network.parameters())
    assert torch.allclose(trained, nn.utils.parameters_to_vector(network.parameters()), atol=1e-5)
    distiller.updated(data, None)
    assert distiller._network is None
    assert distiller.choice["networks"] == 1


def study(distiller, folder, task=TASK):
    """Let it train its experts on the real images of `problem`."""
    _, real, label = problem()
    distiller.prepare(task)
    distiller.study(Study((real, label), folder, 3))
    return distiller


def test_an_outer_step_of_trajectory_matching_is_autograd_s_of_a_plain_unrolled_loop(double, tmp_path):
    network = functools.partial(MLP, hidden=[5], **MAKE)
    task = Task(network, 3, 2, 1, True)
    settings = {
        "experts": 1,
        "recipe": EXPERTS,
        "steps": 4,
        "expert_epochs": 2,
        "max_start": 1,
        "lr": 0.1,
        "augment": None,
    }
    distiller, (data, real, label) = study(TrajectoryMatching(**settings), tmp_path, task), problem()
    step = distiller.outer_step(data, real, label, 11)
    begin = int(torch.randint(2, (2,), generator=torch.Generator().manual_seed(11))[1])
    start, target = distiller._experts.after(0, (begin, begin + 2), torch.device("cpu"))
    images, labels, rate = (value.clone().requires_grad_() for value in (data.images, data.labels, torch.tensor(0.1)))
    student = network()
    names, shapes = zip(*((name, value.shape) for name, value in student.named_parameters()), strict=True)
    pieces = start.split([shape.numel() for shape in shapes])
    weights = {n: p.view(s).clone().requires_grad_() for n, p, s in zip(names, pieces, shapes, strict=True)}
    for _ in range(4):
        logits = torch.func.functional_call(student, weights, images)
        loss = -(labels * logits.log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {n: w - rate * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
    end = torch.cat([value.flatten() for value in weights.values()])
    loss = ((end - target) ** 2).sum() / ((start - target) ** 2).sum()
    expected = torch.autograd.grad(loss, [images, labels, rate])
    assert float(step.loss) == pytest.approx(float(loss.detach()), rel=1e-9)
    for got, wanted in zip((step.images, step.labels, step.own.squeeze(0)), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-8, atol=1e-12)


def test_steps_of_a_student_go_through_the_set_in_batches():
    seen = []

    class Seeing(nn.Linear):
        def forward(self, image):
            seen.append(image[:, 0, 0, 0].tolist())
            return super().forward(image.flatten(1))

    distiller = TrajectoryMatching(recipe=EXPERTS, steps=4, batch_size=4, augment=None, max_start=1, expert_epochs=1)
    distiller.prepare(Task(functools.partial(Seeing, 64, 3), 3, 2, 1, False))
    data = SyntheticData(
        torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 8, 8) / 64, torch.eye(3).repeat_interleave(2, 0)
    )
    distiller.student(data, torch.zeros(195), torch.tensor(0.1), torch.Generator().manual_seed(0))
    assert [len(batch) for batch in seen] == [4, 2, 4, 2]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == [value / 64 for value in range(6)]


def test_an_expert_is_what_its_recipe_makes_of_real_images_and_is_trained_once(tmp_path):
    settings = {"experts": 2, "recipe": EXPERTS, "expert_epochs": 1, "max_start": 1, "augment": None}
    distiller, (_, real, label) = study(TrajectoryMatching(**settings), tmp_path), problem()
    seed = derived_seed(3, "expert", 1)
    torch.manual_seed(seed)
    network = NETWORK()
    for _ in range(3):
        for index in torch.randperm(20).split(16):
            gradients = torch.autograd.grad(F.cross_entropy(network(real[index]), label[index]), network.parameters())
            with torch.no_grad():
                for weight, gradient in zip(network.parameters(), gradients, strict=True):
                    weight -= 0.05 * gradient
    _, end = distiller._experts.after(1, (0, 3), torch.device("cpu"))
    assert torch.allclose(end, nn.utils.parameters_to_vector(network.parameters()), atol=1e-6)
    files = sorted((tmp_path / "experts").iterdir())
    assert [file.name for file in files] == ["expert_000.safetensors", "expert_001.safetensors"]
    kept, times = files[0].read_bytes(), files[1].stat().st_mtime_ns
    files[0].unlink()
    study(TrajectoryMatching(**settings), tmp_path)
    assert files[0].read_bytes() == kept
    assert files[1].stat().st_mtime_ns == times
    study(TrajectoryMatching(**settings | {"recipe": Recipe(**{**vars(EXPERTS), "lr": 0.01})}), tmp_path)
    assert files[1].stat().st_mtime_ns != times


def test_the_learning_rate_of_the_steps_is_learned_by_sgd_with_momentum():
    distiller = TrajectoryMatching(lr=0.5, lr_rate=0.1, lr_momentum=0.5)
    distiller.prepare(TASK)
    rate = torch.tensor([0.5], requires_grad=True)
    optimizer = torch.optim.SGD([rate], 0.1, 0.5)
    for gradient in (1.0, -2.0, 0.5):
        rate.grad = torch.tensor([gradient])
        optimizer.step()
        distiller.updated(problem()[0], torch.tensor([gradient]))
    distiller.start_epoch(problem()[0], 0)
    assert distiller.metrics()["inner_lr"] == pytest.approx(float(rate.detach()))


# ---- DATM ----

ALIGNED = DifficultyAlignment(first_max_start=0, grow_steps=4, threshold=1e9, label_rate=0.5, label_momentum=0.9)


def test_the_latest_start_grows_linearly_and_stays():
    alignment = DifficultyAlignment(first_max_start=10, grow_steps=1000)
    for step in (0, 1, 99, 100, 555, 999, 1000, 5000):
        expected = min(20, int(10 + (20 - 10) * step / 1000))
        assert alignment.latest_start(step, 20) == expected


def test_images_are_those_that_the_first_expert_knows_then_those_of_the_next():
    labels = torch.arange(12) % 3
    images = torch.arange(12.0)
    knows = [{0, 3, 6, 9, 1, 4, 2}, {5, 7, 8}, {10, 11}]  # experts 0 and 1 know enough, two a class, together
    asked = []

    def predict(number, images):
        asked.append(number)
        right = torch.tensor([int(image) in knows[number] for image in images])
        return torch.eye(3)[torch.where(right, labels, (labels + 1) % 3)]

    seen = set()
    for seed in range(20):
        chosen = rightly_labelled(predict, 3, (images, labels), 3, 2, torch.Generator().manual_seed(seed)).tolist()
        assert set(chosen[:2]) < {0, 3, 6, 9}
        assert set(chosen[2:4]) == {1, 4}
        assert 2 in chosen[4:]
        assert set(chosen[4:]) < {2, 5, 8}
        seen |= set(chosen)
    assert seen == {0, 1, 2, 3, 4, 5, 6, 8, 9}
    assert set(asked) == {0, 1}
    with pytest.raises(UserError, match=r"ipc: expected at most 4, .* got 5"):
        rightly_labelled(predict, 3, (images, labels), 3, 5, torch.Generator())
    knows[:] = [{0}, set(), set()]
    chosen = rightly_labelled(predict, 3, (images, labels), 3, 2, torch.Generator().manual_seed(0)).tolist()
    assert chosen[0] == 0  # of what no expert knows others fill up
    assert [number % 3 for number in chosen] == [0, 0, 1, 1, 2, 2]


def test_labels_are_mean_logits_of_the_experts_that_are_right():
    logits, labels = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    logits[:, 0, 0] = -9  # none is right
    got = mean_logits(logits, labels)
    for number, label in enumerate(labels.tolist()):
        rows = [row for row in logits[:, number] if int(row.argmax()) == label] or list(logits[:, number])
        assert torch.allclose(got[number], sum(rows) / len(rows), atol=1e-6)


def aligned(folder, **changes):
    """A distiller with an alignment that has studied, and its first set."""
    settings = {"experts": 2, "recipe": EXPERTS, "steps": 3, "expert_epochs": 1, "max_start": 2, "augment": None}
    distiller, (data, real, label) = TrajectoryMatching(**settings | {"alignment": ALIGNED} | changes), problem()
    study(distiller, folder)
    distiller.first_set(data, Study((real, label), folder, 3))
    return distiller, data


def test_the_first_set_is_real_images_under_what_experts_say_of_them(tmp_path):
    distiller, data = aligned(tmp_path)
    _, real, label = problem()
    for number, image in enumerate(data.images):
        (position,) = [place for place, other in enumerate(real) if torch.equal(image, other)]
        assert label[position] == number // 2
    network, logits = NETWORK(), []
    for number in range(2):
        theta, _ = distiller._experts.after(number, (3, 3), torch.device("cpu"))
        nn.utils.vector_to_parameters(theta, network.parameters())
        logits.append(network(data.images).detach())
    expected = mean_logits(logits, torch.arange(6) // 2)
    assert torch.allclose(data.labels, expected.softmax(1), atol=1e-6)
    distiller, data = aligned(tmp_path, alignment=DifficultyAlignment(first_max_start=0, choose_images=False))
    assert torch.equal(data.images, problem()[0].images)
    assert not torch.equal(data.labels, problem()[0].labels)


def test_labels_are_learned_as_logits_and_a_step_with_a_large_loss_has_no_gradient(double, tmp_path):
    distiller, data = aligned(tmp_path)
    step = distiller.outer_step(data, data.images, torch.arange(6) // 2, 7)
    generator = torch.Generator().manual_seed(7)
    expert, begin = int(torch.randint(2, (), generator=generator)), 0  # T is 0 in the first outer step
    torch.randint(0, 1, (), generator=generator)
    start, target = distiller._experts.after(expert, (begin, begin + 1), torch.device("cpu"))
    logits = data.labels.log().requires_grad_()  # logits up to a constant, which a softmax does not see
    end = distiller.student(SyntheticData(data.images, logits.softmax(1)), start, torch.tensor(distiller.lr), generator)
    loss = (end - target).square().sum() / (start - target).square().sum()
    (expected,) = torch.autograd.grad(loss, logits)
    assert step.labels is None
    assert torch.allclose(step.own[1:].view(6, 3), expected, rtol=1e-6, atol=1e-12)

    weights = torch.nn.Parameter(distiller._logits.clone())
    optimizer = torch.optim.SGD([weights], ALIGNED.label_rate, ALIGNED.label_momentum)
    for _ in range(3):
        weights.grad = step.own[1:].view(6, 3)
        optimizer.step()
        distiller.updated(data, step.own)
    assert torch.allclose(data.labels, weights.detach().softmax(1))

    strict, data = aligned(tmp_path, alignment=DifficultyAlignment(first_max_start=0, threshold=1e-9))
    step = strict.outer_step(data, data.images, torch.arange(6) // 2, 7)
    assert float(step.loss) > 1e-9
    assert not step.images.any()
    assert not step.own.any()


# ---- SRe2L ----

TEACHER = functools.partial(NETWORK, norm="batch")


def squeezed(folder, real, label, **changes):
    """A distiller whose teacher has studied real images, and that teacher, trained here."""
    distiller = SqueezeRecoverRelabel(**{"teacher": TEACHER, "recipe": EXPERTS, "augment": None} | changes)
    distiller.prepare(TASK)
    lines = []
    distiller.study(Study((real, label), folder, 3, tell=lines.append))
    with isolated_rng(derived_seed(3, "teacher")):
        teacher = train(TEACHER(), (real, label), EXPERTS)
    assert len(lines) == 2
    return distiller, teacher


@pytest.mark.parametrize(("together", "groups"), [(None, [[0, 2, 4, 1, 3, 5]]), (3, [[0, 2, 4], [1, 3, 5]])])
def test_an_outer_step_of_recovery_is_autograd_s_of_cross_entropy_and_statistics(double, tmp_path, together, groups):
    data, real, label = problem()
    distiller, teacher = squeezed(tmp_path, real, label, bn_weight=0.3, first_bn_factor=5.0, together=together)
    step = distiller.outer_step(data, real, label, 1)
    ((convolution, norm, *_),) = teacher.features
    losses = []
    for group in groups:  # the first image of each class, then the second
        leaf, asked = data.images[group].clone().requires_grad_(), torch.arange(6)[group] // 2
        variance, mean = torch.var_mean(convolution(leaf), (0, 2, 3), correction=0)
        distance = (mean - norm.running_mean).norm() + (variance - norm.running_var).norm()
        loss = F.cross_entropy(teacher(leaf), asked) + 0.3 * 5.0 * distance
        assert torch.allclose(step.images[group], torch.autograd.grad(loss, leaf)[0], rtol=1e-8, atol=1e-12)
        losses.append(float(loss.detach()))
    assert float(step.loss) == pytest.approx(sum(losses) / len(losses))
    assert step.labels is None


def test_a_set_that_is_recovered_stays_in_the_range_of_real_images_under_what_the_teacher_says(tmp_path):
    data, real, label = problem()
    images = data.images * 3
    for soft in (True, False):
        data = SyntheticData(images.clone(), torch.eye(3).repeat_interleave(2, 0))
        distiller, teacher = squeezed(tmp_path / str(soft), real, label, soft_labels=soft)
        distiller.updated(data, None)
        assert torch.equal(data.images, images.clamp(real.min(), real.max()))
        expected = teacher(data.images).softmax(1).detach() if soft else torch.eye(3).repeat_interleave(2, 0)
        assert torch.allclose(data.labels, expected, atol=1e-6)


def test_a_teacher_that_is_there_is_not_trained_again_and_one_of_another_recipe_is(tmp_path):
    _, real, label = problem()
    squeezed(tmp_path, real, label)
    lines = []
    for epochs in (3, 4):
        distiller = SqueezeRecoverRelabel(TEACHER, dataclasses.replace(EXPERTS, epochs=epochs))
        distiller.prepare(TASK)
        distiller.study(Study((real, label), tmp_path, 3, tell=lines.append))
        assert len(lines) == 2 * (epochs - 3)


def test_what_does_not_fit_is_one_line():
    for changes, message in (
        ({}, r"teacher: expected a network with batch norm, got null"),
        ({"teacher": NETWORK}, r"teacher: expected a network with batch norm, got a ConvNet without"),
    ):
        with pytest.raises(UserError, match=message):
            SqueezeRecoverRelabel(**changes).prepare(TASK)
    with pytest.raises(UserError, match=r"learn_labels: .* false"):
        SqueezeRecoverRelabel(TEACHER).prepare(Task(NETWORK, 3, 2, 1, True))
    distiller = SqueezeRecoverRelabel(TEACHER)
    distiller.prepare(Task(NETWORK, 4, 2, 1, False))
    with pytest.raises(UserError, match=r"teacher: expected one of 4 classes, .* got 3"):
        distiller.study(Study(problem()[1:], Path(), 3))
    with pytest.raises(UserError, match="augment: expected one of"):
        SqueezeRecoverRelabel(TEACHER, augment="flip")
    with pytest.raises(UserError, match=r"learn_labels: .* false"):
        GradientMatching().prepare(Task(NETWORK, 3, 2, 1, True))
    with pytest.raises(UserError, match="batch norm"):
        GradientMatching().prepare(Task(functools.partial(NETWORK, norm="batch"), 3, 2, 1, False))
    with pytest.raises(UserError, match=r"max_start: expected at most 2, .* got 3"):
        TrajectoryMatching(recipe=EXPERTS, expert_epochs=1, max_start=3)
    short = {"recipe": EXPERTS, "expert_epochs": 1, "max_start": 2}
    with pytest.raises(UserError, match=r"alignment: expected min_start <= first_max_start <= max_start, got 0, 3, 2"):
        TrajectoryMatching(**short, alignment=DifficultyAlignment(first_max_start=3))
    with pytest.raises(UserError, match=r"alignment.label_epoch: expected at most 3, .* got 4"):
        TrajectoryMatching(**short, alignment=DifficultyAlignment(first_max_start=1, label_epoch=4))
    with pytest.raises(UserError, match=r"learn_labels: .* false"):
        TrajectoryMatching(**short, alignment=ALIGNED).prepare(Task(NETWORK, 3, 2, 1, True))


# ---- whole runs ----

DIGITS = functools.partial(ConvNet, **(MAKE | {"num_classes": 10}), width=4, depth=1)
DISTILLERS = {
    "dc": GradientMatching(outer_loop=7, inner_loop=2),
    "dsa": GradientMatching(outer_loop=7, inner_loop=2, augment=True),
    "mtt": TrajectoryMatching(2, EXPERTS, steps=3, expert_epochs=1, max_start=1, lr_rate=1e-3),
    "datm": TrajectoryMatching(2, EXPERTS, steps=3, expert_epochs=1, max_start=1, lr_rate=1e-3, alignment=ALIGNED),
    "sre2l": SqueezeRecoverRelabel(functools.partial(DIGITS, norm="batch"), EXPERTS, together=4),
}


def fit(name, folder, epochs, resume=None, **changes):
    model = DatasetDistillation(
        DIGITS,
        (1, 8, 8),
        ipc=1,
        distiller=copy.deepcopy(DISTILLERS[name]),
        start="random",
        clip=None,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5),
        evaluation=Evaluation(1, (2,)),
        compare_with_random=False,
        seed=0,
        **changes,
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = Trainer(max_epochs=epochs, accelerator="cpu", limit_val_batches=0, default_root_dir=folder, **quiet)
    run.fit(model, ImageDataModule(dataset="digits", batch_size=400, seed=0), ckpt_path=resume, weights_only=True)
    return model, run


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_run_that_goes_on_ends_as_one_that_was_never_disturbed(tmp_path, name):
    whole, _ = fit(name, tmp_path / "whole", 2)
    cut, run = fit(name, tmp_path / "cut", 1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again, _ = fit(name, tmp_path / "other", 2, tmp_path / "last.ckpt")
    assert not torch.equal(whole.images, cut.images)
    assert torch.equal(again.images, whole.images)
    assert torch.equal(again.labels, whole.labels)
    assert str(again.side_by_side.state_dict()) == str(whole.side_by_side.state_dict())


@pytest.mark.parametrize("name", DISTILLERS)
def test_replicas_are_the_runs_of_their_seeds(tmp_path, name):
    both, _ = fit(name, tmp_path / "both", 1, replicas=2)
    alone, _ = fit(name, tmp_path / "alone", 1)
    assert torch.allclose(both.images[:10], alone.images, atol=1e-6)
    assert torch.allclose(both.labels[:10], alone.labels, atol=1e-6)
    assert not torch.allclose(both.images[:10], both.images[10:], atol=1e-2)
