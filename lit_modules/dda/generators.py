"""The generator that inversion searches through: latents become images by two doublings of their size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError, to_device
from leanlight.contracts.ranges import PositiveInt
from lit_modules.nn.checks import require_positive

_STD = 0.02  # of fresh weights


def check_sides(shape: Sequence[int]) -> None:
    """Raise UserError where a generator cannot make images of `shape` (C, H, W)."""
    if any(side % 4 for side in shape[1:]):
        sides = "x".join(map(str, shape[1:]))
        raise UserError(
            f"image_size: expected sides divisible by 4 for a generator that doubles them twice, got {sides}; "
            "image_size of the data resizes images, and PixelInversion has no generator"
        )


class Generator(nn.Module):
    """Linear → norm → [double → conv 3x3 → norm → leaky ReLU] twice → conv 3x3 → sigmoid, with batch norm throughout.

    (N, Z) standard normal → (N, C, H, W) in (0, 1). Source: the benchmarks of data-free distillation (DAFL, CMI, CSD).

    Args:
        shape: (C, H, W) of an image; sides divisible by 4.
        latent_size: Z, numbers of a latent; 256 (512 in DAFL).
        width: channels before the last convolution (``ngf``), 64.
        base: channels of the first maps in multiples of `width`: 2; 4 in the large generator of DAFL, ZSKT and DFQ.
        channels_last: keep maps and weights in that memory format, which convolutions prefer.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent_size: PositiveInt = 256,
        width: PositiveInt = 64,
        base: PositiveInt = 2,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        require_positive(latent_size=latent_size, width=width, base=base)
        channels, height, breadth = shape
        check_sides(shape)
        self.base_shape = (base * width, height // 4, breadth // 4)
        self.project = nn.Linear(latent_size, base * width * (height // 4) * (breadth // 4))
        self.maps = nn.Sequential(
            nn.BatchNorm2d(base * width),
            *_doubling(base * width, 2 * width),
            *_doubling(2 * width, width),
            nn.Conv2d(width, channels, 3, padding=1),
        )
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.maps.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    @classmethod
    def fresh(
        cls, shape: Sequence[int], generator: torch.Generator, device: torch.device | str = "cpu", **settings: Any
    ) -> Generator:
        """One whose weights come from `generator` alone: the random states of the process stay as they are.

        Args:
            shape: (C, H, W) of an image.
            generator: see `reset`.
            device: of the weights.
            settings: the other arguments of the class.
        """
        with torch.device("meta"):
            made = cls(shape, **settings)
        return made.to_empty(device=device).reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> Generator:
        """Begin anew: weights from N(0, 0.02²), of norms from N(1, 0.02²); biases 0; no running statistics.

        Args:
            generator: of all that is drawn; with one of the CPU the weights are the same on every device.
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
                centre = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
                drawn = torch.randn(module.weight.shape, generator=generator, device=generator.device)
                module.weight.copy_(to_device(drawn, module.weight.device) * _STD + centre)
                if module.bias is not None:
                    module.bias.zero_()
        return self

    def forward(self, latent: Tensor) -> Tensor:
        maps = self.project(latent).view(-1, *self.base_shape).contiguous(memory_format=self.memory_format)
        return self.maps(maps).float().sigmoid()  # in half precision neighbouring grey values would be one


class DoublingConv2d(nn.Conv2d):
    """Repeat each pixel in both directions, then convolve 3x3: as one layer, with 4/9 of the multiplications.

    Of three taps in a row two fall on copies of the same pixel. So each of a pixel's four copies has a kernel of 2x2
    whose taps are sums of those of the 3x3; equal up to rounding.

    Args:
        before: channels of the input.
        after: channels of the output.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded, rows = F.pad(x, (1, 1, 1, 1)), []
        for top, kernels in enumerate(_summed(self.weight, 2)):
            copies = [
                F.conv2d(padded[:, :, top : top + height + 1, left : left + width + 1], kernel).movedim(1, -1)
                for left, kernel in enumerate(_summed(kernels, 3))
            ]
            rows.append(torch.stack(copies, 3))
        doubled = torch.stack(rows, 2).flatten(3, 4).flatten(1, 2).movedim(-1, 1)  # in memory, channels are last
        return doubled.contiguous() if x.is_contiguous() else doubled


def _summed(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Kernels of two taps along `dim` for the first and the second copy of a pixel, from those of three."""
    before, here, after = weight.unbind(dim)
    return torch.stack([before, here + after], dim), torch.stack([before + here, after], dim)


def _doubling(before: int, after: int) -> list[nn.Module]:
    return [DoublingConv2d(before, after), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
