"""Inversion of a teacher of digits: its terms against numpy, autograd and loops; what a call leaves alone."""

import copy
import functools
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from leanlight.contracts import UserError
from lit_modules.dda.contrastive import Contrastive
from lit_modules.dda.inversion import (
    Adversary,
    GeneratorInversion,
    PixelInversion,
    _Best,
    disagreement,
    total_variation,
)
from lit_modules.dda.students import RotationHead, rotation_labels, rotations
from lit_modules.frozen import Frozen
from lit_modules.nn import ConvNet, pooled_features
from lit_modules.nn.batch_statistics import bn_distances, look, moments

SHAPE = (1, 8, 8)
N = 60
# Digits are no longer themselves when mirrored.
Inversion = functools.partial(GeneratorInversion, steps=80, lr=3e-3, width=16, augment=None)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def teacher(trained_teacher):
    return Frozen(copy.deepcopy(trained_teacher))


def asked(n=N):
    return torch.randn(n, 16, generator=seeded(5)), torch.arange(n) % 10


def call(inversion, teacher, n=N, seed=0, **options):
    return inversion(teacher, *asked(n), SHAPE, seed, **options)


def state(*modules):
    return [value.clone() for module in modules for value in module.state_dict().values()]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- what batch norms see


def test_distances_are_those_of_numpy(teacher):
    network, image = teacher.network.double(), torch.rand(9, *SHAPE, generator=seeded(0)).double()
    logits, seen = look(network, image)
    assert torch.equal(logits, network(image))
    x, expected, means = network.normalize(image), [], []
    for block in network.features:
        convolved, norm = block[0](x).numpy(), block[1]
        mean, variance = convolved.mean((0, 2, 3)), convolved.var((0, 2, 3))
        expected.append(
            np.sqrt(((mean - norm.running_mean.numpy()) ** 2).sum())
            + np.sqrt(((variance - norm.running_var.numpy()) ** 2).sum())
        )
        means.append(convolved.mean((2, 3)))
        x = block(x)
    np.testing.assert_allclose(bn_distances(seen).numpy(), expected, rtol=1e-12)
    for got, mean in zip(seen.values(), means, strict=True):
        np.testing.assert_allclose(got.items.numpy(), mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_moments_are_those_of_autograd(memory_format):
    x = torch.randn(5, 3, 4, 2, generator=seeded(0), dtype=torch.double).contiguous(memory_format=memory_format)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(moments(x)), x)
    weights = [torch.randn(shape, generator=seeded(1), dtype=torch.double) for shape in ((5, 3), 3, 3)]
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    gradients = [
        torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, values, strict=True)), x)[0]
        for values in (moments(x), (x.mean((2, 3)), mean, variance))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_the_gradient_of_the_distance_is_that_of_autograd_through_the_teacher(teacher):
    network, image = teacher.network.double(), torch.rand(6, *SHAPE, generator=seeded(0)).double().requires_grad_()
    (got,) = torch.autograd.grad(bn_distances(look(network, image)[1]).sum(), image)
    x, total = network.normalize(image), 0
    for block in network.features:
        variance, mean = torch.var_mean(block[0](x), (0, 2, 3), correction=0)
        total = total + (mean - block[1].running_mean).norm() + (variance - block[1].running_var).norm()
        x = block(x)
    torch.testing.assert_close(got, torch.autograd.grad(total, image)[0], rtol=1e-10, atol=1e-14)


def test_another_pass_of_the_teacher_changes_nothing_that_was_seen(teacher):
    first, other = torch.rand(2, 7, *SHAPE, generator=seeded(0))
    layers = [block[1] for block in teacher.network.features]
    alone = bn_distances(look(teacher.network, first)[1])
    _, seen = look(teacher.network, first)
    assert not any(layer._forward_pre_hooks for layer in layers)
    teacher(other)
    pooled_features(teacher.network, other)
    look(teacher.network, other)
    assert torch.equal(bn_distances(seen), alone)
    with pytest.raises(ValueError, match="expected images of 1 channels"):
        look(teacher.network, torch.rand(2, 3, 8, 8))
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_moments_are_taken_in_single_precision_under_mixed_precision(teacher):
    image = torch.rand(64, *SHAPE, generator=seeded(0))
    exact = bn_distances(look(teacher.network, image)[1])
    with torch.autocast("cpu", torch.bfloat16):
        _, seen = look(teacher.network, image)
        half = bn_distances(seen)
    assert {value.dtype for values in seen.values() for value in values} == {torch.float32}
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0.02)


