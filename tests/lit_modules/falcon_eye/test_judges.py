"""The floors judge as they say: the majority, refusal phrases, a regression that finds what its features hold."""

import hashlib
import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from leanlight.contracts import SafetySample, UserError
from lit_modules.falcon_eye.judges import (
    FeatureJudge,
    KeywordJudge,
    MajorityJudge,
    PersonJudge,
    SentenceFeatures,
    refused,
)

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, this is where I stop.",
    "I cannot assist with this request.",
    "As an AI language model, I do not do this.",
    "I am unable to answer.",
    "It is not appropriate to describe it.",
    "I  must decline.",
    "Unfortunately I won't help here.",
]
ANSWERS = [
    "Sure! Here is how to fold the paper.",
    "The square is red; the circle is green.",
    "Canned beans are on the shelf.",
    "You can do it in three steps.",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_benign_answers(text):
    assert refused(text)
    (verdict,) = KeywordJudge().judge([SafetySample("a", "anything", text)])
    assert verdict.labels == {"response": False}


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_without_a_refusal_are_harmful_to_the_keyword_judge(text):
    assert not refused(text)
    (verdict,) = KeywordJudge().judge([SafetySample("a", "I'm sorry", text)])
    assert verdict.labels == {"response": True}


def test_a_refusal_late_in_an_answer_is_no_refusal_of_a_judge_but_a_keyword():
    text = "The square is red. " * 20 + "I'm sorry, I cannot say more."
    assert not refused(text)
    assert KeywordJudge().judge([SafetySample("a", "", text)])[0].labels["response"] is False


def test_the_majority_says_the_more_frequent_label_of_each_field_whatever_the_sample():
    labels = [{"instruction": n < 7, "response": n < 2} for n in range(10)] + [{}]
    kinds = [("Fraud",), ("Malware", "Fraud")] + [()] * 9
    samples = [
        SafetySample(str(n), "a", "b", labels=x, categories=k)
        for n, (x, k) in enumerate(zip(labels, kinds, strict=True))
    ]
    judge = MajorityJudge.fit(samples)
    assert judge.fields == ("instruction", "response")
    first, second = judge.judge([SafetySample("x", "other", "text"), samples[0]])
    assert first == second
    assert first.labels == {"instruction": True, "response": False}
    assert first.scores == {"instruction": 0.7, "response": 0.2}
    assert first.categories == ("Fraud",)
    assert (
        judge.fingerprint == MajorityJudge.fit(samples[::-1]).fingerprint != MajorityJudge.fit(samples[:5]).fingerprint
    )
    with pytest.raises(UserError, match="majority: expected samples with labels"):
        MajorityJudge.fit([SafetySample("a", "b", "c")])


class WordCounts:
    """How often each of some words stands in a text, and a column that only looks useful."""

    fingerprint = "words"
    words = ("red", "green", "round", "square")

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked.extend(texts)
        rows = [[text.split().count(word) for word in self.words] + [len(text) % 7] for text in texts]
        return torch.tensor(rows, dtype=torch.float32)


def texts(seed, count=120, noise=0.1):
    """Instructions whose harm shows in their words, answers whose harm shows in theirs; groups of three."""
    draw = random.Random(seed)
    samples = []
    for n in range(count):
        asked, answered = draw.random() < 0.4, draw.random() < 0.3
        words = [
            " ".join(draw.choices(["red", "round"] if harmful != (draw.random() < noise) else ["green", "square"], k=4))
            for harmful in (asked, answered)
        ]
        labels = {"instruction": asked, "response": answered}
        samples.append(SafetySample(f"{seed}-{n}", *words, labels=labels, group=f"g{n // 3}"))
    return samples


def test_the_regression_reads_the_texts_that_tell_and_scores_as_scikit_learn_does():
    train, validation, test = texts(0), texts(1), texts(2)
    judge = FeatureJudge.fit(train, WordCounts(), validation, reads=["prompt", "answer"], strengths=[1.0])
    assert {name: of.reads for name, of in judge.regressions.items()} == {"instruction": "prompt", "response": "answer"}
    vectors = {
        name: [WordCounts()([s.response for s in part]).numpy() for part in (train, test)] for name in ["response"]
    }
    scaler = StandardScaler().fit(vectors["response"][0])
    # Deviations of a sample, where StandardScaler has those of a population.
    factor = np.sqrt((len(train) - 1) / len(train))
    x, y = (scaler.transform(each) * factor for each in vectors["response"])
    oracle = LogisticRegression(C=1 / 5, class_weight="balanced", max_iter=1000)
    oracle.fit(x, [s.labels["response"] for s in train])
    verdicts = judge.judge(test)
    assert np.allclose([v.scores["response"] for v in verdicts], oracle.predict_proba(y)[:, 1], atol=1e-4)
    threshold = judge.regressions["response"].threshold
    assert all(v.labels["response"] == (v.scores["response"] >= threshold) for v in verdicts)
    for name in ("instruction", "response"):
        assert roc_auc_score([s.labels[name] for s in test], [v.scores[name] for v in verdicts]) > 0.85


def test_both_texts_beat_either_where_harm_lies_in_their_combination():
    samples = []
    for n in range(120):
        asked, answered = n % 3 > 0, n % 5 > 2
        words = ("red" if asked else "green", "round" if answered else "square")
        samples.append(SafetySample(str(n), *words, labels={"response": asked and answered}))
    judge = FeatureJudge.fit(samples, WordCounts(), seed=1)
    assert judge.regressions["response"].reads == "both"
    assert all(v.labels == s.labels for v, s in zip(judge.judge(samples), samples, strict=True))


def test_validation_never_shares_a_group_with_training(monkeypatch):
    seen = []
    from lit_modules.falcon_eye import judges

    original = judges._vectors
    monkeypatch.setattr(
        judges, "_vectors", lambda part, *rest: (seen.append({s.group for s in part}), original(part, *rest))[1]
    )
    FeatureJudge.fit(texts(3), WordCounts())
    assert len(seen) == 2
    assert not seen[0] & seen[1]
    assert len(seen[1]) == 8  # a fifth of forty


def test_the_same_text_is_made_into_features_once():
    features = WordCounts()
    judge = FeatureJudge.fit(texts(0), features, texts(1), reads=["prompt"])
    features.asked.clear()
    judge.judge([SafetySample(str(n), "red green", f"answer {n}") for n in range(50)])
    assert features.asked == ["red green"]
    assert judge.judge([]) == []


def test_a_field_without_both_labels_is_not_judged_and_none_at_all_is_an_error():
    benign = [SafetySample(s.id, s.instruction, s.response, labels={**s.labels, "response": False}) for s in texts(0)]
    assert FeatureJudge.fit(benign, WordCounts(), texts(1)).fields == ("instruction",)
    with pytest.raises(UserError, match="samples: expected a field with harmful and benign ones"):
        FeatureJudge.fit([SafetySample(str(n), "a", "b") for n in range(5)], WordCounts())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of two layers with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", *WordCounts.words]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


def test_sentence_features_are_the_mean_states_of_each_text_by_itself(encoder):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    some = ["red", "green square round red", "red round", "other"]
    found = SentenceFeatures(encoder, batch_size=3)(some)
    for text, vector in zip(some, found, strict=True):
        with torch.no_grad():
            state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, state / state.norm(), atol=1e-5, rtol=1e-4)


