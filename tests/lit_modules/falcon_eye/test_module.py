"""The judge around its model: what it trains, measures, keeps, predicts and refuses."""

import json
import math
from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer

from datamodules import SafetyDataModule, Shapes
from leanlight.contracts import SAFETY_FIELDS, UserError
from lit_modules.falcon_eye import (
    JudgeEvaluation,
    Keyword,
    LoRATuning,
    Majority,
    PretrainedVLM,
    Prompt,
    SafetyJudge,
    TinyVLM,
)

SMALL = Shapes(train=24, val=8, test=6)
TINY = TinyVLM(hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1, vision_layers=1, vocab_size=500, seed=1)
LOW_RANK = LoRATuning(rank=2, alpha=4, dropout=0.0)


def make_data(**more):
    return SafetyDataModule("shapes", **{"shapes": SMALL, "batch_size": 8, "eval_batch_size": 8, "seed": 4, **more})


def make(backbone=TINY, **options):
    optimizer = partial(torch.optim.AdamW, lr=0.01)
    return SafetyJudge(backbone, **{"optimizer": optimizer, "max_new_tokens": 3, "max_length": 900, **options})


def make_trainer(folder, **more):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, **{**options, **quiet, **more})


def fit(folder, module=None, data=None, **more):
    pl.seed_everything(3)
    module, trainer = module or make(), make_trainer(folder, **more)
    trainer.fit(module, data or make_data())
    return module, trainer


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A judge after an epoch, and its trainer."""
    return fit(tmp_path_factory.mktemp("fitted"))


@pytest.fixture(scope="module")
def base(fitted, tmp_path_factory):
    """The exported folder of that judge, as the base of others."""
    folder = tmp_path_factory.mktemp("base")
    fitted[0].export(folder)
    return folder


def test_it_learns_is_judged_by_scores_and_tested_by_what_it_writes(fitted):
    module, trainer = fitted
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert seen["val/loss"] < math.log(len(module.encoder.backbone.tokenizer))  # below that of equal chances
    assert 0 < seen["train/padding"] < 0.5
    for name in SAFETY_FIELDS:
        assert seen[f"val/{name}_parse_rate"] == 1
        assert 0 <= seen[f"val/{name}_auroc"] <= 1
    (tested,) = trainer.test(module, make_data(), verbose=False)
    assert tested["test/response_parse_rate"] == 0  # three tokens say nothing
    assert tested["test/response_accuracy"] == 0
    assert "test/response_auroc" in tested


def test_validation_loss_is_the_mean_over_all_tokens_of_answers(fitted):
    module, trainer = fitted
    samples = list(trainer.datamodule.samples("val"))
    batch = module.encoder.encode(samples, torch.arange(len(samples)), targets=True)
    with torch.no_grad():
        expected = module.network.eval()(**module.encoder.batch_inputs(batch)).loss
    found = trainer.validate(module, make_data(eval_batch_size=3), verbose=False)[0]["val/loss"]
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_weights_of_judgements_and_the_question_change_what_is_learned(fitted):
    module, trainer = fitted
    batch = next(iter(trainer.datamodule.train_dataloader()))
    plain = [float(x.detach()) for x in module._loss(batch)]
    weighted = make(field_loss_weight=3.0)
    weighted._build(module.encoder.backbone)
    assert float(weighted._loss(batch)[1]) == plain[1] + 2 * 3 * len(batch)  # three judgements a sample
    whole = make(loss_on="answer+prompt")
    whole._build(module.encoder.backbone)
    written = int(((batch.attention_mask == 1) & (batch.token_types == 0)).sum())
    assert float(whole._loss(batch)[1]) == written - len(batch)  # nothing predicts the first token


def test_a_checkpoint_rebuilds_the_judge_without_data(fitted, tmp_path):
    module, trainer = fitted
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = SafetyJudge.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.encoder.backbone.tokenizer_json == module.encoder.backbone.tokenizer_json
    assert again.evaluation.thresholds == module.evaluation.thresholds != {}
    samples = trainer.datamodule.samples("test")
    scores = [judge.eval()._asking().harm(judge._asking().encode(samples)) for judge in (again, module)]
    assert torch.equal(*scores)


def test_the_tokenizer_of_a_checkpoint_stands_whatever_the_data_say(fitted, tmp_path):
    module, trainer = fitted
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = make_data(shapes=Shapes(train=24, val=8, test=6, templates="b"))
    judge = make()
    make_trainer(tmp_path).test(judge, other, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert judge.encoder.backbone.tokenizer_json == module.encoder.backbone.tokenizer_json
    for name, value in module.state_dict().items():
        assert torch.equal(judge.state_dict()[name], value), name


@pytest.mark.parametrize("tuning", [None, LOW_RANK], ids=["full", "lora"])
def test_an_interrupted_fit_goes_on(tmp_path, base, tuning):
    source = TINY if tuning is None else PretrainedVLM(str(base))
    whole, _ = fit(tmp_path, make(source, tuning=tuning), max_epochs=2)
    _, trainer = fit(tmp_path, make(source, tuning=tuning))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    pl.seed_everything(99)
    again = make(source, tuning=tuning)
    make_trainer(tmp_path, max_epochs=2).fit(again, make_data(), ckpt_path=tmp_path / "half.ckpt")
    assert again.global_step == 6
    assert again.history["step"] == [3, 6]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_checkpoint_of_an_adapter_holds_no_base_and_refuses_another(tmp_path, base):
    module, trainer = fit(tmp_path, make(PretrainedVLM(str(base)), tuning=LOW_RANK))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["state_dict"]
    assert all("lora_" in name for name in saved["state_dict"])
    assert saved["base"]["digest"] == module.encoder.backbone.digest
    again = SafetyJudge.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    other = make(TINY)
    fit(tmp_path, other, max_steps=1)
    (tmp_path / "other").mkdir()
    other.export(tmp_path / "other")
    with pytest.raises(UserError, match=r"^backbone: expected the base .* got other \(.*backbone.init_args.path"):
        SafetyJudge.load_from_checkpoint(tmp_path / "a.ckpt", backbone=PretrainedVLM(str(tmp_path / "other")))


def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(base):
    def gradients(**options):
        module = make(PretrainedVLM(str(base)), tuning=LOW_RANK, **options)
        module._build(module.make_backbone.build())
        module.network.train()
        data = make_data()
        data.encoder = module.encoder
        data.setup("fit")
        loss, _ = module._loss(next(iter(data.train_dataloader())))
        loss.backward()
        return {name: value.grad for name, value in module.network.named_parameters() if value.requires_grad}

    plain, checkpointed = gradients(), gradients(gradient_checkpointing=True)
    assert max(gradient.abs().max() for gradient in plain.values()) > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_fit_says_how_many_texts_it_cuts(tmp_path, fitted):
    encoder, samples = fitted[0].encoder, fitted[1].datamodule.samples("train")
    longest = int(encoder.lengths(samples, targets=True).max())
    with pytest.warns(UserWarning, match=r"^max_length: texts of \d+ of 24 training samples are cut, by \d+ tokens"):
        fit(tmp_path, make(max_length=longest - 2), max_steps=1)


def test_a_reason_before_the_judgement_is_written_on_validation_data_too(tmp_path):
    module, trainer = fit(tmp_path, make(prompt=Prompt(order="explanation_first")), limit_train_batches=1)
    assert "val/response_auroc" not in trainer.callback_metrics
    assert trainer.callback_metrics["val/response_parse_rate"] == 0
    assert module.evaluation.thresholds == {}


def test_predictions_become_a_line_a_sample(fitted, tmp_path):
    module, trainer = fitted
    pieces = trainer.predict(module, make_data(eval_batch_size=4))
    told = module.collect(lambda: iter(pieces), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    samples = trainer.datamodule.samples("test")
    assert [row["sample"] for row in rows] == [sample.id for sample in samples]
    assert told["verdicts"] == len(rows) == 6
    scores = module.eval()._asking().harm(module._asking().encode(samples))
    columns = [column for name in SAFETY_FIELDS for column in (name, f"p_{name}")]
    for row, score in zip(rows, scores, strict=True):
        assert list(row) == ["sample", *columns, "categories", "explanation", "text", "failure"]
        assert [row[f"p_{name}"] for name in SAFETY_FIELDS] == pytest.approx(score.tolist(), abs=1e-4)
        assert row["response"] in ("harmful", "benign", "")
        assert isinstance(row["text"], str)


def test_pictures_show_scores_confusions_and_verdicts(fitted):
    module, trainer = fitted
    trainer.test(module, make_data(), verbose=False)
    drawn = module.media("test")
    assert {"score_image", "calibration_image", "confusion_response", "accuracy", "verdicts"} <= drawn.keys()
    assert int(drawn["confusion_response"].matrix.sum()) == 6
    assert len(drawn["verdicts"].rows) == 6
    assert {len(row) for row in drawn["verdicts"].rows} == {len(drawn["verdicts"].columns)}


def test_judges_without_an_optimiser_are_measured_as_runs(tmp_path):
    module = JudgeEvaluation(Majority())
    trainer = make_trainer(tmp_path)
    trainer.fit(module, make_data())
    (tested,) = trainer.test(module, make_data(), verbose=False)
    train, test = (trainer.datamodule.samples(part) for part in ("train", "test"))
    for name in SAFETY_FIELDS:
        says = sum(sample.labels[name] for sample in train) > len(train) / 2
        right = sum(sample.labels[name] == says for sample in test) / len(test)
        assert tested[f"test/{name}_accuracy"] == pytest.approx(right)
        assert tested[f"test/{name}_balanced_accuracy"] == 0.5
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(JudgeEvaluation.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True), JudgeEvaluation)
    (keyword,) = trainer.test(JudgeEvaluation(Keyword()), make_data(), verbose=False)
    assert not [name for name in keyword if "image" in name or "instruction" in name]  # it judges answers alone
    assert keyword["test/response_parse_rate"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_on": "prompt"}, "^loss_on: expected answer or answer.prompt, got 'prompt'"),
        ({"field_loss_weight": 0.0}, "^field_loss_weight: expected a positive number"),
        ({"max_new_tokens": 0}, "^max_new_tokens: expected at least 1"),
        ({"answer_eos": "stop"}, "answer_eos: expected one of"),
        ({"max_length": 20}, "max_length: sample .* even without its texts"),
        ({"backbone": PretrainedVLM("nowhere")}, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        fit(tmp_path, make(**options), max_steps=1)


def test_data_of_another_kind_are_refused(tmp_path):
    from datamodules import ImageDataModule

    with pytest.raises(UserError, match=r"^data: SafetyJudge needs a DataModule of answers"):
        fit(tmp_path, data=ImageDataModule("digits"))


@pytest.mark.parametrize("cache_mb", [0, 64])
def test_validation_and_test_judge_what_the_loader_encoded_as_samples_asked_alone(fitted, monkeypatch, cache_mb):
    module, trainer = fitted
    data = make_data(eval_batch_size=3, cache_mb=cache_mb)
    got = {"val": [], "test": []}
    monkeypatch.setattr(module.evaluation, "update", lambda split, samples, verdicts: got[split].extend(verdicts))
    monkeypatch.setattr(module.evaluation, "finish", lambda split, **_: {})
    encoded = []
    encode = type(module.encoder).encode
    monkeypatch.setattr(type(module.encoder), "encode", lambda *a, **b: encoded.append(a[2]) or encode(*a, **b))
    for split, run in (("val", trainer.validate), ("test", trainer.test)):
        encoded.clear()
        run(module, data, verbose=False)
        samples = trainer.datamodule.samples(split)
        assert torch.cat(encoded).tolist() == list(range(len(samples)))  # each of them once
        asking = module.eval()._asking(scores=split == "val")
        for verdict, sample in zip(got[split], samples, strict=True):
            (alone,) = asking.verdicts([sample])
            assert (verdict.labels, verdict.text) == (alone.labels, alone.text)
            assert verdict.scores == pytest.approx(alone.scores, abs=1e-5)


@pytest.mark.parametrize("cache_mb", [0, 64])
def test_a_step_computes_the_logits_that_its_loss_needs_and_no_more(fitted, monkeypatch, cache_mb):
    module = fitted[0]
    data = make_data(cache_mb=cache_mb)
    data.encoder = module.encoder
    data.setup("fit")
    list(data.train_dataloader())  # which fills the cache
    kept = []
    call = type(module).forward
    monkeypatch.setattr(
        type(module), "forward", lambda self, batch, keep=0: kept.append(keep) or call(self, batch, keep)
    )
    for batch in data.train_dataloader():
        loss = module._loss(batch)
        first = min(int((row != -100).nonzero()[0]) for row in batch.labels)
        assert kept[-1] == batch.labels.shape[1] - first + 1
        for part, whole in zip(loss, module._loss(replace(batch, learned=0)), strict=True):
            torch.testing.assert_close(part, whole)
    assert len(kept) == 6


def test_predictions_of_a_part_that_is_never_shown_are_refused_and_a_test_of_it_is_not(tmp_path):
    module, trainer = fit(tmp_path, make(prompt=Prompt(modality="text_only")), max_steps=1)
    assert "test/image_accuracy" in trainer.test(module, make_data(), verbose=False)[0]
    with pytest.raises(UserError, match=r"^prompt.modality: expected one that shows the image, .* got text_only"):
        trainer.predict(module, make_data())


def test_adapters_are_refused_where_weights_are_sharded_and_nothing_is_exported_there(tmp_path, base, monkeypatch):
    monkeypatch.setattr(SafetyJudge, "_sharded", True)
    with pytest.raises(UserError, match=r"^tuning: expected FullTuning of all weights with FSDP, .* got LoRA"):
        fit(tmp_path, make(PretrainedVLM(str(base)), tuning=LOW_RANK), max_steps=1)
    module, _ = fit(tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match="leanlight export RUN"):
        assert module.export(tmp_path) == []
