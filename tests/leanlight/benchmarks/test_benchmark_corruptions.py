"""The reference that noise is timed against makes the same noise."""

import numpy as np
import pytest
import torch

from leanlight.benchmarks.corruptions import noise_speed, per_image
from leanlight.ops.corruptions import NOISES, Corruption


@pytest.mark.parametrize("name", NOISES)
def test_the_reference_has_the_moments_of_ours(name):
    for level in (40, 128, 230):
        pixels, reference = np.full((32, 32, 3), level, np.uint8), per_image(name, 3)
        its = torch.from_numpy(np.stack([reference(pixels) for _ in range(40)])).double()
        ours = Corruption(name, 3)(torch.full((40, 3, 32, 32), level / 255), torch.arange(40))
        ours = (ours.double() * 255 + 1e-4).floor()
        for f in (lambda x: x, lambda x: (x - 128) ** 2, lambda x: (x == 255).double()):
            error = ((f(ours).var() + f(its).var()) / its.numel()).sqrt()
            assert (f(ours).mean() - f(its).mean()).abs() <= 5 * error + 1e-6


def test_every_noise_is_timed_and_the_number_of_threads_is_put_back():
    threads = torch.get_num_threads()
    measured = noise_speed(rounds=2)
    assert torch.get_num_threads() == threads
    for name in NOISES:
        speed = {kind: measured.figures[f"noise/{name}_{kind}"].value for kind in ("batch", "per_image")}
        ratio = measured.figures[f"noise/{name}_times_per_image"]
        assert ratio.n == 2
        assert ratio.low * 0.5 < speed["batch"] / speed["per_image"] < ratio.high * 2
    assert {target.figure for target in measured.targets} <= measured.figures.keys()
