"""Pictures of judges: what is in them, against another library's figures."""

import math

import pytest
import torch
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from lit_modules.falcon_eye import pictures


def test_calibration_is_the_share_of_harm_by_range_of_scores_with_wilsons_intervals():
    generator = torch.Generator().manual_seed(5)
    score = torch.rand(300, 2, generator=generator, dtype=torch.float64) ** 2
    label = (torch.rand(300, 2, generator=generator) < score).long()
    score[0, 0], label[1, 0], score[2, 0] = math.nan, -1, 1.0
    drawn = pictures.calibration(score, label, ("image", "response"))
    assert list(drawn) == ["calibration_image", "calibration_response"]
    for k, curve in enumerate(drawn.values()):
        known = ~score[:, k].isnan() & (label[:, k] >= 0)
        said, true = score[known, k], label[known, k]
        share, mean = calibration_curve(true, said, n_bins=10)
        assert curve.series["measured"] == pytest.approx(share)
        assert curve.x == curve.series["calibrated"] == pytest.approx(mean)
        place = (said * 10).long().clamp(max=9)
        counts = [int((place == n).sum()) for n in range(10)]
        harmful = [int(true[place == n].sum()) for n in range(10)]
        intervals = [binomtest(h, n).proportion_ci(0.95, "wilson") for h, n in zip(harmful, counts, strict=True)]
        low, high = curve.bands["measured"]
        assert low == pytest.approx([interval.low for interval in intervals], abs=1e-4)
        assert high == pytest.approx([interval.high for interval in intervals], abs=1e-4)
        error = sum(n * abs(a - b) for n, a, b in zip(counts, share, mean, strict=True)) / sum(counts)
        assert curve.ylabel.endswith(f"(calibration error {error:.3f})")


def test_calibration_leaves_out_fields_without_scores_and_ranges_without_samples():
    score = torch.tensor([[0.25, math.nan], [0.2, math.nan], [0.95, 0.5]])
    label = torch.tensor([[0, 1], [1, 0], [1, -1]])
    (curve,) = pictures.calibration(score, label, ("image", "response")).values()
    assert curve.series["measured"] == [0.5, 1.0]
    assert curve.x == pytest.approx([0.225, 0.95])
