"""The scorer in a Trainer, on scikit-learn's digits: its predictions against what a loop by hand gives."""

import dataclasses
import functools
import warnings

import lightning.pytorch as pl
import pytest
import torch

from callbacks import ExactResume
from datamodules import ImageDataModule
from leanlight.contracts import HasTerms, MethodModule, PrimaryMetric, UserError, derived_seed
from lit_modules.adq import SampleScorer, random_views, texture
from lit_modules.nn import ConvNet, LinearClassifier, pooled_features
from lit_modules.selection import DYNAMICS

make_convnet = functools.partial(ConvNet, in_channels=1, width=8, depth=2, image_size=8)
make_linear = functools.partial(LinearClassifier, image_size=8)
make_sgd = functools.partial(torch.optim.SGD, lr=0.5)


def trainer(**options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator="cpu", logger=False, **{"max_epochs": 3, "num_sanity_val_steps": 0, **quiet, **options}
    )


def digits(**options):
    return ImageDataModule(**{"dataset": "digits", "batch_size": 64, "predict_split": "train", **options})


def predicted(module, data, runner=None):
    parts = (runner or trainer()).predict(module, data)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(scope="module")
def fitted():
    pl.seed_everything(0)
    module, data, runner = SampleScorer(make_convnet, make_sgd), digits(), trainer()
    runner.fit(module, data)
    return module, data, runner


def test_it_is_a_method_of_the_suite(fitted):
    module, _, runner = fitted
    assert isinstance(module, MethodModule)
    assert isinstance(module, HasTerms)
    assert module.primary_metric == PrimaryMetric("val/accuracy", "max")
    assert module.progress().value == module.global_step > 0
    assert runner.callback_metrics["val/accuracy"] > 0.8
    assert {"train/loss", "train/accuracy", "val/loss"} < set(runner.callback_metrics)


def test_predictions_of_the_training_part_hold_what_rules_ask_for(fitted):
    module, data, runner = fitted
    got, split = predicted(module, data, runner), data.train_split
    names = {"index", "origin", "label", "embedding", "logits", "texture", "views", *DYNAMICS}
    assert got.keys() == names
    assert torch.equal(got["index"], torch.arange(len(split)))
    assert torch.equal(got["origin"], split.origin)
    assert torch.equal(got["label"], split.labels)
    image = split.images.float() / 255
    with torch.no_grad():
        embedding = pooled_features(module.network.eval(), image)
        torch.testing.assert_close(got["embedding"], embedding, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["logits"], module.network(image), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["texture"], texture(image))
    assert got["views"].shape == (len(split), 2, embedding.shape[1])
    assert not any(value.requires_grad for value in got.values())


def test_views_are_crops_that_depend_on_seed_and_index_alone(fitted):
    module, data, _ = fitted
    got = predicted(module, data)["views"]
    other = predicted(module, digits(eval_batch_size=37))["views"]
    torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)
    image = data.train_split.images.float() / 255
    for item in (0, 700):
        generator = torch.Generator().manual_seed(derived_seed(0, "views", item))
        crops = random_views(image[item : item + 1], 2, generator)
        with torch.no_grad():
            expected = pooled_features(module.network.eval(), crops[0])
        torch.testing.assert_close(got[item], expected, rtol=1e-4, atol=1e-5)
    assert ((got[:, 0] - got[:, 1]).abs().amax(1) > 0.1).float().mean() > 0.98  # few crops of 8x8 pixels are the same


def test_another_seed_gives_other_views(fitted, monkeypatch):
    module, data, _ = fitted
    before = predicted(module, data)["views"]
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.allclose(predicted(module, data)["views"], before, atol=1e-3)


def test_views_may_be_seen_by_a_network_of_their_own(fitted):
    _, data, _ = fitted
    make = functools.partial(ConvNet, in_channels=1, width=3, depth=1, image_size=8)
    module = SampleScorer(make_convnet, outputs=["embedding", "views"], view_network=make, views=3)
    state = torch.get_rng_state()
    got, again = predicted(module, data), predicted(module, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert got["views"].shape == (len(data.train_split), 3, 3 * 16)
    assert got["embedding"].shape == (len(data.train_split), 8 * 4)
    assert torch.equal(got["views"], again["views"])  # a network without weights of its own is that of the seed
    assert not any(name.startswith("view") for name in module.state_dict())


def test_pictures_of_training_show_the_margins_of_its_first_and_last_epoch(fitted):
    module, data, runner = fitted
    drawn, got = module.media("train")["margins"], predicted(module, data, runner)["train_margin"]
    assert list(drawn.series) == ["epoch 1", "epoch 3"]
    assert torch.equal(drawn.series["epoch 1"], got[:, 0])
    assert torch.equal(drawn.series["epoch 3"], got[:, 2])
    assert SampleScorer(make_linear).media("train") == {}
    assert "confusion" in module.media("val")


def test_a_scorer_that_was_not_fitted_predicts_all_but_the_dynamics():
    got = predicted(SampleScorer(make_convnet, outputs=["logits", "texture"]), digits())
    assert got.keys() == {"index", "origin", "label", "logits", "texture"}
    assert got["logits"].std() > 0


def by_hand(data, epochs, **options):
    """(N, E) margins of a linear classifier under plain gradient descent, from a loop of its own."""
    pl.seed_everything(0)
    network = make_linear()
    data.setup()
    data.trainer = None
    split, loader = data.train_split, data.train_dataloader()
    margins = torch.full((len(split), epochs), torch.nan)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            x, y = batch.image.float() / 255, batch.label
            logits = network(x)
            for item, row, label in zip(batch.index.tolist(), logits.detach(), y.tolist(), strict=True):
                others = torch.cat([row[:label], row[label + 1 :]])
                margins[item, epoch] = row[label] - others.max()
            network.zero_grad()
            torch.nn.functional.cross_entropy(logits, y).backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.5 * parameter.grad
    return margins


def trained(data, **options):
    pl.seed_everything(0)
    module = SampleScorer(make_linear, make_sgd, outputs=["logits"])
    trainer(limit_val_batches=0, **options).fit(module, data)
    return module


def test_dynamics_are_those_of_a_loop_by_hand():
    got = predicted(trained(digits(seed=3)), digits(seed=3))
    expected = by_hand(digits(seed=3), 3)
    assert expected.isfinite().all()
    torch.testing.assert_close(got["train_margin"], expected, rtol=1e-4, atol=1e-5)


def test_items_that_epochs_left_out_have_no_nan():
    module = trained(digits(seed=3, drop_last=True))
    expected = by_hand(digits(seed=3, drop_last=True), 3)
    got = predicted(module, digits())["train_margin"]
    seen = expected.isfinite()
    assert not seen.all()
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-5)
    assert got.isfinite().all()


