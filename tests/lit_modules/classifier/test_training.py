"""Training without a Trainer, and losses, on scikit-learn's digits."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from waits import waits

from leanlight.contracts import UserError
from lit_modules.classifier import Recipe, accuracy, class_index, distillation_loss, train_and_score
from lit_modules.classifier.training import train
from lit_modules.nn import ConvNet, LinearClassifier

make_convnet = functools.partial(ConvNet, 1, 10, width=16, depth=2, image_size=8)
make_linear = functools.partial(LinearClassifier, 1, 10, image_size=8)


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().div(16)[:, None]
    labels = torch.from_numpy(data.target)
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def test_a_fresh_network_learns_real_digits(digits):
    train, test = digits
    (score,) = train_and_score(train, make_convnet, Recipe(epochs=6, batch_size=64, lr=5e-3), [0], test)
    assert score > 0.9


def test_a_score_depends_on_its_seed_alone_and_leaves_the_random_state(digits):
    train, test = digits
    recipe = Recipe(epochs=1, batch_size=64, lr=5e-3, augment="shift", schedule="cosine", optimizer="adamw")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    heard = []
    both = train_and_score(train, make_linear, recipe, [1, 2], test, on_scored=lambda seed, score: heard.append(seed))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert train_and_score(train, make_linear, recipe, [2], test) == both[1:]
    assert both[0] != both[1]
    assert heard == [1, 2]


def test_soft_labels_that_are_one_hot_train_like_integer_labels(digits):
    (images, labels), test = digits
    recipe = Recipe(epochs=2, lr=1e-2)
    soft = (images, F.one_hot(labels, 10).float())
    assert train_and_score(soft, make_linear, recipe, [0], test) == train_and_score(
        (images, labels), make_linear, recipe, [0], test
    )


def test_bytes_and_floats_train_alike(digits):
    (images, labels), (test_images, test_labels) = digits
    as_bytes = images.mul(255).round().byte()
    recipe = Recipe(epochs=1, lr=1e-2)
    test = (test_images, test_labels)
    assert train_and_score((as_bytes, labels), make_linear, recipe, [0], test) == train_and_score(
        (as_bytes.float().div(255), labels), make_linear, recipe, [0], test
    )


def test_it_trains_inside_a_validation_loop(digits):
    train, test = digits
    recipe = Recipe(epochs=1, lr=1e-2)
    expected = train_and_score(train, make_linear, recipe, [0], test)
    with torch.inference_mode():
        assert train_and_score(train, make_linear, recipe, [0], test) == expected


def test_one_step_of_sgd_is_the_gradient_step(digits):
    (images, labels), _ = digits
    recipe = Recipe(epochs=1, batch_size=len(images), lr=0.3, optimizer="sgd", weight_decay=0.01)
    network = make_linear()
    weight = network.head.weight.detach().clone()
    loss = F.cross_entropy(network(images), labels)
    (gradient,) = torch.autograd.grad(loss, network.head.weight)
    from lit_modules.classifier import train

    train(network, (images, labels), recipe)
    torch.testing.assert_close(network.head.weight.detach(), weight - 0.3 * (gradient + 0.01 * weight))
    assert not network.training


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 8),
        ("halfway", [1.0] * 6 + [0.1] * 2),
        ("cosine", [(1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)]),
    ],
)
def test_schedules(schedule, expected):
    recipe = Recipe(epochs=4, lr=1.0, optimizer="sgd", schedule=schedule)
    optimizer = recipe.make_optimizer(make_linear())
    scheduler = recipe.make_scheduler(optimizer, batches=2)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, ["epochs", "0"]),
        ({"optimizer": "adma"}, ["optimizer", "adma"]),
        ({"schedule": "step"}, ["schedule", "step"]),
        ({"augment": "flip_corp"}, ["augment", "did you mean 'flip_crop'"]),
    ],
)
def test_a_wrong_recipe_names_its_field(options, words):
    with pytest.raises(UserError) as caught:
        Recipe(**options)
    assert all(word in str(caught.value) for word in words)


def test_accuracy_counts_right_answers(digits):
    _, (images, labels) = digits
    network = make_linear()
    with torch.no_grad():
        expected = np.mean(network(images).argmax(1).numpy() == labels.numpy())
    assert accuracy(network, (images, labels), batch_size=100) == pytest.approx(expected)


def test_distillation_loss_is_the_scaled_divergence_of_softened_outputs():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 7))

    def soften(logits):
        weights = np.exp(logits / 3.0)
        return weights / weights.sum(1, keepdims=True)

    p, q = soften(teacher), soften(student)
    expected = 9.0 * (p * np.log(p / q)).sum(1).mean()
    got = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature=3.0)
    assert got.item() == pytest.approx(expected, rel=1e-10)
    same = torch.from_numpy(teacher)
    assert distillation_loss(same, same).item() == pytest.approx(0.0, abs=1e-12)


def test_class_index_takes_the_likeliest_class_of_soft_labels():
    assert class_index(torch.tensor([[0.2, 0.5, 0.3]])).tolist() == [1]
    assert class_index(torch.tensor([4])).tolist() == [4]


def test_a_pass_copies_its_order_to_the_device_once():
    data = torch.rand(40, 1, 8, 8), torch.arange(40) % 10

    def passes(batch_size):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        train(network, data, Recipe(epochs=2, batch_size=batch_size, optimizer="sgd"))

    assert waits(passes, 4) == waits(passes, 40) == 2
