"""Take a distilled set out of the suite: tensors for plain PyTorch, pictures for people, a folder for `datasets`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from leanlight.contracts import atomic_path, atomic_write
from lit_modules.at_bptt.inner import SyntheticData
from lit_modules.at_bptt.pictures import drawable
from lit_modules.at_bptt.preprocessing import Preprocessing


def export_set(
    data: SyntheticData, preprocessing: Preprocessing, details: Mapping[str, Any], directory: Path
) -> list[Path]:
    """Write the set into `directory` and return the files.

    ``distilled.safetensors``: images (n, C, H, W), labels (n, K), and what brings real images into the same space:
    whitening (D, D), or mean and std (C, 1, 1). ``card.json``: classes, recipe, scores, and how to use it.
    ``images.png``: all images. ``dataset/``: one 8-bit PNG an image and ``metadata.jsonl``; `datasets` loads the
    folder.

    Args:
        data: the set.
        preprocessing: the space in which it lives.
        details: what else stands in the card; ``classes`` and ``ipc`` among it.
        directory: an existing folder.
    """
    from safetensors.torch import save_file

    tensors = {"images": data.images, "labels": data.labels, **preprocessing.tensors()}
    weights, card = directory / "distilled.safetensors", directory / "card.json"
    with atomic_path(weights) as part:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, part)
    content = {
        "images": list(data.images.shape),
        "preprocess": preprocessing.kind,
        "use": "train on `images` and `labels`; bring test images into the same space first: zca: subtract each "
        "image's mean, divide by its norm, flatten, multiply by `whitening`; standardize: (image - mean) / std",
        **details,
    }
    atomic_write(card, json.dumps(content, indent=2) + "\n")
    pixels = (drawable(data.images, preprocessing.whitening) * 255).round().byte().numpy()
    folder = _write_folder(pixels, data.labels.detach().cpu(), details["classes"], directory / "dataset")
    return [weights, card, _write_grid(pixels, details["ipc"], directory / "images.png"), *folder]


def _picture(pixels: np.ndarray) -> Image.Image:
    """(C, H, W) uint8 → picture."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _write_grid(pixels: np.ndarray, ipc: int, path: Path) -> Path:
    """One class a row, with a border of 1 pixel."""
    n, c, h, w = pixels.shape
    padded = np.pad(pixels, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=255)
    cells = padded.reshape(n // ipc, ipc, c, h + 1, w + 1)
    grid = cells.transpose(2, 0, 3, 1, 4).reshape(c, n // ipc * (h + 1), ipc * (w + 1))
    with atomic_path(path) as part:
        _picture(grid).save(part, format="PNG")
    return path


def _write_folder(pixels: np.ndarray, labels: Tensor, classes: list[str], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths, lines = [], []
    for number, (image, soft) in enumerate(zip(pixels, labels, strict=True)):
        path = folder / f"{number:05d}.png"
        _picture(image).save(path)
        paths.append(path)
        hard = int(soft.argmax())
        lines.append({"file_name": path.name, "label": hard, "class": classes[hard], "soft_label": soft.tolist()})
    table = folder / "metadata.jsonl"
    atomic_write(table, "".join(json.dumps(line) + "\n" for line in lines))
    return [*paths, table]
