"""Names and losses of a metric under noise."""

import pytest

from leanlight.contracts import UnderNoise


def test_values_losses_and_curve_of_an_accuracy():
    result = UnderNoise(0.8, {"gaussian": {1.0: 0.7, 3.0: 0.5}, "shot": {1.0: 0.6, 3.0: 0.2}})
    assert result.values() == {"gaussian_1": 0.7, "gaussian_3": 0.5, "shot_1": 0.6, "shot_3": 0.2}
    assert result.mean == pytest.approx(0.5)
    assert result.losses() == {"drop": pytest.approx(0.3), "retention": pytest.approx(0.625)}
    curve = result.curve("severity", "accuracy")
    assert curve.x == [0, 1, 3]
    assert curve.series == {"gaussian": [0.8, 0.7, 0.5], "shot": [0.8, 0.6, 0.2]}


def test_an_error_that_grows_is_a_positive_drop_too():
    result = UnderNoise(0.02, {"flip": {0.05: 0.04, 0.3: 0.06}}, higher_is_better=False)
    assert result.values("mse_") == {"mse_flip_0.05": 0.04, "mse_flip_0.3": 0.06}
    assert result.losses() == {"drop": pytest.approx(0.03), "retention": pytest.approx(0.4)}


@pytest.mark.parametrize(("clean", "noisy"), [(0.0, 0.0), (-1.0, -2.0), (1.0, -0.5)])
def test_a_score_that_may_be_negative_has_a_retention_only_where_the_ratio_says_something(clean, noisy):
    assert UnderNoise(clean, {"gaussian": {0.1: noisy}}).losses() == {"drop": pytest.approx(clean - noisy)}
