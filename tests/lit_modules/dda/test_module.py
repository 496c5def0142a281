"""A student in its Trainer: what a step changes and what it leaves alone; an interrupted run goes on exactly."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from callbacks import CompileNetworks, ExactResume
from datamodules import ImageDataModule
from leanlight.contracts import UserError
from lit_modules.classifier import ImageClassifier
from lit_modules.dda import (
    Contrastive,
    DataFreeDistillation,
    GeneratorInversion,
    PixelInversion,
    Teacher,
    teacher_digest,
)
from lit_modules.nn import MLP, ConvNet

CONV = partial(ConvNet, in_channels=1, image_size=8, norm="batch", depth=2)
INVERSION = GeneratorInversion(steps=2, width=4, rotation_weight=10.0)
POOL = {"synthesis": INVERSION, "synthesis_items": 6, "synthesis_rounds": 2, "latent_size": 8}
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Bank(ImageDataModule):
    """Real digits that say they are a bank."""

    data_free = True

    def __init__(self, **options):
        super().__init__(**{"dataset": "digits", "train_items": 40, "batch_size": 10, "drop_last": True} | options)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher with running statistics of its own."""
    torch.manual_seed(0)
    network, path = CONV(width=6), tmp_path_factory.mktemp("teacher") / "weights.pt"
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    torch.save(network.state_dict(), path)
    return Teacher(network=partial(CONV, width=6), weights=path)


def student(teacher, width=4, **options):
    torch.manual_seed(7)
    return DataFreeDistillation(partial(CONV, width=width), teacher, **{"optimizer": SGD} | options)


def trainer(folder, *callbacks, epochs=2, **options):
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ExactResume) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def fit(folder, module, *callbacks, data=None, checkpoint=None, **options):
    pl.seed_everything(3, verbose=False)
    fitted = trainer(folder, *callbacks, **options)
    fitted.fit(module, data or Bank(augment="shift"), ckpt_path=checkpoint)
    return fitted


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Watch(pl.Callback):
    """Calls `look(trainer, module)` after every training batch."""

    def __init__(self, look):
        self.look = look

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.look(trainer, module)


def around(module, name):
    """State before and after every call of a method, and the gradients of the student after it."""
    original, seen = getattr(module, name), []

    def call(batch):
        before = state(module)
        result = original(batch)
        gradients = [None if p.grad is None else p.grad.clone() for p in module.trained_parameters()]
        seen.append((before, state(module), gradients, module.network.training))
        return result

    setattr(module, name, call)
    return seen


def test_the_teacher_is_the_same_bit_for_bit_after_an_epoch(tmp_path, teacher):
    module, modes = student(teacher, self_weight=0.5), set()

    def look(trainer, module):
        network = module._teacher.network
        modes.update((part.training, module.network.training) for part in network.modules())

    fitted = fit(tmp_path, module, Watch(look), epochs=1)
    assert modes == {(False, True)}
    assert same(state(module._teacher.network), teacher.load(fitted.datamodule.meta).network.state_dict())
    assert all(parameter.grad is None for parameter in module._teacher.network.parameters())
    assert not any("teacher" in name for name in module.state_dict())


@pytest.mark.filterwarnings("error:banks")
def test_a_bank_of_another_teacher_is_told_of_and_used(tmp_path, teacher):
    bank = Bank()
    bank.setup()
    bank.made_from = teacher_digest(teacher.load(bank.meta).network)
    fit(tmp_path, student(teacher, recipe="kl"), data=bank, epochs=1, limit_train_batches=1)
    bank.made_from = "of another"
    with pytest.raises(UserWarning, match="banks: they were made from another teacher"):
        fit(tmp_path, student(teacher, recipe="kl"), data=bank, epochs=1, limit_train_batches=1)


def test_the_students_step_and_that_of_the_head_change_their_own_parts_alone(tmp_path, teacher):
    module = student(teacher, self_weight=0.1)
    of_student, of_head = around(module, "_step_student"), around(module, "_step_head")
    fit(tmp_path, module, epochs=1)
    heads = {f"head.{name}" for name, _ in module.head.named_parameters()}
    assert len(of_student) == len(of_head) == 4
    for (before, after, gradients, training), (_, later, afterwards, still) in zip(of_student, of_head, strict=True):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == set(before) - heads - {"network.normalize.mean", "network.normalize.std"}
        assert {name for name in after if not torch.equal(after[name], later[name])} == heads
        assert all(torch.equal(a, b) for a, b in zip(gradients, afterwards, strict=True))
        assert (training, still) == (True, True)
    assert module.global_step == 4  # a batch is a step, whatever the head does
    assert module.progress().value == 4


