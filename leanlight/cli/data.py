"""`leanlight data`: list the data sets, get one, check one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.emotion.catalog import EMOTIONS, EmotionSetInfo
from datamodules.images.catalog import DatasetInfo
from datamodules.safety.catalog import SafetySetInfo
from datamodules.sessions.catalog import SessionSetInfo
from leanlight.cli.arguments import Parser, number, output_file
from leanlight.contracts.errors import UserError, nearest
from leanlight.contracts.ranges import PositiveFloat, PositiveInt
from leanlight.data_sets import KNOWN, Info

if TYPE_CHECKING:
    from datamodules.safety.module import SafetyDataModule

# Sets of many small picture files: `prepare` decodes them once into an npz that loads in seconds.
PICTURE_SETS = {"tiny_imagenet": "tiny_imagenet", "celeba": "celeba_64"}


def list_data(argv: list[str]) -> int:
    """Print the catalogue; imports no torch."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    Parser(prog="leanlight data list", description="list the data sets").parse_args(argv)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what it is, and how to get it")
    for name, info in KNOWN.items():
        table.add_row(name, f"{info.title}\n{info.facts}, licence: {info.licence}\n[dim]{escape(info.get)}[/dim]")
    console = Console(highlight=False)
    console.print(table)
    console.print("Looked for in the folder LEANLIGHT_DATA, else ./data. Items of images: train + test.")
    return 0


def _arguments(command: str, argv: list[str]) -> tuple[argparse.Namespace, Info]:
    parser = Parser(prog=f"leanlight data {command}")
    parser.add_argument("name", metavar="NAME", help="a name of `leanlight data list`")
    default = os.environ.get("LEANLIGHT_DATA") or "data"
    parser.add_argument("--root", default=default, metavar="DIR", help="folder of data sets (default: %(default)s)")
    parser.add_argument(
        "--path", metavar="PATH", help="of data that `leanlight data list` shows with PATH, or of a log"
    )
    parser.add_argument("--images", metavar="DIR", help="of samples to judge: folder of the pictures that PATH names")
    if command == "check":
        parser.add_argument(
            "--variant", default="auto", choices=["auto", "full", "subset"], help="of images (default: %(default)s)"
        )
    else:
        _add_encoders(parser)
    arguments = parser.parse_args(argv)
    name = arguments.name
    if name not in KNOWN:
        raise UserError(f"data set {name!r} is unknown{nearest(name, KNOWN)}; `leanlight data list` lists them")
    for option, kind in (("images", SafetySetInfo), ("encoder", EmotionSetInfo)):
        if getattr(arguments, option, None) and not isinstance(KNOWN[name], kind):
            raise UserError(f"--{option}: not an option of {name}; `leanlight data {command} --help` says of which")
    return arguments, KNOWN[name]


def _add_encoders(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("features of clips (emotion_folder; of mosi its text)")
    group.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="MODALITY=DIR",
        help="text, audio or video, and a folder with an encoder of transformers; once a modality",
    )
    group.add_argument("--steps", action="store_true", help="a vector a token, step or frame instead of their mean")
    group.add_argument(
        "--frames", type=number(PositiveInt), default=16, help="of a clip at most (default: %(default)s)"
    )
    group.add_argument(
        "--seconds", type=number(PositiveFloat), default=30.0, help="of sound at most (default: %(default)s)"
    )
    group.add_argument("--device", default="cpu", help="where encoders run (default: %(default)s)")
    group.add_argument(
        "--output", type=output_file, metavar="FILE", help="safetensors (default: in PATH; of mosi: text.safetensors)"
    )


def prepare(argv: list[str]) -> int:
    """Find or download a data set and say where it is."""
    arguments, info = _arguments("prepare", argv)
    ready = {
        DatasetInfo: _prepare_images,
        SessionSetInfo: _prepare_sessions,
        EmotionSetInfo: _prepare_clips,
        SafetySetInfo: _prepare_samples,
    }
    try:
        print(f"{arguments.name}: ready, {ready[type(info)](info.name, arguments)}")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--root, --output: cannot write {error.filename} ({error.strerror})") from error
    return 0