# ---- other terms


def test_disagreements_are_those_of_loops_over_items():
    teacher, student = (torch.randn(6, 4, generator=seeded(seed), dtype=torch.double) for seed in (0, 1))
    kl, agreed, js = [], [], []
    for t, s in zip(teacher.numpy(), student.numpy(), strict=True):
        p, q = (np.exp(v) / np.exp(v).sum() for v in (t, s))
        kl.append((p * np.log(p / q)).sum())
        agreed.append(kl[-1] if t.argmax() == s.argmax() else 0.0)
        p, q = (np.exp(v / 3) / np.exp(v / 3).sum() for v in (t, s))
        m = (p + q) / 2
        js.append(((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2)
    assert 0 < np.mean(agreed) < np.mean(kl)
    for kind, values in (("kl", kl), ("kl_agreed", agreed), ("js", js)):
        assert float(disagreement(kind, teacher, student)) == pytest.approx(np.mean(values), rel=1e-12)


def test_total_variation_is_that_of_loops_over_neighbours():
    image = torch.rand(2, 1, 3, 4, generator=seeded(0), dtype=torch.double)
    expected = 0.0
    for down, right in ((0, 1), (1, 0), (1, -1), (1, 1)):
        squares = [
            float(image[n, 0, i, j] - image[n, 0, i + down, j + right]) ** 2
            for n in range(2)
            for i in range(3)
            for j in range(4)
            if i + down < 3 and 0 <= j + right < 4
        ]
        expected += sum(squares) ** 0.5
    assert float(total_variation(image)) == pytest.approx(expected, rel=1e-12)


# ---- what a call makes


@pytest.fixture(scope="module")
def made(trained_teacher):
    teacher = Frozen(copy.deepcopy(trained_teacher))
    return {weight: call(Inversion(bn_weight=weight), teacher) for weight in (1.0, 0.0)}


def test_both_terms_fall_to_less_than_a_third_and_the_teacher_agrees_after_eight_bits(made, teacher):
    got = made[1.0]
    assert got.images.shape == (N, *SHAPE)
    assert not got.images.requires_grad
    for name in ("batch_norm", "class_prior"):
        assert got.best[name] < 0.3 * got.first[name]
    rounded = (got.images * 255).round().byte()
    assert (teacher(rounded.float() / 255).argmax(1) == asked()[1]).float().mean() >= 0.9
    assert got.bn_layers.shape == (3,)
    torch.testing.assert_close(got.bn_layers.sum(), got.best["batch_norm"])


def test_without_its_factor_the_statistics_are_met_half_as_well(made):
    assert made[1.0].best["batch_norm"] < 0.5 * made[0.0].best["batch_norm"]
    torch.testing.assert_close(made[0.0].best["loss"], made[0.0].best["class_prior"])


def test_images_are_those_that_the_best_terms_were_measured_on(made, teacher):
    """Of the best step, before augmentation, of which there is none here."""
    got = made[1.0]
    logits, seen = look(teacher.network, got.images)
    torch.testing.assert_close(F.cross_entropy(logits, asked()[1]), got.best["class_prior"])
    torch.testing.assert_close(bn_distances(seen), got.bn_layers)
    torch.testing.assert_close(got.best["loss"], got.best["class_prior"] + got.best["batch_norm"])


def test_the_best_step_is_kept_when_the_following_ones_are_worse(teacher):
    got = [call(PixelInversion(steps=steps, lr=10.0, tv_weight=0.0), teacher, 10) for steps in range(1, 8)]
    kept = [before.best["loss"] == after.best["loss"] for before, after in pairwise(got)]
    assert 0 < sum(kept) < len(kept)
    assert kept == [torch.equal(before.images, after.images) for before, after in pairwise(got)]
    assert all(before.best["loss"] >= after.best["loss"] for before, after in pairwise(got))


def test_the_best_is_a_copy_not_the_tensor_that_a_step_changes_in_place():
    best, leaf = _Best(), torch.tensor([1.0, 2.0])
    for loss, at in ((3.0, 0.0), (1.0, 5.0), (2.0, 7.0)):
        leaf.fill_(at)
        best.offer({"loss": torch.tensor(loss), "images": leaf})
    leaf.fill_(9.0)
    assert best.kept["images"].tolist() == [5.0, 5.0]
    only = _Best()
    only.offer({"loss": torch.tensor(1.0), "images": leaf})
    leaf.fill_(0.0)
    assert only.kept["images"].tolist() == [9.0, 9.0]


def test_a_loss_that_is_no_number_is_never_the_best():
    best = _Best()
    for loss in (float("nan"), 2.0, float("nan"), 3.0):
        best.offer({"loss": torch.tensor(loss)})
    assert best.kept["loss"] == 2


# ---- what a call leaves alone, and what it depends on


def adversary(trained_teacher):
    """The student is a copy of the teacher in training mode; the head has learned for a while."""
    student, head = copy.deepcopy(trained_teacher), RotationHead(16, 10, seed=3)
    with torch.no_grad():
        for name, value in student.named_parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=seeded(len(name))))
    return Adversary(student.requires_grad_(True).train(), head.train())