def test_the_head_learns_within_the_bounds_of_its_loss(tmp_path, teacher):
    still = partial(torch.optim.SGD, lr=0.0)
    quick = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    module = student(teacher, width=64, recipe="kl", self_weight=1e-9, optimizer=still, head_optimizer=quick)
    fit(tmp_path, module, data=Bank(), epochs=15)
    losses = module._history["head_loss"]
    assert 2.7190 < losses[-1] < losses[0] - 0.05 < 4.6856
    assert module._history["head_accuracy"][-1] > 2 * module._history["head_accuracy"][0]


def test_a_students_own_task_moves_it_against_the_heads_loss(tmp_path, teacher):
    """With a large weight the student itself lowers the loss of rotations, whose head stands still."""
    still = partial(torch.optim.SGD, lr=0.0)
    losses = {}
    for weight in (1e-9, 50.0):
        module = student(teacher, recipe="kl", self_weight=weight, head_optimizer=still, clip=1.0)
        fit(tmp_path, module, data=Bank(), epochs=5)
        losses[weight] = module._history["head_loss"][-1]
    assert losses[50.0] < losses[1e-9] - 1e-3


@pytest.mark.parametrize("recipe", ["kl", "kl_ce_fea", "ce"])
def test_one_step_is_that_of_a_plain_loop(tmp_path, teacher, recipe):
    data = Bank()
    module = student(teacher, recipe=recipe, temperature=3.0, ce_weight=0.7, feature_weight=2.0)
    seen = around(module, "_step_student")
    batches = []
    module.on_train_batch_start = lambda batch, batch_idx: batches.append(batch)
    fitted = fit(tmp_path, module, data=data, epochs=1)
    network = CONV(width=4)
    theirs = teacher.load(fitted.datamodule.meta).network
    align = None if module.align is None else type(module.align)(*module.align.shapes)
    parts = nn.ModuleDict({"network": network} | ({} if align is None else {"align": align}))
    parts.load_state_dict(seen[0][0])
    optimizer = SGD(parts.parameters())
    for batch in batches:
        with torch.no_grad():
            t, map_t = theirs(batch.image), theirs.features(theirs.normalize(batch.image))
        maps = network.features(network.normalize(batch.image))
        s = network.head(network.pool(maps))
        kl = 9 * ((t / 3).softmax(1) * ((t / 3).log_softmax(1) - (s / 3).log_softmax(1))).sum(1).mean()
        ce = nn.functional.cross_entropy(s, batch.label)
        loss = 0.7 * ce if recipe == "ce" else kl
        if recipe == "kl_ce_fea":
            loss = kl + 0.7 * ce + 2 * (align(maps) - map_t).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in parts.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_from_scratch_is_ordinary_training_bit_for_bit(tmp_path, teacher):
    scratch = student(teacher, recipe="ce")
    ordinary = ImageClassifier(partial(CONV, width=4), optimizer=SGD)
    ordinary.network.load_state_dict(scratch.network.state_dict())
    fit(tmp_path, scratch)
    fit(tmp_path, ordinary)
    assert same(scratch.network.state_dict(), ordinary.network.state_dict())


def test_validation_asks_for_the_teachers_answers_and_the_test_for_labels_too(tmp_path, teacher):
    module = student(teacher)
    fitted = fit(tmp_path, module, epochs=1)
    data = fitted.datamodule
    values = fitted.test(module, data, verbose=False)[0] | fitted.validate(module, data, verbose=False)[0]
    network, theirs = module.network.eval(), module._teacher.network
    expected = {}
    with torch.no_grad():
        for split, part in (("val", data.val_split), ("test", data.test_split)):
            image = part.images / 255
            ours, answer = network(image).argmax(1), theirs(image).argmax(1)
            expected[f"{split}/agreement"] = float((ours == answer).float().mean())
            expected[f"{split}/accuracy"] = float((ours == part.labels).float().mean())
    assert "val/accuracy" not in values  # a bank's labels are no truth
    for name in ("val/agreement", "test/agreement", "test/accuracy"):
        assert values[name] == pytest.approx(expected[name], abs=1e-5), name
    assert module.primary_metric.name == "val/agreement"


