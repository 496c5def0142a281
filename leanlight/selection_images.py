"""A selection as pictures in class folders, for whatever reads such folders."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor, nn

from datamodules import DistilledDataModule, ImageDataModule, ImageFolderStream
from datamodules.images.stream import StreamSplit
from datamodules.images.subset import Subset
from leanlight import runs
from leanlight.contracts import UserError
from leanlight.experiment import load, load_data
from leanlight.invocation import read_config
from leanlight.predictions import describe_predictions
from lit_modules.adq import PatchDrop
from lit_modules.adq.patches import kept_patches, patch_grid, salience


class PictureFolders:
    """Writes the items of a selection to ``DIR/<class>/``: files of a streamed folder as they are, others as PNG.

    What can be wrong is found before anything is selected: the data of the features are loaded here.

    Args:
        features: run folder of the features, whose configuration names the data.
        target: the folder to write, new or empty.
        trust: packages outside the suite that the configuration may name.
        patches: what is left out of the pictures and filled in again.
    """

    def __init__(
        self, features: Path, target: Path, trust: Sequence[str] = (), patches: PatchDrop | None = None
    ) -> None:
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
        self.target, self.meta, self.data = target, data.meta, data
        self.split = data.splits["train"] if isinstance(data, ImageFolderStream) else data.train_split
        self.patches, self.network = patches, None
        if patches is not None and patches.changes_pictures:
            if isinstance(self.split, StreamSplit):
                raise UserError("--patches: pictures of a streamed folder are copied as they are, of whatever size")
            rows, columns = patch_grid(self.split.images, patches.patch)
            kept_patches(torch.zeros(1, rows * columns), patches.drop_ratio)
            if patches.patch_select == "gradcam":
                self.network = _network(run, trust)
                salience(self.network, self.split.images[:1].float() / 255)

    def shown(self, items: Tensor) -> Tensor:
        """(n, C, H, W) float pictures in [0, 1] as the selector saw them. items: (n,) int64 of the training part."""
        others = torch.ones(len(self.split.labels), dtype=torch.bool).index_fill(0, items, False)
        self.data.predict_split = "train"
        self.data.skip_predicted(others.nonzero()[:, 0])
        batches = list(self.data.predict_dataloader())
        image, index = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("image", "index"))
        return image[torch.searchsorted(index, items)].float() / 255

    def write(self, selection: Path, seed: int = 0) -> None:
        """Write the pictures of the selection in a folder, all or none of them. seed: of what is random in patches."""
        items, _ = Subset(selection).find(self.meta, self.split.labels, self.split.origin)
        rebuilt = self._rebuilt(items, seed)
        names = folder_names(self.meta.classes)
        part = self.target.with_name(f".{self.target.name}.{os.getpid()}.part")
        console = Console(stderr=True)
        try:
            for name in names:
                (part / name).mkdir(parents=True)
            shown = track(items.tolist(), "pictures", console=console, disable=not console.is_terminal)
            for number, item in enumerate(shown):
                place = part / names[int(self.split.labels[item])] / f"{int(self.split.origin[item]):07}"
                if isinstance(self.split, StreamSplit):
                    source = self.split.paths[item]
                    shutil.copyfile(source, place.with_suffix(source.suffix.lower()))
                else:
                    image = self.split.images[item] if rebuilt is None else rebuilt[number]
                    Image.fromarray(image.permute(1, 2, 0).squeeze(2).contiguous().numpy()).save(
                        place.with_suffix(".png")
                    )
            os.replace(part, self.target)
        except OSError as error:
            raise UserError(f"--images: cannot write {self.target} ({error.strerror or error})") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _rebuilt(self, items: Tensor, seed: int) -> Tensor | None:
        """The pictures without the patches that are left out, if any are."""
        if isinstance(self.split, StreamSplit) or self.patches is None or not self.patches.changes_pictures:
            return None
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("autoencoder", total=self.patches.steps)
            images = self.split.images
            return self.patches.rebuild(images[items], self.network, images, seed, lambda done: bar.advance(task, done))


def _network(run: Path, trust: Sequence[str]) -> nn.Module:
    """The network with which a run predicted."""
    checkpoint = read_config(run / "config.yaml").get("ckpt_path")
    if not isinstance(checkpoint, str) or not Path(checkpoint).is_file():
        raise UserError(
            f"--patches: patch_select gradcam needs the weights that {run} was predicted with, got {checkpoint}; "
            "set patch_select=random"
        )
    network = getattr(load(Path(checkpoint), trust=trust), "network", None)
    if not isinstance(network, nn.Module):
        raise UserError(f"--patches: the module of {checkpoint} has no network; set patch_select=random")
    return network


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder name for each class: its own where that can be one, each a different one."""
    names = [re.sub(r"[^\w.+ -]", "_", name).strip(". ") or "_" for name in classes]
    return [name if names.count(name) == 1 else f"{name}_{label}" for label, name in enumerate(names)]
