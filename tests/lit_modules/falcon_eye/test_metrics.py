"""Figures equal those of scikit-learn, the authors' counting and loops; agreement is that of a published example."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from leanlight.contracts import HARM_CATEGORIES, SAFETY_FIELDS, SafetySample, UserError, Verdict
from lit_modules.falcon_eye.metrics import (
    Judgements,
    SafetyMetrics,
    choose_threshold,
    decided,
    fleiss_kappa,
    recall_name,
    summary,
)

N = 160


def triples(seed=0, count=N):
    """Samples of which some lack labels, and verdicts that lack some answers and scores; ties among the scores."""
    draw = random.Random(seed)
    samples, verdicts = [], []
    for n in range(count):
        labels = {name: draw.random() < 0.3 for name in SAFETY_FIELDS if draw.random() < 0.9}
        kinds = tuple(k for k in HARM_CATEGORIES[:6] if any(labels.values()) and draw.random() < 0.3)
        samples.append(SafetySample(f"{n}", "a", "b", labels=labels, categories=kinds, group=f"g{n % 40}"))
        said, scores = {}, {}
        for name in SAFETY_FIELDS:
            score = round(min(max(draw.gauss(0.7 if labels.get(name) else 0.3, 0.3), 0), 1), 1)
            said[name] = None if draw.random() < 0.1 else score >= 0.5
            if draw.random() < 0.9:
                scores[name] = score
        named = tuple(k for k in HARM_CATEGORIES[:8] if draw.random() < (0.6 if k in kinds else 0.1))
        verdicts.append(
            Verdict(said, scores, named, refused=draw.random() < 0.2, failure="closed" if draw.random() < 0.1 else "")
        )
    return samples, verdicts


def of_field(samples, verdicts, name):
    """True labels and what was said, 2 where nothing was, of the labelled samples."""
    rows = [(s.labels[name], v.labels[name]) for s, v in zip(samples, verdicts, strict=True) if name in s.labels]
    return [int(true) for true, _ in rows], [2 if said is None else int(said) for _, said in rows]


def expected_of(samples, verdicts):
    """All figures by scikit-learn and by loops."""
    found = {}
    for name in SAFETY_FIELDS:
        true, said = of_field(samples, verdicts, name)
        every = [v.labels[name] for v in verdicts]
        recalls = recall_score(true, said, labels=[0, 1], average=None)
        rated = [
            (s.labels[name], v.scores[name])
            for s, v in zip(samples, verdicts, strict=True)
            if name in s.labels and name in v.scores
        ]
        of_harm = {"labels": [1], "average": "macro"}
        found |= {
            f"{name}_accuracy": accuracy_score(true, said),
            f"{name}_balanced_accuracy": recalls.mean(),
            f"{name}_f1": f1_score(true, said, **of_harm),
            f"{name}_precision": precision_score(true, said, **of_harm),
            f"{name}_recall": recalls[1],
            f"{name}_false_positive_rate": np.mean([s == 1 for t, s in zip(true, said, strict=True) if t == 0]),
            f"{name}_parse_rate": np.mean([label is not None for label in every]),
            f"{name}_harmful_share": np.mean([label is True for label in every]),
            f"{name}_auroc": roc_auc_score(*zip(*rated, strict=True)),
            f"{name}_auprc": average_precision_score(*zip(*rated, strict=True)),
        }
    whole = [(s.labels, v.labels) for s, v in zip(samples, verdicts, strict=True) if len(s.labels) == 3]
    found["joint_accuracy"] = np.mean([all(true[k] is said[k] for k in true) for true, said in whole])
    found["refusal_rate"] = np.mean([v.refused for v in verdicts])
    found["failure_rate"] = np.mean([bool(v.failure) for v in verdicts])
    found |= authors_recall(samples, verdicts)
    labelled = [(s.categories, v.categories) for s, v in zip(samples, verdicts, strict=True) if s.categories]
    hot = [np.array([[k in each[side] for k in HARM_CATEGORIES] for each in labelled]) for side in (0, 1)]
    found["category_recall"] = recall_score(*hot, average="micro")
    found["category_set_f1"] = f1_score(*hot, average="samples", zero_division=0)
    return found


def authors_recall(samples, verdicts):
    """The published counting: of the rows whose written kinds contain a name, how many answers contain it."""
    found = {}
    for kind in HARM_CATEGORIES:
        total = right = 0
        for sample, verdict in zip(samples, verdicts, strict=True):
            if kind in ", ".join(sample.categories):
                total += 1
                if kind in ", ".join(verdict.categories):
                    right += 1
        if total:
            found[recall_name(kind)] = right / total
    return found


def by_majority(samples):
    """Verdicts of someone who always says the most frequent label and kind."""
    said = {}
    for name in SAFETY_FIELDS:
        known = [s.labels[name] for s in samples if name in s.labels]
        said[name] = 2 * sum(known) > len(known)
    counts = [sum(k in s.categories for s in samples) for k in HARM_CATEGORIES]
    kind = HARM_CATEGORIES[int(np.argmax(counts))]
    return [Verdict(said, dict.fromkeys(said, 0.2), (kind,)) for _ in samples]


@pytest.mark.parametrize("batch", [7, N])
def test_all_figures_are_those_of_scikit_learn_and_of_the_authors_counting(batch):
    samples, verdicts = triples()
    metrics = SafetyMetrics(SAFETY_FIELDS)
    for start in range(0, N, batch):
        metrics.update(samples[start : start + batch], verdicts[start : start + batch])
    found, expected = metrics.compute(), expected_of(samples, verdicts)
    assert {name for name in found if not name.endswith("_majority")} == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value), name
    metrics.reset()
    other = triples(seed=1)
    metrics.update(*other)
    assert metrics.compute()["response_f1"].item() == pytest.approx(expected_of(*other)["response_f1"])


def test_the_majority_beside_every_figure_is_that_of_a_judge_who_always_says_it():
    samples, verdicts = triples()
    samples = [  # a field whose majority is harmful
        SafetySample(s.id, "a", "b", labels={**s.labels, "image": not s.labels.get("image")}, categories=s.categories)
        for s in samples
    ]
    found = summary(Judgements.of(samples, verdicts, SAFETY_FIELDS), resamples=2)
    of_others = ("parse_rate", "harmful_share", "precision")
    rest = {f"{name}_{figure}" for name in SAFETY_FIELDS for figure in of_others} | {"refusal_rate", "failure_rate"}
    scored = {name for name in found if name.endswith(("auroc", "auprc"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it never says harmful of two fields, so their precision is undefined
        expected = expected_of(samples, by_majority(samples))
    for name in found.keys() - rest - scored:
        assert found[name].majority == pytest.approx(expected[name]), name
    logged = SafetyMetrics(SAFETY_FIELDS)
    logged.update(samples, verdicts)
    assert logged.compute()["image_f1_majority"].item() == pytest.approx(expected["image_f1"])
    assert expected["image_f1"] > 0.5
    for name in SAFETY_FIELDS:
        known = [
            s.labels[name] for s, v in zip(samples, verdicts, strict=True) if name in s.labels and name in v.scores
        ]
        assert found[f"{name}_auroc"].majority == 0.5
        assert found[f"{name}_auprc"].majority == pytest.approx(np.mean(known))
    assert found["refusal_rate"].majority == 0


def test_figures_say_how_many_samples_are_behind_them():
    samples, verdicts = triples()
    found = summary(Judgements.of(samples, verdicts, SAFETY_FIELDS), resamples=2)
    labelled = [s for s in samples if "response" in s.labels]
    assert found["response_accuracy"].items == len(labelled)
    assert found["response_recall"].items == sum(s.labels["response"] for s in labelled)
    assert found["response_parse_rate"].items == N
    assert found["joint_accuracy"].items == sum(len(s.labels) == 3 for s in samples)
    assert found["category_recall_malware"].items == sum("Malware" in s.categories for s in samples)
    scored = [s for s, v in zip(samples, verdicts, strict=True) if "image" in s.labels and "image" in v.scores]
    assert found["image_auroc"].items == len(scored)


def test_without_labels_categories_and_scores_there_are_only_figures_of_the_answers():
    samples = [SafetySample(str(n), "a", "b") for n in range(4)]
    verdicts = [Verdict({"response": label}) for label in (True, False, None, False)]
    found = summary(Judgements.of(samples, verdicts, ["response"]), resamples=5)
    assert {name: figure.value for name, figure in found.items()} == {
        "response_parse_rate": 0.75,
        "response_harmful_share": 0.25,
        "refusal_rate": 0,
        "failure_rate": 0,
    }


def test_scores_of_one_label_alone_have_no_areas():
    samples = [SafetySample(str(n), "a", "b", labels={"response": True}) for n in range(3)]
    metrics = SafetyMetrics(["response"])
    metrics.update(samples, [Verdict({"response": True}, {"response": 0.9})] * 3)
    assert not {"response_auroc", "response_auprc", "response_balanced_accuracy"} & metrics.compute().keys()


def test_intervals_are_the_percentiles_of_a_bootstrap_that_draws_groups():
    samples, verdicts = triples()
    found = summary(Judgements.of(samples, verdicts, SAFETY_FIELDS), resamples=2000, confidence=0.9)
    draw = random.Random(5)
    groups = sorted({s.group for s in samples})
    members = {g: [n for n, s in enumerate(samples) if s.group == g] for g in groups}
    accuracies, areas = [], []
    for _ in range(400):
        rows = [n for g in draw.choices(groups, k=len(groups)) for n in members[g]]
        true, said = (
            np.array(x) for x in of_field([samples[n] for n in rows], [verdicts[n] for n in rows], "response")
        )
        accuracies.append((true == said).mean())
        rated = [n for n in rows if "response" in samples[n].labels and "response" in verdicts[n].scores]
        label = np.array([samples[n].labels["response"] for n in rated])
        score = np.array([verdicts[n].scores["response"] for n in rated])
        ahead = score[label][:, None] - score[~label]
        areas.append(((ahead > 0) + (ahead == 0) / 2).mean())
    for name, values in (("response_accuracy", accuracies), ("response_auroc", areas)):
        low, high = np.quantile(values, [0.05, 0.95])
        assert found[name].low == pytest.approx(low, abs=0.012), name
        assert found[name].high == pytest.approx(high, abs=0.012), name


def test_samples_of_few_groups_have_wider_intervals_than_samples_by_themselves():
    truth = [n // 20 % 2 == 0 for n in range(200)]
    verdicts = [Verdict({"response": n // 20 < 5}) for n in range(200)]

    def width(group):
        samples = [
            SafetySample(str(n), "a", "b", labels={"response": label}, group=group(n)) for n, label in enumerate(truth)
        ]
        figure = summary(Judgements.of(samples, verdicts, ["response"]))["response_accuracy"]
        return figure.high - figure.low

    alone, grouped = width(lambda n: ""), width(lambda n: f"prompt {n // 20}")
    assert 3 * alone < grouped
    share = np.mean([label == v.labels["response"] for label, v in zip(truth, verdicts, strict=True)])
    assert alone == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 200), rel=0.15)  # binomial


def test_the_same_seed_draws_the_same_interval_and_another_seed_another():
    judgements = Judgements.of(*triples(), SAFETY_FIELDS)
    once, again, other = (summary(judgements, 50, seed=seed)["response_f1"] for seed in (0, 0, 1))
    assert once == again != other


def test_a_threshold_turns_scores_into_labels_and_leaves_other_fields():
    verdict = Verdict({"response": False, "image": True, "instruction": None}, {"response": 0.7, "image": 0.2})
    labels = decided(verdict, {"response": 0.7, "instruction": 0.5}).labels
    assert labels == {"response": True, "image": True, "instruction": None}
    assert decided(verdict, {"response": 0.71}).labels["response"] is False


@pytest.mark.parametrize("criterion", ["balanced_accuracy", "f1"])
@pytest.mark.parametrize("seed", range(4))
def test_the_chosen_threshold_is_as_good_as_the_best_of_a_fine_grid(criterion, seed):
    draw = random.Random(seed)
    labels = [draw.random() < 0.2 for _ in range(60)]
    scores = [min(max(round(draw.gauss(0.35 + 0.2 * label, 0.25), 2), 0), 1) for label in labels]

    def value(threshold):
        right = sum(score >= threshold for score, label in zip(scores, labels, strict=True) if label)
        wrong = sum(score >= threshold for score, label in zip(scores, labels, strict=True) if not label)
        if criterion == "f1":
            return 2 * right / (right + wrong + sum(labels))
        return (right / sum(labels) + 1 - wrong / (len(labels) - sum(labels))) / 2

    chosen = choose_threshold(torch.tensor(scores), torch.tensor(labels), criterion)
    assert 0 < chosen < 1
    assert value(chosen) == pytest.approx(max(value(k / 1000) for k in range(1, 1000)))


def test_a_threshold_lies_midway_and_nearest_to_one_half_among_equals():
    labels = torch.tensor([False, True, True, False])
    assert choose_threshold(torch.tensor([0.1, 0.5, 1.0, 0.2]), labels) == pytest.approx(0.35)
    assert choose_threshold(torch.tensor([0.5, 0.5, 0.5, 0.5]), labels) in (0.25, 0.75)
    assert choose_threshold(torch.tensor([0.0, 1.0, 1.0, 0.0]), labels) == 0.5


def test_thresholds_need_both_labels_and_a_known_criterion():
    scores = torch.tensor([0.1, 0.5])
    with pytest.raises(UserError, match="labels: expected harmful and benign samples"):
        choose_threshold(scores, torch.tensor([True, True]))
    with pytest.raises(UserError, match="criterion: expected one of balanced_accuracy, f1, got 'best'"):
        choose_threshold(scores, torch.tensor([True, False]), "best")


def test_kappa_is_that_of_a_published_example():
    # Ten subjects, fourteen raters, five labels; votes by subject, κ = 0.210 with P = 0.378 and P_e = 0.213.
    votes = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    ratings = torch.tensor([[label for label, times in enumerate(row) for _ in range(times)] for row in votes])
    found = fleiss_kappa(ratings)
    assert found.kappa == pytest.approx(0.210, abs=5e-4)
    assert found[1:] == (10, 14)


def test_kappa_equals_agreement_counted_pair_by_pair_over_the_items_that_all_rated():
    draw = random.Random(3)
    rows = [[draw.choice([0, 0, 1, 1, 1, -1]) for _ in range(3)] for _ in range(40)]
    whole = [row for row in rows if -1 not in row]
    agreed = np.mean([row[a] == row[b] for row in whole for a in range(3) for b in range(3) if a != b])
    share = np.mean(whole)
    chance = share**2 + (1 - share) ** 2
    found = fleiss_kappa(torch.tensor(rows))
    assert 0 < found.items == len(whole) < 40
    assert found.kappa == pytest.approx((agreed - chance) / (1 - chance))


def test_kappa_of_equal_raters_is_one_and_undefined_where_one_label_was_given():
    assert fleiss_kappa(torch.tensor([[0, 0], [1, 1]])).kappa == 1
    assert math.isnan(fleiss_kappa(torch.tensor([[1, 1], [1, 1]])).kappa)
    nobody = fleiss_kappa(torch.tensor([[-1, 1], [1, -1]]))
    assert math.isnan(nobody.kappa)
    assert nobody.items == 0
    with pytest.raises(UserError, match="ratings: expected two raters at least, got 1"):
        fleiss_kappa(torch.tensor([[1], [0]]))
