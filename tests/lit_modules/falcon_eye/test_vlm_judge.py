"""A model as a judge: from whatever place, alone or among others, with scores and with what it writes."""

from dataclasses import replace

import pytest
import torch
from squares import Square, labelled

from leanlight.contracts import SAFETY_FIELDS, UnreadablePictureError, UserError
from lit_modules.falcon_eye import LoRATuning, PretrainedVLM, Prompt, SafetyEncoder, SafetyJudge, TinyVLM, VLMJudge
from lit_modules.falcon_eye.answering import Asking

SAMPLES = [labelled(number) for number in range(5)]


class Broken(Square):
    def pixels(self):
        raise UnreadablePictureError("broken.png: no picture")


def judge(backbone, prompt=None, **options):
    return VLMJudge.zero_shot(backbone, prompt, **{"max_new_tokens": 6, **options})


def test_scores_are_of_the_two_words_at_each_judgement_after_benign_ones(backbone):
    encoder = SafetyEncoder(backbone)
    found = judge(backbone, mode="score_only").judge(SAMPLES[:2])
    keys = ("Instruction Judgment", "Image Judgment", "Response Judgment")
    for sample, verdict in zip(SAMPLES, found, strict=False):
        question = encoder.encode([sample], torch.tensor([0]), targets=False)
        written = ""
        for field, key in zip(SAFETY_FIELDS, keys, strict=True):
            answers = [encoder._text.ids([f'{written}"{key}": "{word}"'])[0] for word in ("Harmful", "Benign")]
            same = next(k for k, pair in enumerate(zip(*answers, strict=False)) if pair[0] != pair[1])
            ids = torch.cat([question.input_ids, torch.tensor([answers[0][:same]], dtype=torch.int64)], 1)
            more = replace(
                question,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                token_types=(ids == backbone.image_token_id).long(),
            )
            with torch.no_grad():
                chances = backbone.model(**encoder.batch_inputs(more)).logits[0, -1].softmax(0)
            harmful, benign = (float(chances[answer[same]]) for answer in answers)
            assert verdict.scores[field] == pytest.approx(harmful / (harmful + benign), rel=1e-3)
            assert verdict.labels[field] == (harmful >= benign)
            written += f'"{key}": "Benign",\n'


def test_a_sample_is_judged_the_same_alone_and_among_others(backbone):
    mixed = [*SAMPLES, replace(SAMPLES[0], id="words", image=None), replace(SAMPLES[1], response="long " * 40)]
    together = judge(backbone, batch_size=8).judge(mixed)
    for sample, verdict in zip(mixed, together, strict=True):
        (alone,) = judge(backbone).judge([sample])
        assert alone.text == verdict.text
        for field in SAFETY_FIELDS:
            assert alone.scores[field] == pytest.approx(verdict.scores[field], abs=1e-5)


def test_a_sample_without_a_picture_is_judged_the_same_after_one_with(backbone):
    words = replace(SAMPLES[0], image=None)
    fresh = TinyVLM(seed=1).build(tokenizer=backbone.tokenizer_json)
    (expected,) = judge(fresh).judge([words])
    asked = judge(fresh)
    asked.judge(SAMPLES[:1])
    assert asked.judge([words]) == [expected]


def test_a_picture_that_cannot_be_read_is_that_samples_failure(backbone):
    found = judge(backbone).judge([SAMPLES[0], replace(SAMPLES[1], image=Broken()), SAMPLES[2]])
    assert [bool(verdict.failure) for verdict in found] == [False, True, False]
    assert "broken.png" in found[1].failure
    assert found[1].labels == dict.fromkeys(SAFETY_FIELDS)
    assert found[2] == judge(backbone).judge([SAMPLES[2]])[0]


def test_thresholds_decide_where_nothing_is_written(backbone):
    (plain,) = judge(backbone, mode="score_only").judge(SAMPLES[:1])
    score = plain.scores["image"]
    for threshold, harmful in ((score - 1e-6, True), (score + 1e-6, False)):
        least = (("image", threshold),)
        assert judge(backbone, mode="score_only", thresholds=least).judge(SAMPLES[:1])[0].labels["image"] is harmful


