"""Pictures of runs, kept with the results and shown on pages: decoded with limits, made small, written anew."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from leanlight.contracts.files import atomic_write
from leanlight.yaml_files import load_yaml

MAX_BYTES = 16 * 2**20  # of a file that is looked at
MAX_PIXELS = 24_000_000  # of a decoded picture
MAX_SIDE = 1000  # of a picture on a page
MAX_FRAMES = 40  # of an animation
MEDIA_BYTES = 200_000  # of the pictures kept for a table
_KEPT_SIDE, _KEPT_SIDE_MOVING = 560, 160  # of a picture kept for a table
_PICTURES_A_ROW = 2
_SPLITS = ("test", "val", "train")
# What shows a method at a glance, by how the picture's name begins, the most telling first. Others (a batch of the
# data, losses, filters) are left in the run folders.
TELLING = (
    "images",
    "play",
    "reconstructions",
    "samples",
    "variations",
    "bank",
    "pool",
    "prompts",
    "disk_by_class",
    "intent_map",
    "montage",
    "attention",
    "accuracy_by_width",
    "personal_accuracy",
    "selected",
    "clients",
    "bin_importance",
    "bin_",
    "latent",
    "anchors",
    "robustness",
    "noise",
    "gaussian_noise",
    "window",
    "hit_rate_by_popularity",
    "score_",
    "scores",
    "flips",
    "firing_rate",
    "accuracy_by_",
    "accuracy_over_",
    "validation_accuracy",
    "rank_frequency",
    "mistakes",
)


@dataclass(frozen=True)
class Picture:
    """uri: ``data:image/…``. width, height: in pixels. rank: how telling, 0 the most."""

    caption: str
    uri: str
    width: int
    height: int
    rank: int = len(TELLING)


def png_uri(content: bytes) -> str:
    """Data URI of a PNG this program has drawn."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def load_picture(path: Path, caption: str) -> Picture | None:
    """Decode a picture file and encode it anew, so that nothing but pixels reaches the page; None if it cannot be had.

    Files over `MAX_BYTES`, pictures over `MAX_PIXELS` and what Pillow cannot read are left out.
    """
    frames = _frames(path, MAX_SIDE)
    if not frames:
        return None
    uri = f"data:image/webp;base64,{base64.b64encode(_webp(frames)).decode()}"
    return Picture(caption, uri, frames[0].width, frames[0].height, _rank(path.stem))


def _webp(frames: list[Image.Image], quality: int = 80) -> bytes:
    buffer = io.BytesIO()
    first, *more = frames
    if more:
        durations = [frame.info["duration"] for frame in frames]
        first.save(buffer, "WEBP", save_all=True, append_images=more, duration=durations, loop=0, quality=quality)
    else:
        first.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def _frames(path: Path, side: int) -> list[Image.Image]:
    """At most `MAX_FRAMES` of a picture file, evenly over its time, made small; none if it cannot be read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "GIF", "JPEG", "WEBP")) as image:
                count = getattr(image, "n_frames", 1)
                if image.width * image.height * count > MAX_PIXELS:
                    return []
                every = -(-count // MAX_FRAMES)
                return [_frame(image, index, side, every) for index in range(0, count, every)]
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return []


def _frame(image: Image.Image, index: int, side: int, every: int) -> Image.Image:
    image.seek(index)
    frame = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame).convert("RGB")
    flat.thumbnail((side, side))
    flat.info = {"duration": int(image.info.get("duration") or 100) * every}
    return flat


# -- pictures kept with the results


def run_folder(runs_root: Path, run: Mapping[str, Any]) -> Path | None:
    """The run folder a result names, if it is there and under `runs_root`."""
    folder = (runs_root / str(run["run"])).resolve()
    return folder if folder.is_relative_to(runs_root.resolve()) and folder.is_dir() else None


def store_media(path: Path, document: Mapping[str, Any], runs_root: Path) -> list[Path]:
    """Keep the telling pictures of each row's first run in ``media`` beside the results JSON `path`; return the new.

    Files: ``<table>_<row>_s<seed>_<name>.webp``, a row's most telling first, together at most `MEDIA_BYTES` a table.
    Rows whose run folders are gone keep what they have. What looks the same in several rows is kept of the first.
    """
    folder, rows = path.with_name("media"), document["rows"]
    places: dict[Path, tuple[int, int, int]] = {}  # of a picture: its place in its row, its rank, the row
    found = set()
    for position in sorted(range(len(rows)), key=lambda position: len(rows[position]["overrides"])):
        if run_dir := _first_run(rows[position], runs_root):
            found.add(rows[position]["name"])
            for place, picture in enumerate(_telling(rows[position], run_dir)):
                # A stage that rows share belongs to the row that changes least of the pipeline.
                places.setdefault(picture, (place, _rank(picture.stem), position))
    kept = {file: row for row, file in _media(path, document)}
    room = MEDIA_BYTES - sum(file.stat().st_size for file, row in kept.items() if row not in found)
    contents: dict[Path, bytes] = {}
    for picture, (_, _, position) in sorted(places.items(), key=lambda item: item[1]):
        row = rows[position]
        frames = _frames(picture, _KEPT_SIDE)
        if len(frames) > 1:
            frames = _frames(picture, _KEPT_SIDE_MOVING)
        content = _webp(frames, 70) if frames else b""
        if 0 < len(content) <= room and content not in contents.values():
            name = f"{document['stem']}_{row['name']}_s{row['runs'][0]['seed']}_{picture.stem}.webp"
            contents[folder / name] = content
            room -= len(content)
    for file, content in contents.items():
        atomic_write(file, content)
    for file, row in kept.items():
        if row in found and file not in contents:
            file.unlink()
    return list(contents)


def _first_run(row: Mapping[str, Any], runs_root: Path) -> Path | None:
    return run_folder(runs_root, row["runs"][0]) if row["runs"] else None


def read_media(path: Path, document: Mapping[str, Any]) -> dict[str, dict[Path, str]]:
    """Pictures kept for the table of the results JSON `path`: row → file → caption, a row's most telling first."""
    media: dict[str, dict[Path, str]] = {}
    labels = {row["name"]: row["label"] for row in document["rows"]}
    order = list(labels)
    for row, file in sorted(_media(path, document), key=lambda found: (order.index(found[0]), _rank(found[1].stem))):
        media.setdefault(row, {})[file] = f"{labels[row]}: {_name(file).replace('_', ' ')}"
    return media