@pytest.mark.parametrize(
    "inversion",
    [
        Inversion(steps=3, adversarial_weight=1.0, rotation_weight=1.0, contrastive=Contrastive(width=8)),
        PixelInversion(steps=3, adversarial_weight=1.0),
    ],
    ids=["generator", "pixels"],
)
def test_nothing_but_images_comes_of_a_call(inversion, teacher, trained_teacher):
    against = adversary(trained_teacher)
    against.head.hidden.bias.requires_grad_(False)
    latent, labels = asked(12)
    modules = teacher.network, against.student, against.head
    before, random, first = state(*modules), torch.get_rng_state(), latent.clone()
    got = inversion(teacher, latent, labels, SHAPE, 0, student=against)
    assert same(before, state(*modules))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(latent, first)
    assert not latent.requires_grad
    assert all(module.training for module in (*against.student.modules(), *against.head.modules()))
    assert not any(
        module.training or p.requires_grad for module in teacher.network.modules() for p in module.parameters()
    )
    assert all(p.requires_grad for p in against.student.parameters())
    assert [p.requires_grad for p in against.head.parameters()] == [True, False, True, True]
    assert not any(p.grad is not None for module in modules for p in module.parameters())
    again = inversion(teacher, latent, labels, SHAPE, 0, student=against)
    other = inversion(teacher, latent, labels, SHAPE, 1, student=against)
    assert torch.equal(got.images, again.images)
    assert not torch.equal(got.images, other.images)
    assert got.images.min() >= 0
    assert got.images.max() <= 1


def test_generator_and_latents_get_gradients_through_the_teacher(teacher):
    latent, labels = asked(12)
    variables = Inversion()._begin(latent, SHAPE, seeded(0))
    F.cross_entropy(teacher(variables.images()), labels).backward()
    # A bias before batch norm moves nothing.
    assert sum(p.grad.abs().max() > 1e-9 for p in variables.parameters) >= len(variables.parameters) - 1
    assert variables.parameters[-1].grad.abs().max() > 0
    assert variables.parameters[-1].shape == latent.shape


def test_a_call_does_not_depend_on_the_mode_of_gradients_around_it(teacher):
    inversion = Inversion(steps=3)
    with torch.no_grad():
        got = call(inversion, teacher, 12)
    assert torch.equal(got.images, call(inversion, teacher, 12).images)


