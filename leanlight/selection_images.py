"""A selection as pictures in class folders, for whatever reads such folders."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track

from datamodules import DistilledDataModule, ImageDataModule, ImageFolderStream
from datamodules.images.stream import StreamSplit
from datamodules.images.subset import Subset
from leanlight import runs
from leanlight.contracts import UserError
from leanlight.experiment import load_data
from leanlight.predictions import describe_predictions


class PictureFolders:
    """Writes the items of a selection to ``DIR/<class>/``: files of a streamed folder as they are, others as PNG.

    What can be wrong is found before anything is selected: the data of the features are loaded here.

    Args:
        features: run folder of the features, whose configuration names the data.
        target: the folder to write, new or empty.
        trust: packages outside the suite that the configuration may name.
    """

    def __init__(self, features: Path, target: Path, trust: Sequence[str] = ()) -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"--images: expected a new or empty folder, there is something at {target}")
        run = runs.run_of(features)
        if not (run / "config.yaml").is_file():
            raise UserError(
                f"--images: expected a run folder, whose config.yaml names the data; FEATURES is {features}"
            )
        data = load_data(run, {}, trust)
        if not isinstance(data, (ImageDataModule, ImageFolderStream)) or isinstance(data, DistilledDataModule):
            raise UserError(f"--images: {run} was predicted on {type(data).__name__}, whose items are no pictures")
        data.ensure_available()
        data.setup("predict")
        if data.meta.fingerprint != describe_predictions(features).get("data"):
            raise UserError(
                f"--images: the data that {run / 'config.yaml'} names are not those of the features any more"
            )
        self.target, self.meta = target, data.meta
        self.split = data.splits["train"] if isinstance(data, ImageFolderStream) else data.train_split

    def write(self, selection: Path) -> None:
        """Write the pictures of the selection in a folder, all or none of them."""
        items, _ = Subset(selection).find(self.meta, self.split.labels, self.split.origin)
        names = folder_names(self.meta.classes)
        part = self.target.with_name(f".{self.target.name}.{os.getpid()}.part")
        console = Console(stderr=True)
        try:
            for name in names:
                (part / name).mkdir(parents=True)
            for item in track(items.tolist(), "pictures", console=console, disable=not console.is_terminal):
                self._write_one(item, part / names[int(self.split.labels[item])] / f"{int(self.split.origin[item]):07}")
            os.replace(part, self.target)
        except OSError as error:
            raise UserError(f"--images: cannot write {self.target} ({error.strerror or error})") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _write_one(self, item: int, place: Path) -> None:
        if isinstance(self.split, StreamSplit):
            source = self.split.paths[item]
            shutil.copyfile(source, place.with_suffix(source.suffix.lower()))
            return
        pixels = self.split.images[item].permute(1, 2, 0)
        Image.fromarray(pixels.squeeze(2).contiguous().numpy()).save(place.with_suffix(".png"))


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder name for each class: its own where that can be one, each a different one."""
    names = [re.sub(r"[^\w.+ -]", "_", name).strip(". ") or "_" for name in classes]
    return [name if names.count(name) == 1 else f"{name}_{label}" for label, name in enumerate(names)]
