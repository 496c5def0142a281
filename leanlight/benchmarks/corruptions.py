"""Speed of noise on batches of images, beside one image at a time as libraries of ImageNet-C's noises make it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from leanlight.benchmarks.core import Measurement, Target, interleave, one_thread, ratios, summarise
from leanlight.ops.corruptions import LEVELS, NOISES, Corruption

_ITEMS = 256
_SEVERITY = 3


@one_thread()
def noise_speed(rounds: int) -> Measurement:
    """Images of 32 x 32 x 3 a second on one thread, of each noise, and how many times the reference's that is."""
    measured = Measurement(settings={"noise_images": _ITEMS, "noise_severity": _SEVERITY, "noise_threads": 1})
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (_ITEMS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    image, index = pixels.float() / 255, torch.arange(_ITEMS)
    single = pixels.permute(0, 2, 3, 1).numpy()
    for name in NOISES:
        ours, reference = Corruption(name, _SEVERITY), per_image(name, _SEVERITY)

        def batch(corrupt: Corruption = ours) -> None:
            corrupt(image, index)

        def one_by_one(corrupt: Callable[[np.ndarray], np.ndarray] = reference) -> None:
            for item in single:
                corrupt(item)

        seconds = interleave({"batch": batch, "per_image": one_by_one}, rounds, warmup=1)
        for kind, values in seconds.items():
            speed = [_ITEMS / second for second in values]
            measured.figures[f"noise/{name}_{kind}"] = summarise(speed, "images/s", "higher")
        times = ratios(seconds["per_image"], seconds["batch"])
        measured.figures[f"noise/{name}_times_per_image"] = summarise(times, "x", "higher")
        text = f"{name} noise on a batch is at least twice as fast as image by image"
        measured.targets.append(Target(f"noise/{name}_times_per_image", 2.0, text))
    return measured


def per_image(name: str, severity: int) -> Callable[[np.ndarray], np.ndarray]:
    """Noise on one image (H, W, C) of 8 bits, by the published definitions in numpy, at the levels of CIFAR-C.

    As the libraries do, it takes a PIL image and draws from the random state that numpy keeps for reproducible code,
    salt and pepper (scikit-image's) from a new generator.
    """
    level, state, rng = LEVELS["cifar_c"][name][severity - 1], np.random.RandomState(0), np.random.default_rng(0)

    def noise(x: np.ndarray) -> np.ndarray:
        if name == "gaussian":
            return x + state.normal(scale=level, size=x.shape)
        if name == "shot":
            return state.poisson(x * level) / level
        if name == "speckle":
            return x + x * state.normal(scale=level, size=x.shape)
        hit, salt = rng.random(x.shape) <= level, rng.random(x.shape) <= 0.5
        return np.where(hit, salt, x)

    def corrupt(pixels: np.ndarray) -> np.ndarray:
        return (np.clip(noise(np.array(Image.fromarray(pixels)) / 255.0), 0, 1) * 255).astype(np.uint8)

    return corrupt