class Stop(pl.Callback):
    """Breaks off before the batch of this number, without a word to anyone."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.global_step == self.at:
            raise RuntimeError("killed")


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_run_goes_on_inside_an_epoch_as_if_undisturbed(tmp_path, teacher, interval):
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=12)
    options = {"self_weight": 0.1, "lr_scheduler": cosine, "lr_interval": interval}
    whole = student(teacher, **options)
    fit(tmp_path / "whole", whole, ExactResume(1), epochs=3)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "cut", student(teacher, **options), ExactResume(2), Stop(7), epochs=3)
    rest, last = student(teacher, **options), tmp_path / "cut" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "cut", rest, ExactResume(1), checkpoint=last, epochs=3)
    assert same(state(rest), state(whole))
    assert rest._history.values == whole._history.values
    expected = {"epoch": 3, "step": 12}[interval]
    lr = rest.lr_schedulers().get_last_lr()
    assert lr == whole.lr_schedulers().get_last_lr()
    assert lr[0] == pytest.approx(0.05 * (1 + torch.cos(torch.tensor(torch.pi * expected / 12)).item()) / 2, abs=1e-6)


class BreakOff:
    """Stands for a synthesis and breaks off at its call of this number."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __getattr__(self, name):
        return getattr(INVERSION, name)

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("killed")
        return INVERSION(*arguments)


# Before batch 0: in the first synthesis, before which there is a checkpoint, too. 5: after the first batch of epoch 1.
@pytest.mark.parametrize("killed", ["first synthesis", "synthesis", "batch 5", "batch 7"])
def test_a_run_with_a_pool_goes_on_as_if_undisturbed(tmp_path, teacher, killed):
    whole = student(teacher, **POOL)
    fit(tmp_path / "whole", whole, ExactResume(1), epochs=3)
    cut, stop = student(teacher, **POOL), []
    if killed.startswith("batch"):
        stop = [Stop(int(killed[-1]))]
    else:
        cut.synthesis = BreakOff(2 if killed == "first synthesis" else 4)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "cut", cut, ExactResume(1), *stop, epochs=3)
    rest, last = student(teacher, **POOL), tmp_path / "cut" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "cut", rest, ExactResume(1), checkpoint=last, epochs=3)
    assert same(state(rest), state(whole))
    assert rest._history.values == whole._history.values
    assert len(rest._pool) == len(whole._pool) == 36
    for one, other in zip(rest._pool.read(torch.arange(36)), whole._pool.read(torch.arange(36)), strict=True):
        assert torch.equal(one, other)


def test_a_finished_run_goes_on_to_more_epochs_with_its_pool(tmp_path, teacher):
    whole = student(teacher, **POOL)
    fit(tmp_path / "whole", whole, ExactResume(1), epochs=2)
    fit(tmp_path / "longer", student(teacher, **POOL), ExactResume(1), epochs=1)
    rest, last = student(teacher, **POOL), tmp_path / "longer" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "longer", rest, ExactResume(1), checkpoint=last, epochs=2)
    assert same(state(rest), state(whole))


def test_the_memory_of_the_contrastive_term_outlives_a_kill(tmp_path, teacher):
    options = POOL | {"synthesis": GeneratorInversion(steps=2, width=4, contrastive=Contrastive(rows=30, width=8))}
    whole = student(teacher, **options)
    fit(tmp_path / "whole", whole, ExactResume(1), epochs=2)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "cut", student(teacher, **options), ExactResume(1), Stop(2), epochs=2)
    rest, last = student(teacher, **options), tmp_path / "cut" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "cut", rest, ExactResume(1), checkpoint=last, epochs=2)
    assert same(state(rest), state(whole))
    assert torch.equal(rest._pool.read(torch.arange(24))[0], whole._pool.read(torch.arange(24))[0])


