"""What a folder that leaves the suite holds, told by its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from leanlight.contracts.bank import BANK_IMAGES, BANK_MANIFEST, BANK_RECORD

RepoType = Literal["model", "dataset"]


@dataclass(frozen=True)
class Kind:
    """One kind of content.

    Args:
        mark: a file that tells it; of a set made several times, in the first one's folder.
        what: a noun for readers.
        repo_type: of a repository of the Hugging Face hub that holds it.
        task: what it is for, in the hub's words; empty for none of them.
        library: that loads it; empty where `torch` or `safetensors` do.
        use: lines of Python that load it without the suite; empty where its ``card.json`` has them.
    """

    mark: str
    what: str
    repo_type: RepoType = "model"
    task: str = ""
    library: str = ""
    use: str = ""


_IMAGES = "image-classification"
_DISTILLED = """\
from safetensors.torch import load_file

tensors = load_file("{folder}distilled.safetensors")
images, labels = tensors["images"], tensors["labels"]"""
_BANK = f"""\
import csv
from safetensors.torch import load_file

images = load_file("{BANK_IMAGES}")["images"]  # uint8 (M, C, H, W)
rows = list(csv.DictReader(open("{BANK_MANIFEST}", encoding="utf-8")))  # one an image
labels = [int(row["label"]) for row in rows]"""
_SELECTION = """\
from safetensors.torch import load_file

chosen = load_file("selection.safetensors")
positions = chosen["index"]  # in the training part of the data"""
_PIPELINE = """\
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".")
images = pipeline(batch_size=4, num_inference_steps=50).images"""
_UNET = """\
from diffusers import UNet2DModel

network = UNet2DModel.from_pretrained("unet")"""
_JUDGE = """\
import json

judge = json.load(open("judge.json", encoding="utf-8"))"""

#: In the order in which their marks are looked for: the narrower first.
KINDS = (
    Kind("selection.json", "selection of training items", "dataset", use=_SELECTION),
    Kind(BANK_RECORD, "bank of images made from a trained network", "dataset", _IMAGES, use=_BANK),
    Kind("distilled.safetensors", "distilled training set", "dataset", _IMAGES, use=_DISTILLED.format(folder="")),
    Kind(
        "replica_0/distilled.safetensors",
        "distilled training set, made several times",
        "dataset",
        _IMAGES,
        use=_DISTILLED.format(folder="replica_0/"),
    ),
    Kind("adapter_config.json", "adapter of a vision-language model", "model", "image-text-to-text", "peft"),
    Kind("model_index.json", "diffusion model", "model", "unconditional-image-generation", "diffusers", use=_PIPELINE),
    Kind("unet/config.json", "diffusion model", "model", "image-to-image", "diffusers", use=_UNET),
    Kind("config.json", "vision-language model", "model", "image-text-to-text", "transformers"),
    Kind("judge.json", "judge of answers", use=_JUDGE),
    Kind("agent.pt2", "agent that plays", "model", "reinforcement-learning"),
    Kind("decoder.pt2", "generator of images", "model", "unconditional-image-generation"),
    Kind("items.csv", "recommender for sessions"),
    Kind("network.safetensors", "network that recognises emotions"),
    Kind("network.pt2", "image classifier", "model", _IMAGES),
)
_OTHER = Kind("", "export")


def kind_of(folder: Path) -> Kind:
    """The kind of what a folder holds; that of any export where no mark is there, as of a method from elsewhere."""
    return next((kind for kind in KINDS if (folder / kind.mark).is_file()), _OTHER)
