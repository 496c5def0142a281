"""Rules by neighbours against loops over all pairs."""

import pytest
import torch
from torch.nn.functional import kl_div

from leanlight.contracts import UserError
from lit_modules.selection import CAL, D2, EL2N, Features


def one_class(count=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = {
        "embedding": torch.rand(count, 3, generator=generator),
        "logits": 2 * torch.randn(count, 4, generator=generator),
        "train_error": torch.rand(count, 5, generator=generator),
    }
    return Features(torch.zeros(count, dtype=torch.int64), 1, values)


def pairs(data):
    """Distances of all pairs; an item is infinitely far from itself."""
    x = data["embedding"].double()
    distance = (x[:, None] - x[None]).norm(dim=2)
    return distance.fill_diagonal_(torch.inf)


def test_cal_keeps_those_predicted_unlike_their_neighbours():
    data = one_class()
    log, distance = data["logits"].double().log_softmax(1), pairs(data)
    score = []
    for item in range(30):
        near = distance[item].argsort()[:4]
        both = [
            kl_div(log[a], log[b], reduction="sum", log_target=True) / 2
            for other in near
            for a, b in ((item, other), (other, item))
        ]
        score.append(float(sum(both)) / 4)
    want = sorted(range(30), key=lambda item: -score[item])
    picks = CAL(neighbours=4).select(data, torch.tensor([30]), seed=0)
    assert picks.index.tolist() == want
    assert picks.score.tolist() == pytest.approx([score[item] for item in want], rel=1e-5)
    assert CAL(4, deepcore_compat=True).select(data, torch.tensor([30]), seed=0).index.tolist() == want[::-1]


@pytest.mark.parametrize("gamma", [0.1, 3.0])
def test_d2_takes_from_neighbours_what_it_gave_them(gamma):
    data = one_class()
    difficulty, distance = EL2N().score(data).tolist(), pairs(data)
    near = [distance[item].argsort()[:5].tolist() for item in range(30)]
    score = [
        difficulty[item] + sum(difficulty[j] * float((-distance[item, j]).exp()) for j in near[item])
        for item in range(30)
    ]
    chosen = []
    for _ in range(12):
        best = max((item for item in range(30) if item not in chosen), key=score.__getitem__)
        chosen.append(best)
        for j in near[best]:
            score[j] -= score[best] * float((-gamma * distance[best, j]).exp())
    assert D2(neighbours=5, gamma=gamma).select(data, torch.tensor([12]), seed=0).index.tolist() == chosen


def test_classes_smaller_than_a_neighbourhood_are_no_problem():
    for count in (1, 2, 5):
        assert len(CAL().select(one_class(count), torch.tensor([count]), seed=0)) == count
        assert len(D2().select(one_class(count), torch.tensor([count]), seed=0)) == count


@pytest.mark.parametrize("make", [lambda: CAL(0), lambda: D2(0), lambda: D2(gamma=0)])
def test_wrong_arguments_are_refused(make):
    with pytest.raises(UserError, match=r"(neighbours|gamma): expected"):
        make()
