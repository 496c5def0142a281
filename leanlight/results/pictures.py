"""Pictures for a self-contained page: decoded with limits, made small, written anew as data: URIs."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

MAX_BYTES = 16 * 2**20  # of a file that is looked at
MAX_PIXELS = 24_000_000  # of a decoded picture
MAX_SIDE = 1000  # of an embedded picture
MAX_FRAMES = 40  # of an embedded animation
_SPLITS = ("test", "val", "train")


@dataclass(frozen=True)
class Picture:
    """uri: ``data:image/…``. width, height: in pixels."""

    caption: str
    uri: str
    width: int
    height: int


def png_uri(content: bytes) -> str:
    """Data URI of a PNG this program has drawn."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def load_picture(path: Path, caption: str) -> Picture | None:
    """Decode a picture file and encode it anew, so that nothing but pixels reaches the page; None if it cannot be had.

    Files over `MAX_BYTES`, pictures over `MAX_PIXELS` and what Pillow cannot read are left out.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "GIF", "JPEG", "WEBP")) as image:
                if image.width * image.height * getattr(image, "n_frames", 1) > MAX_PIXELS:
                    return None
                frames = _frames(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    buffer = io.BytesIO()
    first, *more = frames
    if more:
        duration = int(frames[0].info.get("duration") or 100)
        first.save(buffer, "WEBP", save_all=True, append_images=more, duration=duration, loop=0, quality=75)
    else:
        first.save(buffer, "WEBP", quality=82)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(caption, uri, first.width, first.height)


def _frames(image: Image.Image) -> list[Image.Image]:
    frames = []
    for index in range(min(getattr(image, "n_frames", 1), MAX_FRAMES)):
        image.seek(index)
        frame = image.convert("RGBA")
        ground = Image.new("RGBA", frame.size, "white")
        flat = Image.alpha_composite(ground, frame).convert("RGB")
        flat.thumbnail((MAX_SIDE, MAX_SIDE))
        flat.info = {"duration": image.info.get("duration")}
        frames.append(flat)
    return frames


def run_folder(runs_root: Path, run: Mapping[str, Any]) -> Path | None:
    """The run folder a result names, if it is there and under `runs_root`."""
    folder = (runs_root / str(run["run"])).resolve()
    return folder if folder.is_relative_to(runs_root.resolve()) and folder.is_dir() else None


def run_pictures(run_dir: Path, limit: int) -> list[Picture]:
    """At most `limit` pictures of a run's media, each name once: that of test data before validation and training."""
    pictures: dict[str, Picture] = {}
    for split in _SPLITS:
        for path in sorted((run_dir / "artifacts" / "media" / split).glob("*")):
            wanted = path.suffix in (".png", ".gif") and not path.is_symlink() and path.stem not in pictures
            if wanted and len(pictures) < limit:
                picture = load_picture(path, f"{path.stem.replace('_', ' ')} ({split})")
                pictures |= {path.stem: picture} if picture else {}
    return list(pictures.values())