def test_a_pool_grows_against_a_student_that_it_leaves_alone(tmp_path, teacher):
    module = student(teacher, **POOL)
    seen, sizes = around(module, "_grow"), []

    def look(trainer, module):
        sizes.append((trainer.current_epoch, len(module._pool)))

    fitted = fit(tmp_path, module, Watch(look), epochs=2)
    assert sizes == [(0, 12)] * 4 + [(1, 24)] * 4
    heads = {f"head.{name}" for name, _ in module.head.named_parameters()}
    for before, after, _, training in seen:
        assert {name for name in before if not torch.equal(before[name], after[name])} <= heads
        assert training
    learned, anew = seen[1][:2]
    assert all(not torch.equal(learned[name], anew[name]) for name in heads)  # biases back to 0 among them
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert same(state(module._teacher.network), teacher.load(fitted.datamodule.meta).network.state_dict())
    of_head = module._optimizers()[1].optimizer
    assert all("momentum_buffer" in of_head.state[parameter] for parameter in module.head.parameters())
    images, labels = module._pool.read(torch.arange(24))
    assert len(images.unique(dim=0)) == 24
    assert 0 <= labels.min() <= labels.max() < 10


def test_training_takes_images_of_bank_and_pool_both_augmented_by_the_data(tmp_path, teacher):
    module, batches = student(teacher, **POOL), []
    module.on_train_batch_start = lambda batch, batch_idx: batches.append(batch)
    data = Bank()
    data.augment = "flip"
    fit(tmp_path, module, data=data, epochs=1)
    batch = torch.cat([batch.index for batch in batches]), torch.cat([batch.image for batch in batches])
    index, image = batch
    assert image.dtype == torch.float32
    of_pool = index >= 40
    assert 2 <= of_pool.sum() <= 20  # of 40, with chance 12 / 52
    images, _ = module._pool.read(index[of_pool] - 40)
    plain, flipped = ((image[of_pool] - view / 255).abs().amax((1, 2, 3)) < 1e-6 for view in (images, images.flip(3)))
    assert (plain | flipped).all()
    assert plain.any()
    assert flipped.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"synthesis_items": 0}, "synthesis_items: expected an integer of at least 1"),
        ({"synthesis_rounds": 0}, "synthesis_rounds: expected an integer of at least 1"),
        ({"latent_size": 0}, "latent_size: expected an integer of at least 1"),
    ],
)
def test_bad_sizes_of_a_pool_are_named(teacher, options, message):
    with pytest.raises(UserError, match=message):
        student(teacher, **POOL | options)


def test_a_pool_that_cannot_be_made_is_refused(tmp_path, teacher):
    without = Teacher(network=partial(ConvNet, in_channels=1, image_size=8, norm="none", depth=2, width=6))
    with pytest.raises(UserError, match="bn_weight: the teacher, a ConvNet, has no batch norm"):
        fit(tmp_path, student(without, **POOL))
    prior = {"synthesis": GeneratorInversion(steps=2, width=4, bn_weight=0.0)}
    fit(tmp_path, student(without, **POOL | prior), epochs=1)
    with pytest.raises(UserError, match=r"trainer.max_epochs: expected a positive number"):
        fit(tmp_path, student(teacher, **POOL), epochs=-1, max_steps=1)

    class Own(Bank):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch

    with pytest.raises(UserError, match="data: expected a DataModule without an on_before_batch_transfer"):
        fit(tmp_path, student(teacher, **POOL), data=Own())


def test_pixels_may_be_inverted_too(tmp_path, teacher):
    module = student(teacher, **POOL | {"synthesis": PixelInversion(steps=2), "synthesis_rounds": 1})
    fit(tmp_path, module, epochs=1)
    assert len(module._pool) == 6
    assert module.head is None


def test_a_checkpoint_rebuilds_alignment_and_head(tmp_path, teacher):
    module = student(teacher, width=3, self_weight=0.1)
    fit(tmp_path, module, ExactResume(100), epochs=1)
    again = DataFreeDistillation.load_from_checkpoint(
        tmp_path / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    )
    assert same(state(again), state(module))