def _prepare_images(name: str, arguments: argparse.Namespace) -> str:
    from datamodules.images import formats, sources

    # The packaged subset is always there: whoever prepares Fashion-MNIST means the whole.
    variant: sources.Variant = "full" if name == "fashion_mnist" else "auto"
    raw = sources.load(name, arguments.root, variant, download=True, path=arguments.path)
    where = raw.source
    if name in PICTURE_SETS and ".npz" not in where:
        target = Path(arguments.root) / name / f"{PICTURE_SETS[name]}.npz"
        parts = {"train": raw.train, "test": raw.test} | ({"val": raw.val} if raw.val else {})
        formats.write_npz(target, parts, raw.classes)
        where = str(target)
    return f"{len(raw.train[0]):,} train and {len(raw.test[0]):,} test items in {where}"


def _prepare_sessions(name: str, arguments: argparse.Namespace) -> str:
    from datamodules.sessions import sources

    raw = sources.load(name, arguments.root, arguments.path, keep=True)
    return f"{len(raw.train):,} train and {len(raw.test):,} test sessions from {raw.source}"


def _prepare_clips(name: str, arguments: argparse.Namespace) -> str:
    from datamodules.catalog import place_of
    from datamodules.emotion import extract, readers, sources

    if arguments.encoder or name == "emotion_folder":
        settings = extract.Extraction(arguments.steps, arguments.frames, arguments.seconds)
        place = place_of(EMOTIONS[name], arguments.root, arguments.path)
        encoders = {}
        for pair in arguments.encoder:
            modality, _, where = pair.partition("=")
            encoders[modality] = extract.Encoder(modality, Path(where).expanduser(), settings, arguments.device)
        if name == "emotion_folder":
            clips, output = extract.find_clips(place), place / readers.FEATURES
        elif name == "mosi" and set(encoders) == {"text"}:
            clips = [extract.Clip(*pair) for pair in readers.mosi_transcripts(place).items()]
            output = place.parent / "text.safetensors"
        else:
            raise UserError(f"encoder: expected none with {name}; it is for emotion_folder, and for the text of mosi")
        return extract.prepare(clips, Path(arguments.output or output), encoders, settings.steps)
    found = sources.load(name, arguments.root, arguments.path, download=True)
    return f"{len(found):,} clips from {found.source}"


def _prepare_samples(name: str, arguments: argparse.Namespace) -> str:
    if name == "shapes" and not (arguments.path or arguments.images):
        return _write_shapes(Path(arguments.root) / name)
    meta = _samples(name, arguments).meta
    return f"{sum(meta.counts.values()):,} samples, {sum(meta.pictures.values()):,} with a picture, from {meta.source}"


def _write_shapes(folder: Path) -> str:
    """Made samples as files, for commands that read files; fits make the same ones for themselves."""
    from datamodules.safety.files import write_samples
    from datamodules.safety.shapes import Shapes

    found = Shapes().make()
    there = "written to" if write_samples([(sample, str(part)) for sample, part in found], folder) else "already in"
    return f"{len(found):,} samples with pictures {there} {folder}; test.jsonl is for leanlight audit"


def _samples(name: str, arguments: argparse.Namespace) -> SafetyDataModule:
    """The set with the DataModule's defaults."""
    from datamodules.safety.module import SafetyDataModule

    data = SafetyDataModule(name, arguments.root, arguments.path, arguments.images)
    data.setup()
    return data


def check(argv: list[str]) -> int:
    """Load a data set without downloading and print what it holds."""
    arguments, info = _arguments("check", argv)
    facts = {
        DatasetInfo: _check_images,
        SessionSetInfo: _check_sessions,
        EmotionSetInfo: _check_clips,
        SafetySetInfo: _check_samples,
    }
    for label, value in facts[type(info)](info.name, arguments).items():
        print(f"{label:<12} {value}")
    return 0


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in counts.items())


