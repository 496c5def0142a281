"""Files that are either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DIGESTS = "sha256.json"  # beside files: name → sha256 that the file may have
_KEPT_DIGESTS = 8


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `target`; when the block succeeds, flush it to disk and rename it to `target`.

    A crash at any moment leaves the old `target`, or none, never half of one.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        descriptor = os.open(part, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, target)
        _sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let a rename survive a loss of power."""
    with suppress(OSError):  # some network file systems know no folder that could be flushed
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep_parts(folder: Path) -> None:
    """Remove what killed writers of `atomic_path` left below a folder that nobody writes into now."""
    for path in folder.rglob(".*.part"):
        if re.search(r"\.\d+\.part$", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def atomic_write(target: Path | str, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `target` atomically."""
    with atomic_path(target) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256_file(path: Path | str) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note_digest(target: Path, digest: str) -> None:
    """Note in `DIGESTS` beside `target` which sha256 it will have once it is renamed to its place.

    Before, so that a crash between the two leaves a file of a known digest: those that it had before stay known.
    """
    noted = _digests(target.parent)
    noted = {name: known for name, known in noted.items() if (target.parent / name).exists()}
    noted[target.name] = [digest, *noted.get(target.name, [])][:_KEPT_DIGESTS]
    atomic_write(target.parent / DIGESTS, json.dumps(noted, indent=1) + "\n")


def is_damaged(path: Path, noted_as: str = "") -> bool:
    """Whether a file is not what `note_digest` knows of it; False for one that nothing is known of.

    Args:
        path: the file.
        noted_as: the name that it was noted under, by default its own.
    """
    known = _digests(path.parent).get(noted_as or path.name)
    return known is not None and sha256_file(path) not in known


def _digests(folder: Path) -> dict[str, list[str]]:
    try:
        return dict(json.loads((folder / DIGESTS).read_bytes()))
    except (OSError, ValueError):
        return {}