def test_clipping_bounds_the_gradient(tmp_path, teacher):
    module = student(teacher, clip=1e-3)
    seen = around(module, "_step_student")
    fit(tmp_path, module, epochs=1)
    norms = [torch.stack([g.norm() for g in gradients]).norm() for _, _, gradients, _ in seen]
    torch.testing.assert_close(torch.stack(norms), torch.full((4,), 1e-3), rtol=1e-3, atol=1e-6)


def test_mixed_precision_shows_the_head_the_student_of_now(tmp_path, teacher):
    """Autocast that kept its copies of weights, as it does by default, would show it that of before the step."""
    module = student(teacher, recipe="ce", self_weight=1e-9, optimizer=partial(torch.optim.SGD, lr=5.0))
    original, features, weights = module._rotation_loss, [], []

    def keep(found, batch):
        features.append((found.detach().float(), batch.image))
        weights.append(state(module.network))
        return original(found, batch)

    module._rotation_loss = keep
    fit(tmp_path, module, epochs=1, precision="bf16-mixed")
    network = CONV(width=4).eval()

    def distance(number, of):
        network.load_state_dict(weights[of])
        found, image = features[number]
        turned = torch.stack([image.rot90(r, (2, 3)) for r in range(4)], 1).flatten(0, 1)
        with torch.no_grad():
            return float((network.pool(network.features(network.normalize(turned))) - found).norm())

    for number in range(1, len(features), 2):  # those of the head's step; before each, those of the student's own loss
        assert distance(number, number) < 0.2 * distance(number, number - 1)


@pytest.mark.parametrize("recipe", ["kl", "kl_ce_fea"])
def test_compiled_networks_learn_the_same(tmp_path, teacher, recipe):
    plain, compiled = (student(teacher, recipe=recipe) for _ in range(2))
    fit(tmp_path, plain, epochs=1)
    torch.compiler.reset()
    counters.clear()
    fit(tmp_path, compiled, CompileNetworks("eager", fullgraph=True), epochs=1)
    graphs = counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    assert graphs >= 2  # of teacher and student, or of the student in both of its modes
    assert same(state(compiled), state(plain))


def test_media_shows_the_student_over_epochs(tmp_path, teacher):
    module = student(teacher, self_weight=0.1, **POOL)
    fit(tmp_path, module)
    items = module.media("train")
    assert len(items["pool"].images) == len(items["pool"].captions) == 24
    assert set(items["inversion"].series) == {"loss", "class prior", "batch norm"}
    assert set(items["losses"].series) == {"distillation", "cross entropy", "features", "rotations", "head loss"}
    assert set(items["agreement"].series) == {"held-out images", "training images", "rotation head"}
    assert all(0 <= value <= 1 for value in items["class_agreement"].values.values())
    assert "confusion" in module.media("val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "kd"}, "recipe: expected one of kl, kl_ce_fea, ce, got 'kd'"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"clip": -1.0}, "clip: expected a positive number"),
        ({"feature_weight": -1.0}, "feature_weight: expected at least 0"),
        ({"self_weight": -1.0}, "self_weight: expected at least 0"),
    ],
)
def test_bad_numbers_are_named(teacher, options, message):
    with pytest.raises(UserError, match=message):
        student(teacher, **options)


def test_what_cannot_be_trained_is_refused_before_it_begins(tmp_path, teacher):
    real = ImageDataModule("digits", train_items=40, batch_size=10)
    with pytest.raises(UserError, match="real_data: true trains on them"):
        fit(tmp_path, student(teacher), data=real)
    fit(tmp_path, student(teacher, real_data=True), data=real, epochs=1)
    flat = partial(MLP, in_channels=1, image_size=8, hidden=[4])
    with pytest.raises(UserError, match="student: expected a network whose last features are maps"):
        fit(tmp_path, DataFreeDistillation(flat, teacher))
    fit(tmp_path, DataFreeDistillation(flat, teacher, recipe="kl", optimizer=SGD), epochs=1)
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(UserError, match="lr_scheduler"):
        fit(tmp_path, student(teacher, lr_scheduler=plateau))


def test_a_module_that_is_fitted_again_has_a_pool_of_its_own(tmp_path, teacher):
    module = student(teacher, **POOL)
    for name in ("first", "second"):
        fit(tmp_path / name, module, epochs=1)
        assert len(module._pool) == 12