def test_an_item_in_no_training_batch_leaves_the_dynamics_out_with_a_warning():
    module = trained(digits(), limit_train_batches=2)
    with pytest.warns(UserWarning, match=r"go without train_probability.*: 949 of 1,293 items were in no training"):
        got = predicted(module, digits())
    assert not set(DYNAMICS) & got.keys()


def test_dynamics_of_other_data_are_not_given_out():
    module = trained(digits())
    with pytest.warns(UserWarning, match="training saw other data"):
        got = predicted(module, digits(split_seed=1))
    assert not set(DYNAMICS) & got.keys()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*go without.*")
        assert not set(DYNAMICS) & predicted(module, digits(predict_split="test")).keys()


def test_recording_can_be_left_out_and_does_not_change_training():
    plain = trained(digits())
    pl.seed_everything(0)
    without = SampleScorer(make_linear, make_sgd, outputs=["logits"], record=False)
    trainer(limit_val_batches=0).fit(without, digits())
    assert torch.equal(plain.network.head.weight, without.network.head.weight)
    assert without.dynamics is None
    assert not set(DYNAMICS) & predicted(without, digits()).keys()


def test_a_checkpoint_brings_the_dynamics_back(tmp_path):
    data, runner = digits(), trainer(limit_val_batches=0)
    module = SampleScorer(make_linear, make_sgd, outputs=["logits"])
    runner.fit(module, data)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    again = SampleScorer.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    expected, got = predicted(module, data), predicted(again, digits())
    assert got.keys() == expected.keys() > set(DYNAMICS)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


@pytest.mark.parametrize("batches", [1, 5, 20, 21])
def test_a_run_resumed_inside_an_epoch_has_the_dynamics_of_an_undisturbed_one(tmp_path, batches):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx + 1 == batches:
                raise RuntimeError("killed")

    def scorer():
        pl.seed_everything(0)
        return SampleScorer(make_linear, make_sgd)

    def runner(*callbacks):
        options = {"limit_val_batches": 0, "default_root_dir": tmp_path, "enable_checkpointing": True}
        return trainer(**options, callbacks=[ExactResume(every=2), *callbacks])

    whole = scorer()
    runner().fit(whole, digits())
    with pytest.raises(RuntimeError, match="killed"):
        runner(Stop()).fit(scorer(), digits())
    resumed = scorer()
    runner().fit(resumed, digits(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    for name, value in whole.dynamics.by_item().items():
        assert torch.equal(resumed.dynamics.by_item()[name], value), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outputs": ["embeddings"]}, "outputs: .*'embeddings'"),
        ({"views": 0}, "views: .*0"),
    ],
)
def test_a_setting_out_of_range_names_its_key(options, words):
    with pytest.raises(UserError, match=words):
        SampleScorer(make_linear, **options)


class Bare(torch.nn.Module):
    """A network without features."""

    def __init__(self):
        super().__init__()
        self.network = make_linear()

    def forward(self, image):
        return self.network(image)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: SampleScorer(functools.partial(make_convnet, num_classes=7)), "num_classes 10"),
        (lambda: SampleScorer(Bare), "forward_features"),
        (
            lambda: SampleScorer(make_linear, view_network=functools.partial(make_convnet, in_channels=3)),
            "in_channels 1",
        ),
        (lambda: SampleScorer(make_linear, view_network=Bare), "forward_features"),
    ],
)
def test_a_network_that_does_not_fit_is_one_line(module, words):
    with pytest.raises(UserError, match=words) as caught:
        predicted(module(), digits())
    assert "\n" not in str(caught.value)


def test_items_with_several_attributes_are_refused():
    data = digits()
    data.setup()
    soft = torch.nn.functional.one_hot(data.train_split.labels, 10).float()
    data.train_split = dataclasses.replace(data.train_split, labels=soft)
    for use in (trainer().fit, trainer().predict):
        with pytest.raises(UserError, match="selection needs one class an item"):
            use(SampleScorer(make_linear), data)