def _check_images(name: str, arguments: argparse.Namespace) -> dict[str, str]:
    from datamodules.images.module import ImageDataModule

    data = ImageDataModule(name, arguments.root, arguments.variant, path=arguments.path, download=False)
    data.setup()
    meta = data.meta
    shown = ", ".join(meta.classes[:10]) + (", …" if len(meta.classes) > 10 else "")
    return {
        "source": meta.source,
        "items": _counts(meta.counts),
        "shape": "x".join(map(str, meta.shape)),
        "classes": f"{meta.num_classes}: {shown}",
        "a class": f"{min(meta.class_counts):,} to {max(meta.class_counts):,} training items",
        "fingerprint": meta.fingerprint,
    }


def _check_sessions(name: str, arguments: argparse.Namespace) -> dict[str, str]:
    """What `SessionDataModule` makes of the set with its defaults."""
    from datamodules.sessions.module import SessionDataModule

    data = SessionDataModule(name, arguments.root, arguments.path)
    data.setup()
    meta, catalogue = data.meta, data.catalogue
    share = float(catalogue.clicks[catalogue.head].sum() / catalogue.clicks.sum())
    lengths = data.train_sessions.offsets.diff()
    return {
        "source": meta.source,
        "items": f"{meta.num_items:,}, clicked in training",
        "categories": f"{meta.num_categories:,}" if meta.num_categories else "none",
        "head": f"{meta.num_head:,} items with {share:.1%} of the training clicks",
        "sessions": f"{len(lengths):,} train, {lengths.double().mean():.2f} clicks each, {lengths.max()} at most",
        "cases": _counts(meta.counts),
        "fingerprint": meta.fingerprint,
    }


def _check_clips(name: str, arguments: argparse.Namespace) -> dict[str, str]:
    """What `EmotionDataModule` makes of the set with its defaults."""
    from datamodules.emotion.module import EmotionDataModule

    data = EmotionDataModule(name, arguments.root, arguments.path, download=False)
    data.setup()
    meta = data.meta
    lacking = {m: int((~has).sum()) for m, has in data.present.items()}
    modalities = {
        m: f"{one.width} wide" + (f", {one.longest} steps at most" if one.longest else "") + _lacked(lacking[m])
        for m, one in meta.modalities.items()
    }
    conflicts = "not known" if data.conflict is None else f"{int(data.conflict.sum()):,} clips of all parts"
    shown = ", ".join(f"{c} {n:,}" for c, n in zip(meta.classes, meta.class_counts, strict=True))
    return {
        "source": meta.source,
        **modalities,
        "clips": _counts(meta.counts),
        "classes": f"{len(meta.classes)}, in training: {shown}" if meta.classes else "no labels",
        "conflicts": conflicts,
        "fingerprint": meta.fingerprint,
    }


def _lacked(clips: int) -> str:
    return f", {clips:,} clips lack it" if clips else ""


def _check_samples(name: str, arguments: argparse.Namespace) -> dict[str, str]:
    """What `SafetyDataModule` makes of the set with its defaults."""
    data = _samples(name, arguments)
    meta = data.meta
    topics = dict.fromkeys(sample.topic for part in meta.counts for sample in data.samples(part) if sample.topic)
    harmful = {f: f"harmful in {_counts(dict(counts))}" for f, counts in meta.harmful.items()}
    return {
        "source": meta.source,
        "samples": _counts(meta.counts),
        "pictures": _counts(dict(meta.pictures)) if any(meta.pictures.values()) else "none",
        **(harmful or {"labels": "none"}),
        "topics": ", ".join(list(topics)[:10]) + (", …" if len(topics) > 10 else "") or "none",
        "fingerprint": meta.fingerprint,
    }


COMMANDS = {"list": list_data, "prepare": prepare, "check": check}


def main(argv: list[str]) -> int:
    """Run ``list``, ``prepare NAME`` or ``check NAME``; UserError for what the user can mend."""
    parser = Parser(prog="leanlight data", description=__doc__)
    parser.add_argument("command", choices=COMMANDS, help="list all; prepare or check one (--root DIR, --path PATH)")
    return COMMANDS[parser.parse_args(argv[:1]).command](argv[1:])