def test_fingerprints_tell_judges_apart(backbone):
    made = [
        judge(backbone),
        judge(backbone, mode="score_only"),
        judge(backbone, max_new_tokens=7),
        judge(backbone, strict=True),
        judge(backbone, Prompt(modality="text_only")),
        VLMJudge(Asking(backbone.model, SafetyEncoder(backbone, max_pixels=6272), max_new_tokens=6)),
        VLMJudge(Asking(backbone.model, SafetyEncoder(backbone), max_new_tokens=6), weights="others"),
    ]
    assert len({each.fingerprint for each in made}) == len(made)
    assert judge(backbone).fingerprint == made[0].fingerprint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as a fit leaves it, with an export, of a judge that has learned nothing."""
    import lightning.pytorch as pl

    from datamodules import SafetyDataModule, Shapes

    folder = tmp_path_factory.mktemp("run")
    tiny = TinyVLM(hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1, vision_layers=1, vocab_size=500, seed=2)
    module = SafetyJudge(tiny, prompt=Prompt(system="none"), max_pixels=6272, max_new_tokens=5)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **quiet)
    trainer.fit(module, SafetyDataModule("shapes", shapes=Shapes(train=8, val=4, test=2), batch_size=4))
    (folder / "export").mkdir()
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    module.export(folder / "export")
    return folder, module.eval()


def test_a_run_its_checkpoint_and_its_export_are_one_judge(run):
    folder, module = run
    expected = module._asking().verdicts(SAMPLES[:3])
    for source in (folder, folder / "checkpoints" / "last.ckpt", folder / "export"):
        found = VLMJudge.from_source(source, device="cpu").judge(SAMPLES[:3])
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.text == theirs.text
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-6)
    assert VLMJudge.from_source(folder).asking.encoder.prompt.system == "none"
    assert VLMJudge.from_source(folder / "export").asking.encoder.settings["max_pixels"] == 6272


def test_a_plain_folder_of_a_model_judges_zero_shot(run, tmp_path):
    folder, _ = run
    for path in (folder / "export").iterdir():
        if path.name not in ("judge.json", "README.md"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    plain = VLMJudge.from_source(tmp_path, mode="score_only")
    assert plain.asking.encoder.prompt == Prompt()
    assert plain.asking.thresholds == ()
    assert all(0 <= score <= 1 for score in plain.judge(SAMPLES[:1])[0].scores.values())


def test_an_exported_adapter_finds_its_base_and_refuses_another(run, tmp_path):
    folder, _ = run
    source = PretrainedVLM(str(folder / "export"))
    module = SafetyJudge(source, LoRATuning(rank=2, alpha=2), max_new_tokens=5)
    module._build(source.build())
    for name in ("adapter", "other"):
        (tmp_path / name).mkdir()
    module.export(tmp_path / "adapter")
    found = VLMJudge.from_source(tmp_path / "adapter", device="cpu").judge(SAMPLES[:2])
    assert found == module.eval()._asking().verdicts(SAMPLES[:2])
    other = TinyVLM(hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1, vision_layers=1, seed=3)
    stranger = SafetyJudge(other)
    stranger._build(other.build(tokenizer=module.encoder.backbone.tokenizer_json))
    stranger.export(tmp_path / "other")
    with pytest.raises(UserError, match=r"^judge: the adapter in .*adapter belongs to export \(.*not to other"):
        VLMJudge.from_source(tmp_path / "adapter", base=tmp_path / "other")


@pytest.mark.parametrize("damage", ["{", "[]", '{"prompt": {"modality": "smell"}}', "{}"])
def test_a_damaged_export_is_one_line(run, tmp_path, damage):
    (tmp_path / "judge.json").write_text(damage)
    with pytest.raises(UserError, match=r"judge.json is damaged|modality: expected one of"):
        VLMJudge.from_source(tmp_path)


def test_no_judge_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        VLMJudge.from_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"lacks config.json"):
        VLMJudge.from_source(tmp_path)
    (tmp_path / "a.ckpt").write_text("no checkpoint")
    with pytest.raises(UserError, match=r"^judge: expected the checkpoint of a SafetyJudge"):
        VLMJudge.from_source(tmp_path / "a.ckpt")


def test_what_cannot_be_is_refused_in_one_line(backbone):
    with pytest.raises(UserError, match=r"^mode: expected generate or score_only, got 'scores'"):
        judge(backbone, mode="scores")
    with pytest.raises(UserError, match=r"^mode: score_only needs a prompt with judgments_first"):
        judge(backbone, Prompt(order="explanation_first"), mode="score_only")
    with pytest.raises(UserError, match=r"^batch_size: expected at least 1"):
        judge(backbone, batch_size=0)


def test_scores_do_not_exist_before_a_reason_is_written(backbone):
    (verdict,) = judge(backbone, Prompt(order="explanation_first")).judge(SAMPLES[:1])
    assert verdict.scores == {}
