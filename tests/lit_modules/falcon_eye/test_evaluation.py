"""What is measured of verdicts in an epoch, against scikit-learn, and what pictures and files get of it."""

import json

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from squares import labelled

from leanlight.contracts import SAFETY_FIELDS, Verdict
from lit_modules.falcon_eye import SafetyEvaluation
from lit_modules.falcon_eye.predictions import as_outputs, write_verdicts

SAMPLES = [labelled(number) for number in range(30)]


def verdicts(seed=0, missing=True):
    """Verdicts whose scores are drawn and whose labels are those of scores from 1/2 on; every seventh says nothing."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(SAMPLES), 3, generator=generator, dtype=torch.float64)
    found = []
    for number, row in enumerate(scores.tolist()):
        said = {
            name: None if missing and number % 7 == 0 else score >= 0.5
            for name, score in zip(SAFETY_FIELDS, row, strict=True)
        }
        found.append(Verdict(said, dict(zip(SAFETY_FIELDS, row, strict=True)), text=f"answer {number}"))
    return found


def measured(evaluation, split, found, **options):
    evaluation.start(split)
    for start in range(0, len(SAMPLES), 8):
        evaluation.update(split, SAMPLES[start : start + 8], found[start : start + 8])
    return {name: float(value) for name, value in evaluation.finish(split, **options).items()}


@pytest.fixture
def evaluation():
    made = SafetyEvaluation()
    made.prepare(SAFETY_FIELDS)
    return made


def test_balanced_accuracy_is_the_mean_over_fields(evaluation):
    found = measured(evaluation, "val", verdicts(missing=False))
    by_field = [
        balanced_accuracy_score(
            [sample.labels[name] for sample in SAMPLES], [verdict.labels[name] for verdict in verdicts(missing=False)]
        )
        for name in SAFETY_FIELDS
    ]
    assert found["val/balanced_accuracy"] == pytest.approx(sum(by_field) / 3)


def test_thresholds_of_validation_are_applied_to_test(evaluation):
    measured(evaluation, "val", verdicts(1))
    assert set(evaluation.thresholds) == set(SAFETY_FIELDS)
    found = measured(evaluation, "test", verdicts(2))
    for name, threshold in evaluation.thresholds.items():
        labels = [sample.labels[name] for sample in SAMPLES]
        at = [verdict.scores[name] >= threshold for verdict in verdicts(2)]
        assert found[f"test/{name}_balanced_accuracy_at_threshold"] == pytest.approx(
            balanced_accuracy_score(labels, at)
        )
        of_validation = [verdict.scores[name] for verdict in verdicts(1)]
        best = max(balanced_accuracy_score(labels, [s >= t for s in of_validation]) for t in [0, *of_validation])
        chosen = balanced_accuracy_score(labels, [score >= threshold for score in of_validation])
        assert chosen == pytest.approx(best)


def test_figures_of_categories_are_left_out_where_nothing_was_written(evaluation):
    assert "val/category_recall" in measured(evaluation, "val", verdicts())
    assert not any("categor" in name for name in measured(evaluation, "val", verdicts(), written=False))


def test_pictures_count_every_sample_once(evaluation):
    measured(evaluation, "test", verdicts())
    drawn = evaluation.media("test")
    for name in SAFETY_FIELDS:
        harmful = sum(sample.labels[name] for sample in SAMPLES)
        matrix = drawn[f"confusion_{name}"].matrix
        assert matrix.sum(1).tolist() == [30 - harmful, harmful]
        assert matrix[:, 2].sum() == 5  # those that say nothing
        series = drawn[f"score_{name}"].series
        assert {word: len(values) for word, values in series.items()} == {"harmful": harmful, "benign": 30 - harmful}
    assert [row[0] for row in drawn["verdicts"].rows] == [sample.id for sample in SAMPLES]


def test_an_epoch_forgets_the_one_before(evaluation):
    first = measured(evaluation, "test", verdicts(3))
    measured(evaluation, "test", verdicts(4))
    assert measured(evaluation, "test", verdicts(3)) == first


def test_a_line_of_a_file_holds_whatever_a_judge_wrote(tmp_path):
    hostile = Verdict(
        {"response": True}, {"response": 0.75}, ("Fraud", "Bias"), 'a "reason"\n', text="=1+1\u2028</script>\n{}"
    )
    silent = Verdict({"response": None}, failure="picture unreadable")
    piece = {"index": torch.arange(2), "sample": ["s0", "s1"], "p_response": torch.tensor([0.75, float("nan")])}
    piece |= as_outputs([hostile, silent], ["response"])
    told = write_verdicts(iter([piece]), ["response"], tmp_path / "verdicts.jsonl")
    lines = (tmp_path / "verdicts.jsonl").read_text(encoding="utf-8").split("\n")
    first, second = (json.loads(line) for line in lines if line)
    assert first["text"] == hostile.text
    assert (first["response"], first["p_response"], first["categories"]) == ("harmful", 0.75, "Fraud; Bias")
    assert (second["response"], second["p_response"], second["failure"]) == ("", None, "picture unreadable")
    assert told == {"verdicts": 2, "response_harmful_share": 0.5}
