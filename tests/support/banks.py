"""Banks written by hand, from the words of their contract alone."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

COLUMNS = ["item", "source", "k", "seed", "score", "kept", "label", "teacher_label"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(folder: Path, images: np.ndarray, rows: list[list], classes: list[str], **more) -> Path:
    """A bank of uint8 images (M, C, H, W) and as many rows of a manifest."""
    folder.mkdir(parents=True)
    save_file({"images": images}, folder / "bank.safetensors")
    with open(folder / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    record = {
        "items": len(images),
        "shape": list(images.shape[1:]),
        "classes": classes,
        "teacher": None,
        "images_sha256": digest(folder / "bank.safetensors"),
        "manifest_sha256": digest(folder / "manifest.csv"),
    }
    (folder / "bank.json").write_text(json.dumps(record | more))
    return folder


def originals(folder: Path, items: int = 20, shape: tuple = (1, 8, 8), classes: int = 10) -> Path:
    """Item i is of class i modulo the classes, and all its pixels have level i."""
    images = np.repeat(np.arange(items, dtype=np.uint8), int(np.prod(shape))).reshape(items, *shape)
    rows = [[i, i, 0, -1, 1.0, 1, i % classes, i % classes] for i in range(items)]
    return write(folder, images, rows, [str(label) for label in range(classes)])


def variations(folder: Path, of: Path, each: int = 2, classes: int = 10) -> Path:
    """Variation k of item i has level 100 + i + 50 (k - 1), score 1 - i / 100 - (k - 1) / 10, and is kept for k = 1.

    The teacher takes those of every third item for the class after its own.
    """
    record = json.loads((of / "bank.json").read_text())
    pairs = [(i, k) for i in range(record["items"]) for k in range(1, each + 1)]
    levels = np.array([100 + i + 50 * (k - 1) for i, k in pairs], np.uint8)
    shape = record["shape"]
    rows = [
        [n, i, k, 1000 + n, 1 - i / 100 - (k - 1) / 10, int(k == 1), i % classes, (i + (i % 3 == 0)) % classes]
        for n, (i, k) in enumerate(pairs)
    ]
    images = np.repeat(levels, int(np.prod(shape))).reshape(-1, *shape)
    return write(folder, images, rows, record["classes"], source_sha256=record["images_sha256"])
