"""Which clips lose a modality, and what is left of them."""

import pytest
import torch

from leanlight.contracts import MultimodalBatch
from lit_modules.tical.missing import lose


def make(n=400, first=0):
    features = {"text": torch.ones(n, 3), "audio": torch.ones(n, 5, 2)}
    present = {name: torch.ones(n, dtype=torch.bool) for name in features}
    length = {"audio": torch.full((n,), 5)}
    label = torch.zeros(n, dtype=torch.int64)
    return MultimodalBatch(features, length, present, label, None, {}, None, torch.arange(first, first + n))


def test_about_the_share_of_the_clips_loses_the_modality_that_is_named():
    lost = lose(make(4000), {"audio": 0.3}, 1, 7)
    assert 1 - lost.present["audio"].float().mean() == pytest.approx(0.3, abs=0.03)
    assert lost.present["text"].all()
    gone = ~lost.present["audio"]
    assert not lost.features["audio"][gone].any()
    assert not lost.length["audio"][gone].any()
    assert lost.features["audio"][~gone].all()
    assert (lost.length["audio"][~gone] == 5).all()


def test_a_clip_loses_the_same_whatever_its_neighbours_are():
    whole = lose(make(), {"audio": 0.5, "text": 0.2}, 1, "val")
    some = torch.tensor([399, 5, 17])
    part = lose(make().select(some), {"audio": 0.5, "text": 0.2}, 1, "val")
    for name in ("audio", "text"):
        assert torch.equal(part.present[name], whole.present[name][some])


def test_another_moment_or_seed_takes_from_other_clips():
    first = lose(make(), {"audio": 0.5}, 1, 3).present["audio"]
    assert not torch.equal(first, lose(make(), {"audio": 0.5}, 1, 4).present["audio"])
    assert not torch.equal(first, lose(make(), {"audio": 0.5}, 2, 3).present["audio"])


def test_a_clip_keeps_one_modality_that_it_has():
    batch = make()
    batch.present["text"][::2] = False
    lost = lose(batch, {"audio": 0.99, "text": 0.99}, 1, 3)
    kept = lost.present["audio"].long() + lost.present["text"].long()
    assert (kept >= 1).all()
    assert lost.present["audio"][::2].all()
    assert not lost.present["text"][::2].any()


def test_with_shares_of_0_nothing_changes():
    batch = make()
    same = lose(batch, {"audio": 0.0}, 1, 3)
    assert all(torch.equal(same.features[name], batch.features[name]) for name in batch.features)
    assert all(same.present[name].all() for name in batch.present)