def _media(path: Path, document: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    rows = "|".join(re.escape(row["name"]) for row in document["rows"])
    pattern = re.compile(rf"{re.escape(document['stem'])}_({rows})_s\d+_[\w.-]+\.(?:webp|png|gif)")
    for file in sorted(path.with_name("media").glob("*")):
        if (match := pattern.fullmatch(file.name)) and not file.is_symlink():
            yield match[1], file


def _name(file: Path) -> str:
    return re.split(r"_s\d+_", file.stem, maxsplit=1)[-1]


def _rank(name: str) -> int:
    own = _name(Path(name))
    return next((rank for rank, start in enumerate(TELLING) if own.startswith(start)), len(TELLING))


def _telling(row: Mapping[str, Any], run_dir: Path) -> list[Path]:
    """A row's pictures that are kept: those of its run and of the other stages of its pipeline, one a kind."""
    kinds: dict[int, Path] = {}
    for folder in (run_dir, *_stages(row, run_dir)):
        # Where metrics are logged pictures lie by split; a stage that selects has a folder of its own.
        for place in (*(f"media/{split}" for split in _SPLITS), "select/media"):
            for picture in sorted((folder / "artifacts" / place).glob("*")):
                rank = _rank(picture.stem)
                if picture.suffix in (".png", ".gif") and not picture.is_symlink() and rank < len(TELLING):
                    kinds.setdefault(rank, picture)
    return [kinds[rank] for rank in sorted(kinds)][:_PICTURES_A_ROW]


def _stages(row: Mapping[str, Any], run_dir: Path) -> list[Path]:
    """Folders of the stages that a row's run was made of, the nearest first; they lie beside it.

    A pipeline may have stages that a row does not use, so what counts are the inputs that runs name.
    """
    begin = run_dir.name.rpartition(f"-{row['stage']}-")[0]
    stages, folders = row["runs"][0].get("stages") or {}, [run_dir]
    for folder in folders:  # grows
        for stage in dict.fromkeys(name.partition(".")[0] for name in _inputs(folder)):
            other = run_dir.with_name(f"{begin}-{stage}-{str(stages.get(stage))[:8]}")
            if other.is_dir() and other not in folders:
                folders.append(other)
    return folders[1:]


def _inputs(run_dir: Path) -> list[str]:
    """Names of a run's inputs, e.g. ``bank.artifacts.export``."""
    config = run_dir / "config.yaml"
    content = load_yaml(config.read_text()) if config.is_file() else None
    return list((content["run"].get("inputs") or {}) if isinstance(content, dict) and "run" in content else {})
