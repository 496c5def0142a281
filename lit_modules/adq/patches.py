"""Leave out the patches of an image that say least, and fill them in again from those that are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError, derived_seed, isolated_rng
from leanlight.contracts.ranges import PositiveInt, Share
from lit_modules.nn.features import has_features

_CHUNK = 256  # images at once


@dataclass(frozen=True)
class PatchDrop:
    """What is left out of pictures, and how it is filled in again.

    Args:
        drop_ratio: share of the patches left out θ, in [0, 1).
        patch: side of a patch, pixels.
        patch_select: keep the patches of the largest `salience`, ``gradcam``, or ``random`` ones.
        reconstructor: ``mean_fill`` paints the mean of what is kept; ``tiny_mae`` what an autoencoder makes of it that
            is trained on the whole training part; ``none`` leaves pictures whole, so that θ counts as storage alone.
        steps: of that training.
    """

    drop_ratio: Share = 0.2
    patch: PositiveInt = 4
    patch_select: Literal["gradcam", "random"] = "gradcam"
    reconstructor: Literal["none", "mean_fill", "tiny_mae"] = "mean_fill"
    steps: PositiveInt = 600

    def __post_init__(self) -> None:
        if not 0 <= self.drop_ratio < 1:
            raise UserError(f"drop_ratio: expected a share in [0, 1), got {self.drop_ratio}")
        if self.steps < 1:
            raise UserError(f"steps: expected at least 1, got {self.steps}")

    @property
    def changes_pictures(self) -> bool:
        """Whether anything is left out of the pictures themselves."""
        return self.reconstructor != "none" and self.drop_ratio > 0

    def rebuild(
        self,
        image: Tensor,
        network: nn.Module | None,
        train: Tensor,
        seed: int,
        advance: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """(N, C, H, W) uint8 images without the patches that are left out, and with their filling.

        Args:
            image: (N, C, H, W) uint8.
            network: for ``gradcam``, see `salience`.
            train: (M, C, H, W) uint8 images that an autoencoder learns from.
            seed: of random patches and the autoencoder.
            advance: told of the steps of its training.
        """
        if not self.changes_pictures:
            return image
        scaled, chooser = image.float() / 255, network if self.patch_select == "gradcam" else None
        value = patch_values(scaled, self.patch, chooser, torch.Generator().manual_seed(derived_seed(seed, "patches")))
        kept = kept_patches(value, self.drop_ratio)
        if self.reconstructor == "mean_fill":
            return paste(image, mean_filling(scaled, kept, self.patch), kept, self.patch)
        mae = train_mae(train, self.patch, self.drop_ratio, derived_seed(seed, "mae"), self.steps, advance=advance)
        return paste(image, mae_filling(mae, scaled, kept, self.patch), kept, self.patch)


def patch_grid(image: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Args:
        image: (N, C, H, W).
        patch: side of a patch, pixels.

    Raises:
        UserError: sides that are no multiples of it.
    """
    height, width = image.shape[2:]
    if patch < 1 or height % patch or width % patch:
        raise UserError(f"patch: expected a side that divides {height} x {width} pixels, got {patch}")
    return height // patch, width // patch


def salience(network: nn.Module, image: Tensor) -> Tensor:
    """(N, H', W') Grad-CAM++ maps of the class the network predicts (Chattopadhay et al. 2018), in [0, 1].

    Args:
        network: in evaluation mode, with timm's ``forward_features`` to maps (N, K, H', W') and ``forward_head``.
        image: (N, C, H, W) as the network takes it.

    Raises:
        UserError: a network without feature maps.
    """
    maps = network.forward_features(image) if has_features(network) else image[0, 0]  # type: ignore[operator]
    if maps.ndim != 4:
        raise UserError(
            f"network: Grad-CAM++ needs feature maps of forward_features, a {type(network).__name__} has none"
        )
    with torch.enable_grad():
        maps = maps.detach().requires_grad_()
        logits = network.forward_head(maps)  # type: ignore[operator]
        (slope,) = torch.autograd.grad(logits.amax(1).sum(), maps)
    maps = maps.detach()
    below = 2 * slope.square() + maps.sum((2, 3), keepdim=True) * slope**3
    part = slope.square() / torch.where(below.abs() > 1e-12, below, 1.0)
    weight = (part * slope.relu()).sum((2, 3), keepdim=True)
    found = (weight * maps).sum(1).relu()
    low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
    return (found - low) / (high - low).clamp_min(1e-12)


def kept_patches(value: Tensor, drop: float) -> Tensor:
    """(N, P) bool: of each image the floor(P (1 - θ)) patches of the largest value; of equals the first.

    Args:
        value: (N, P) what patches are worth.
        drop: share of patches to leave out θ, in [0, 1).
    """
    count = math.floor(value.shape[1] * (1 - drop) + 1e-9)
    if count < 1:
        raise UserError(f"drop_ratio: {drop} of {value.shape[1]} patches keeps none")
    best = value.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(value, dtype=torch.bool).scatter(1, best, True)


