"""Make a page that trains a network in the browser: on a distilled set, or on as many random real images.

One HTML file that loads nothing: the set, some real images, and a network with one hidden layer in plain JavaScript.

    python scripts/playground/make.py EXPORT [--dataset fashion_mnist] [--output docs/playground.html]

EXPORT is the folder with ``distilled.safetensors`` and ``card.json`` that a run of `at_bptt` has exported.
"""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from safetensors.torch import load_file
from torch import Tensor

from datamodules import ImageDataModule
from leanlight.contracts import UserError, atomic_write
from leanlight.results.page import content_policy, style
from leanlight.runs import read_summary, run_of
from lit_modules.at_bptt.pictures import drawable

_HERE = Path(__file__).parent
_TEST = 600  # images that are shown to no network in training
_POOL = 30  # real training images a class, of which some are drawn


def collect(export: Path, dataset: str) -> dict[str, Any]:
    """What the page holds, arrays as base64.

    Args:
        export: folder of an exported set.
        dataset: its real images, by name; of Fashion-MNIST those that the suite brings, so that all make the same page.

    Raises:
        UserError: no such folder, a set that is not whitened, or not grey.
    """
    if not (export / "distilled.safetensors").is_file():
        raise UserError(f"EXPORT: expected a folder with distilled.safetensors, got {export}")
    tensors, card = load_file(export / "distilled.safetensors"), json.loads((export / "card.json").read_text())
    images, labels = tensors["images"], tensors["labels"]
    if "whitening" not in tensors or images.shape[1] != 1:
        raise UserError(f"EXPORT: expected whitened grey images, {export} has {card['preprocess']}, {card['images']}")
    variant = "subset" if dataset == "fashion_mnist" else "auto"
    data = ImageDataModule(dataset, variant=variant, image_size=images.shape[-1])
    data.setup()
    pool, test = data.train_split, data.test_split
    classes = range(len(card["classes"]))
    kept = torch.cat([torch.nonzero(pool.labels == label)[:_POOL, 0] for label in classes])
    return {
        "classes": card["classes"],
        "side": images.shape[-1],
        "lr": card["recipe"]["lr"],
        "images": _scaled(images.flatten(1)),
        "labels": _scaled(labels),
        "drawn": _bytes(drawable(images, tensors["whitening"]).mul(255).round().byte()),
        "whitening": _scaled(tensors["whitening"]),
        "pool": _bytes(pool.images[kept]),
        "pool_labels": pool.labels[kept].tolist(),
        "test": _bytes(test.images[:_TEST]),
        "test_labels": test.labels[:_TEST].tolist(),
    }


def _bytes(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def _scaled(values: Tensor) -> dict[str, Any]:
    """Numbers as 16-bit integers and what one of them is worth: a third of the file, and far finer than needed."""
    worth = float(values.abs().max()) / 32767
    return {"worth": worth, "integers": _bytes(torch.from_numpy((values / worth).round().numpy().astype(np.int16)))}


def made_from(export: Path) -> str:
    """The run that the export lies in, and its commit; else the folder's name."""
    summary = read_summary(run_of(export.resolve()))
    return f"run {summary['run_id']} of commit {summary['commit'][:12]}" if summary else export.name


def render(export: Path, dataset: str) -> str:
    """The page's HTML."""
    css = style("report.css") + Markup((_HERE / "page.css").read_text())
    script = Markup((_HERE / "network.js").read_text() + (_HERE / "page.js").read_text())
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    held = collect(export, dataset)
    return environment.get_template("page.html.j2").render(
        css=css,
        script=script,
        policy=content_policy(css, script),
        data=Markup(json.dumps(held).replace("<", "\\u003c")),  # so that nothing in it ends its element
        source=made_from(export),
        dataset=dataset,
        side=held["side"],
        tested=len(held["test_labels"]),
        ipc=json.loads((export / "card.json").read_text())["ipc"],
        pool=len(held["pool_labels"]),
        guess=round(100 / len(held["classes"])),
    )


def main() -> None:
    """Write one page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", metavar="EXPORT", type=Path)
    parser.add_argument("--dataset", default="fashion_mnist", help="real images to compare with")
    parser.add_argument("--output", type=Path, default=Path("docs/playground.html"))
    arguments = parser.parse_args()
    text = render(arguments.export, arguments.dataset)
    atomic_write(arguments.output, text)
    print(f"{arguments.output}: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
