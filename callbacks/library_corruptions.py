"""The corruptions of ImageNet-C that are no plain noise, by the library `imagecorruptions`, image by image."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanlight.contracts import MissingExtraError, isolated_rng
from leanlight.contracts.rng import derived_seed

LIBRARY_CORRUPTIONS = (
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "gaussian_blur",
    "snow",
    "frost",
    "fog",
    "spatter",
    "brightness",
    "contrast",
    "saturate",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SMALLEST = 32  # pixels a side; the library takes no smaller image


@dataclass(frozen=True)
class LibraryCorruption:
    """One corruption at one severity, with the library's one set of levels, which is ImageNet-C's.

    Images pass through 8 bits, as in the library; a grey one becomes coloured, and what comes out the mean of its
    channels. Raises MissingExtraError without the library.

    Args:
        name: one of `LIBRARY_CORRUPTIONS`.
        severity: 1 to 5.
        seed: of everything random in it.
    """

    name: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        if find_spec("imagecorruptions") is None:
            raise MissingExtraError("imagecorruptions-imaug", "robustness")

    def __call__(self, image: Tensor, index: Tensor) -> Tensor:
        """As `leanlight.ops.corruptions.Corruption`: an item's result depends on its number alone, not on the batch.

        Args:
            image: (N, C, H, W) in [0, 1], C 1 or 3, at least 32 pixels a side.
            index: (N,) int64 number of each item.
        """
        pixels = image.detach().float().mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        corrupted = np.stack([self._one(*item) for item in zip(pixels, index.tolist(), strict=True)])
        result = torch.from_numpy(corrupted).permute(0, 3, 1, 2).to(image.device, torch.float32).div_(255)
        return (result.mean(1, keepdim=True) if image.shape[1] == 1 else result).to(image.dtype)

    def _one(self, pixels: np.ndarray, item: int) -> np.ndarray:
        from imagecorruptions import corrupt

        seed = derived_seed(self.seed, self.name, self.severity, item)
        # Glass blur runs compiled code, which has a generator of its own.
        extra: dict[str, Any] = {"seed": seed % 2**32} if self.name == "glass_blur" else {}
        with isolated_rng(seed):
            return corrupt(pixels, severity=self.severity, corruption_name=self.name, **extra)