def patch_values(image: Tensor, patch: int, network: nn.Module | None, generator: torch.Generator) -> Tensor:
    """(N, P) what the patches of images are worth: `salience` at each patch, or random numbers without a network.

    Args:
        image: (N, C, H, W) as the network takes it.
        patch: side of a patch, pixels.
        network: see `salience`.
        generator: of the random numbers.
    """
    grid = patch_grid(image, patch)
    if network is None:
        return torch.rand(len(image), grid[0] * grid[1], generator=generator)
    found = [salience(network, part) for part in image.split(_CHUNK)]
    return F.interpolate(torch.cat(found)[:, None], grid, mode="bilinear", align_corners=False).flatten(1)


def to_patches(image: Tensor, patch: int) -> Tensor:
    """(N, P, C * patch * patch) pixels of each patch, row by row. image: (N, C, H, W)."""
    return F.unfold(image, patch, stride=patch).transpose(1, 2)


def to_image(patches: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """(N, C, H, W) of `to_patches`. size: H and W."""
    return F.fold(patches.transpose(1, 2), size, patch, stride=patch)


def paste(image: Tensor, filling: Tensor, kept: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) uint8: kept patches bit by bit as they are, the others from the filling, clamped and rounded.

    Args:
        image: (N, C, H, W) uint8.
        filling: (N, C, H, W) float, meant to lie in [0, 1].
        kept: (N, P) bool.
        patch: side of a patch, pixels.
    """
    rows, columns = patch_grid(image, patch)
    shown = kept.view(-1, 1, rows, columns).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return torch.where(shown, image, (filling * 255).round().clamp(0, 255).to(torch.uint8))


def mean_filling(image: Tensor, kept: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) images of one colour each, the mean of what is kept.

    Args:
        image: (N, C, H, W) float.
        kept: (N, P) bool.
        patch: side of a patch, pixels.
    """
    per_patch = F.avg_pool2d(image, patch).flatten(2)
    mean = (per_patch * kept[:, None]).sum(2) / kept.sum(1, keepdim=True)
    return mean[:, :, None, None].expand_as(image)


class TinyMAE(nn.Module):
    """A small masked autoencoder (He et al. 2022): kept patches are encoded, all are decoded.

    Args:
        patches: of an image P.
        pixels: numbers of a patch.
        width: of the tokens.
        encoder: layers of the encoder.
        decoder: layers of the decoder.
    """

    def __init__(self, patches: int, pixels: int, width: int = 64, encoder: int = 2, decoder: int = 1) -> None:
        super().__init__()
        self.embed, self.predict = nn.Linear(pixels, width), nn.Linear(width, pixels)
        self.place, self.mask = nn.Parameter(torch.randn(2, patches, width) * 0.02), nn.Parameter(torch.zeros(width))
        self.encoder, self.decoder = (
            nn.Sequential(
                *(
                    nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                    for _ in range(layers)
                ),
                nn.LayerNorm(width),
            )
            for layers in (encoder, decoder)
        )

    def forward(self, patches: Tensor, kept: Tensor) -> Tensor:
        """(N, P, pixels) of all patches. patches: (N, P, pixels). kept: (N, P) bool, as many in each image."""
        n, count = kept.shape
        index = kept.nonzero()[:, 1].view(n, -1, 1)
        tokens = self.embed(patches) + self.place[0]
        seen = self.encoder(tokens.gather(1, index.expand(-1, -1, tokens.shape[2])))
        whole = self.mask.expand(n, count, -1).scatter(1, index.expand_as(seen), seen)
        return self.predict(self.decoder(whole + self.place[1]))


def train_mae(
    image: Tensor,
    patch: int,
    drop: float,
    seed: int,
    steps: int = 600,
    batch_size: int = 64,
    lr: float = 2e-3,
    advance: Callable[[int], None] = lambda done: None,
) -> TinyMAE:
    """A masked autoencoder trained on these images to fill in random patches; all random states are left as they were.

    Args:
        image: (N, C, H, W) uint8.
        patch: side of a patch, pixels.
        drop: share of patches left out.
        seed: of weights, batches and masks.
        steps: updates by AdamW, with a cosine schedule.
        batch_size: images a step.
        lr: peak learning rate.
        advance: told of steps.
    """
    rows, columns = patch_grid(image, patch)
    with isolated_rng(seed):
        network = TinyMAE(rows * columns, image.shape[1] * patch**2)
        optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
        for _ in range(steps):
            items = torch.randint(len(image), (min(batch_size, len(image)),))
            pixels = to_patches(image[items].float() / 255, patch)
            kept = kept_patches(torch.rand(pixels.shape[:2]), drop)
            loss = F.mse_loss(network(pixels, kept)[~kept], pixels[~kept])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1)
    return network.eval()


@torch.no_grad()
def mae_filling(network: TinyMAE, image: Tensor, kept: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) what the autoencoder makes of the kept patches.

    Args:
        network: from `train_mae`.
        image: (N, C, H, W) float in [0, 1].
        kept: (N, P) bool, as many in each image.
        patch: side of a patch, pixels.
    """
    size = (image.shape[2], image.shape[3])
    parts = zip(image.split(_CHUNK), kept.split(_CHUNK), strict=True)
    return torch.cat([to_image(network(to_patches(part, patch), own), size, patch) for part, own in parts])
