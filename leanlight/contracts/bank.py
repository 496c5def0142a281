"""A bank: a folder of images that stand for data which may not be used, and where each of them came from."""

from __future__ import annotations

#: uint8 images (M, C, H, W) under the name ``images``.
BANK_IMAGES = "bank.safetensors"
#: One row an image, in their order, with `BANK_COLUMNS`.
BANK_MANIFEST = "manifest.csv"
#: ``items``, ``shape``, ``classes``, ``teacher`` (digest of its state, or null), ``images_sha256``,
#: ``manifest_sha256``, and numbers worth telling. It is written last: without it a bank is not whole.
BANK_RECORD = "bank.json"
#: item: position in the bank. source: position of the image it varies, in the bank of originals; its own for an
#: original. k: 0 for an original, 1 to K for its variations. seed: of what was drawn for it; -1 for an original.
#: score: cosine with its source in embedding space; 1 for an original. kept: 1 where it passed the filter, else 0.
#: label: class it was made for. teacher_label: class that the teacher gives it.
BANK_COLUMNS = ("item", "source", "k", "seed", "score", "kept", "label", "teacher_label")