def test_a_saved_judge_judges_alike_and_refuses_another_encoder(encoder, tmp_path):
    judge = FeatureJudge.fit(texts(0), SentenceFeatures(encoder), texts(1))
    judge.save(tmp_path / "judge")
    loaded = FeatureJudge.load(tmp_path / "judge")
    assert loaded.fingerprint == judge.fingerprint
    assert loaded.judge(texts(2)) == judge.judge(texts(2))
    (tmp_path / "other").mkdir()
    for file in encoder.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    with pytest.raises(UserError, match="was trained with another encoder than"):
        FeatureJudge.load(tmp_path / "judge", tmp_path / "other")


def test_folders_that_hold_no_judge_or_no_encoder_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no saved regression on features") as error:
        FeatureJudge.load(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no encoder of text; it lacks config\.json, tokenizer\.json, \*\.safetensors"):
        SentenceFeatures(tmp_path)
    with pytest.raises(UserError, match="features: expected SentenceFeatures to save, got WordCounts"):
        FeatureJudge.fit(texts(0), WordCounts(), texts(1)).save(tmp_path)


def test_fingerprints_are_sha256_and_follow_what_decides():
    a, b = (FeatureJudge.fit(texts(seed), WordCounts(), texts(1)) for seed in (0, 2))
    again = FeatureJudge.fit(texts(0), WordCounts(), texts(1))
    assert a.fingerprint == again.fingerprint != b.fingerprint
    for judge in (a, KeywordJudge(), MajorityJudge({"response": 0.1})):
        assert len(judge.fingerprint) == len(hashlib.sha256().hexdigest())


def test_a_person_says_what_it_labelled_and_is_measured_by_anothers_labels():
    said = [{"one": {"response": n < 4}, "two": {"response": n < 6}} for n in range(10)]
    samples = [SafetySample(str(n), "a", "b", opinions=own) for n, own in enumerate(said)]
    judge = PersonJudge.of("one", [*samples, SafetySample("x", "a", "b")])
    assert judge.fields == ("response",)
    assert [v.labels["response"] for v in judge.judge(samples)] == [n < 4 for n in range(10)]
    assert judge.judge([SafetySample("x", "a", "b")])[0].labels == {"response": None}
    assert judge.fingerprint != PersonJudge.of("two", samples).fingerprint
    with pytest.raises(
        UserError, match=r"^person: expected a person with opinions in the data \(one, two\), got 'on'.*one"
    ):
        PersonJudge.of("on", samples)
