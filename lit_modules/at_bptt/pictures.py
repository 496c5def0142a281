"""Pictures of a distillation: the images, where the windows lie, how training on the set goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leanlight.contracts import Curve, Heatmap, ImageGrid, MediaItem
from lit_modules.history import History

_IMAGES_A_CLASS, _CLASSES, _LABEL_ROWS = 10, 20, 50  # what a picture shows at most


def drawable(images: Tensor, whitening: Tensor) -> Tensor:
    """Images of preprocessed space as pictures in [0, 1] on the CPU, each between its own 1st and 99th percentile.

    images: (N, C, H, W), returned with 1 or 3 channels. whitening: (D, D) to undo, or empty.
    """
    images = images.detach().float().cpu()
    if whitening.numel():
        images = torch.linalg.solve(whitening.detach().float().cpu(), images.flatten(1).T).T.reshape(images.shape)
    flat = images.flatten(1)
    low, high = (flat.quantile(q, dim=1).view(-1, 1, 1, 1) for q in (0.01, 0.99))
    images = ((images - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)
    return images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)


def image_grid(images: Tensor, whitening: Tensor, ipc: int) -> ImageGrid:
    """The first images of the first classes, a class a row. images: (K * ipc, C, H, W); whitening: as in `drawable`."""
    shown = min(ipc, _IMAGES_A_CLASS)
    rows = images.detach().unflatten(0, (-1, ipc))[:_CLASSES, :shown].flatten(0, 1)
    return ImageGrid(drawable(rows, whitening), columns=shown)


def label_map(labels: Tensor, classes: Sequence[str]) -> Heatmap:
    """Learned labels (n, K) of the first images."""
    columns = classes if labels.shape[1] <= _CLASSES else ()
    return Heatmap(labels.detach().cpu()[:_LABEL_ROWS], "class", "image", columns=columns)


def curves(history: History) -> dict[str, MediaItem]:
    """Over outer steps: the window, its stage, the entropy of P(t), the accuracy on validation data."""
    ends = [start + length for start, length in zip(history["window_start"], history["window_length"], strict=True)]
    shown = History()
    # Not every epoch has a probe, and so an entropy.
    shown.values = {**history.values, "window_end": ends, "probe": list(range(len(history["entropy"])))}
    drawn = {
        "window": shown.curve("outer_step", {"start": "window_start", "end": "window_end"}, "outer step", "inner step"),
        "stage": shown.curve("outer_step", {"stage": "stage"}, "outer step", "0 early, 1 middle, 2 late"),
        "entropy": shown.curve("probe", {"of P(t), over log T": "entropy"}, "probe", "relative entropy"),
        "accuracy": shown.curve("val_outer_step", {"validation": "val_accuracy"}, "outer step", "accuracy"),
    }
    return {name: curve for name, curve in drawn.items() if curve is not None}


def gradient_norm_curve(norms: Tensor) -> Curve:
    """Inner gradient norms n_t (T,) of an epoch's probe."""
    series = {"this epoch's probe": norms.tolist()}
    return Curve(range(1, len(norms) + 1), series, "inner step", "gradient norm")
