"""Pictures of a classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from leanlight.contracts import Bars, Heatmap, ImageGrid, MediaItem

SHOWN = 40  # images in a grid


def batch(images: Tensor) -> ImageGrid:
    """Images (N, C, H, W) as the network sees them."""
    return ImageGrid(drawable(images))


def confusion(matrix: Tensor, accuracy: Tensor, classes: Sequence[str]) -> dict[str, MediaItem]:
    """The confusion matrix and the accuracy of every class that has items.

    Args:
        matrix: (K, K) counts, true classes in rows.
        accuracy: (K,), nan for a class without items.
        classes: names of the K classes.
    """
    values = {name: value for name, value in zip(classes, accuracy.tolist(), strict=True) if value == value}
    return {
        "confusion": Heatmap(matrix, "predicted", "true", rows=classes, columns=classes),
        "class_accuracy": Bars(values, "accuracy"),
    }


def mistakes(kept: Sequence[Tensor], classes: Sequence[str]) -> ImageGrid:
    """Wrong answers with what was said and how surely. kept: see `ConfidentMistakes`."""
    confidence, image, predicted, label = (part.cpu() for part in kept)
    wrong = confidence >= 0
    captions = [
        f"{classes[true]} → {classes[guess]} {share:.0%}"
        for true, guess, share in zip(label[wrong], predicted[wrong], confidence[wrong].tolist(), strict=True)
    ]
    return ImageGrid(drawable(image[wrong]), columns=8, captions=captions)


def first_filters(network: nn.Module) -> dict[str, MediaItem]:
    """Weights of the first convolution, each filter stretched to [0, 1]; nothing for networks that do not convolve."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
            return {"filters": ImageGrid(drawable((weight - low) / (high - low).clamp(min=1e-12)), columns=8)}
    return {}


def drawable(image: Tensor) -> Tensor:
    """Clamp to [0, 1] and reduce to 1 or 3 channels, on the CPU."""
    image = image.detach().float().clamp(0, 1).cpu()
    return image if image.shape[1] in (1, 3) else image.mean(1, keepdim=True)