@pytest.mark.parametrize("kind", [Inversion, PixelInversion])
def test_memory_formats_differ_by_rounding(kind, trained_teacher):
    plain, last = (
        call(kind(steps=3, channels_last=channels_last), Frozen(copy.deepcopy(trained_teacher)), 20)
        for channels_last in (False, True)
    )
    torch.testing.assert_close(plain.images, last.images, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(plain.first["loss"], last.first["loss"])


# ---- who images are hard for


def test_images_are_harder_for_the_head_when_its_loss_is_maximised(teacher, trained_teacher, digits):
    against = adversary(trained_teacher)
    against.student.eval()
    optimizer = torch.optim.Adam(against.head.parameters(), lr=0.01)
    with torch.no_grad():
        features = pooled_features(against.student, rotations(digits[0][:300]))
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(against.head(features), rotation_labels(digits[1][:300]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2

    def loss_of(weight):
        images = call(Inversion(steps=50, rotation_weight=weight), teacher, student=against).images
        with torch.no_grad():
            return float(against.rotation_loss(images, asked()[1]))

    easy, hard = loss_of(0.0), loss_of(10.0)
    assert hard > easy + 0.05
    assert 2.72 < easy < hard < 4.69


def test_images_divide_teacher_and_student_when_their_disagreement_is_maximised(teacher, trained_teacher):
    against = adversary(trained_teacher)
    against.student.eval()

    def of(weight, kind):
        inversion = Inversion(steps=50, adversarial_weight=weight, adversarial=kind)
        images = call(inversion, teacher, student=against).images
        with torch.no_grad():
            return float(disagreement(kind, teacher(images), against.student(images)))

    assert of(1.0, "kl") > 1.5 * of(0.0, "kl")


def test_the_contrastive_term_looks_back_at_earlier_calls(teacher):
    inversion = Inversion(steps=3, contrastive=Contrastive(width=8, rows=100))
    memory = inversion.memory(teacher, SHAPE, 0)
    first = call(inversion, teacher, 12, memory=memory)
    assert len(memory) == 12
    second = call(inversion, teacher, 12, memory=memory)
    assert len(memory) == 24
    assert "contrastive" in first.best
    assert second.first["contrastive"] > first.first["contrastive"] + 1  # a second mean, over the earlier ones
    assert Inversion().memory(teacher, SHAPE, 0) is None


# ---- bad input


def test_a_teacher_without_batch_norm_is_told_what_works(digits):
    teacher = Frozen(ConvNet(in_channels=1, width=4, depth=1, norm="instance", image_size=8))
    with pytest.raises(UserError, match=r"^bn_weight: the teacher, a ConvNet, has no batch norm .* class_weight"):
        call(Inversion(steps=1), teacher)
    with pytest.raises(UserError, match=r"^contrastive: the teacher"):
        call(Inversion(steps=1, bn_weight=0.0, contrastive=Contrastive()), teacher)
    got = call(Inversion(steps=2, bn_weight=0.0), teacher, 10)
    assert got.best.keys() == {"loss", "class_prior"}
    assert len(got.bn_layers) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"bn_weight": -1.0}, "bn_weight: expected a number from 0, got -1"),
        ({"bn_weight": 0.0, "class_weight": 0.0}, "class_weight: expected a positive number where bn_weight is 0"),
        ({"augment": "flip_then_shfit"}, "augment: expected one of .* 'flip_then_shift'"),
        ({"adversarial": "l1"}, "adversarial: expected one of kl, kl_agreed, js, got l1"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        Inversion(**settings)


def test_terms_that_need_a_student_are_refused_without_one(teacher):
    with pytest.raises(UserError, match="rotation_weight: expected 0 where there is no student yet, got 10"):
        call(Inversion(rotation_weight=10.0), teacher)
    with pytest.raises(UserError, match="pixel_std: expected a positive number"):
        PixelInversion(pixel_std=0.0)
    with pytest.raises(UserError, match="image_size: expected sides divisible by 4"):
        Inversion().check(teacher.network, (1, 10, 10))
