"""Take a trained network of emotions out of the suite, with its anchors."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanlight.contracts import atomic_write
from lit_modules.export import write_exported, write_weights
from lit_modules.tical.network import EmotionNetwork, example


def export_emotions(network: EmotionNetwork, directory: Path) -> list[Path]:
    """Write ``network.pt2``, ``network.safetensors``, ``card.json`` and, with anchors, ``clips.csv``; return the paths.

    ``torch.export.load("network.pt2").module()(features, length, present)`` gives what `EmotionNetwork.forward` gives,
    for any number of clips and steps; its arguments are mappings by modality. ``network.safetensors`` has the state,
    anchors too where clips are assessed. ``clips.csv`` has the names of the clips among the anchors by their number.
    ``card.json`` describes everything and has lines that recognise a clip.

    Args:
        network: trained; it stays where it is.
        directory: where to; it exists.
    """
    exported = Scaled(copy.deepcopy(network).cpu().eval())
    arguments = example(network.facts, 3)
    any_size = write_exported(exported, arguments, _sizes(arguments), directory / "network.pt2")
    state = exported.network.state_dict()  # before clips are assessed, lists hold nothing that one could use
    unused = [] if network.assessing else [name for name in state if name.startswith("lists.")]
    write_weights(exported.network, directory / "network.safetensors", unused)
    names = ["network.pt2", "network.safetensors"]
    if network.assessing:
        atomic_write(directory / "clips.csv", _clips(exported.network))
        names.append("clips.csv")
    card = {**_card(exported.network), "any_size": any_size}
    atomic_write(directory / "card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return [directory / name for name in (*names, "card.json")]


class Scaled(nn.Module):
    """A network of emotions that takes features as extractors give them.

    Args:
        network: on the CPU.
    """

    def __init__(self, network: EmotionNetwork) -> None:
        super().__init__()
        self.network, self.names = network, tuple(network.scaling)
        for place, (mean, deviation) in enumerate(network.scaling.values()):
            self.register_buffer(f"mean_{place}", mean.cpu())
            self.register_buffer(f"deviation_{place}", deviation.cpu())

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """As `EmotionNetwork.forward`; what lies behind the length of a sequence has no part in it."""
        scaled = dict(features)
        for place, name in enumerate(self.names):
            mean, deviation = self.get_buffer(f"mean_{place}"), self.get_buffer(f"deviation_{place}")
            scaled[name] = (features[name] - mean) / deviation
        return self.network(scaled, length, present)


def _sizes(arguments: tuple[dict[str, Tensor], ...]) -> tuple[dict[str, dict[int, Any]], ...]:
    """Any number of clips, the same everywhere, and of steps, one a modality."""
    clips = torch.export.Dim("clips", min=1)
    features, *rest = arguments
    steps = {name: {1: torch.export.Dim(f"steps_{k}", min=1)} for k, name in enumerate(features)}
    first = {name: {0: clips, **(steps[name] if x.ndim == 3 else {})} for name, x in features.items()}
    return first, *({name: {0: clips} for name in each} for each in rest)


def _clips(network: EmotionNetwork) -> str:
    """Names of the clips in the lists, by their number in the training part."""
    assert network.lists is not None
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["number", "clip"])
    numbers = network.lists.clip.unique().tolist()
    rows.writerows([number, network.facts.clips[number]] for number in numbers if number >= 0)
    return text.getvalue()


def _card(network: EmotionNetwork) -> dict[str, Any]:
    facts = network.facts
    modalities = {
        name: {
            "shape": ["N", "L", one.width] if one.longest else ["N", one.width],
            "longest_in_training": one.longest,
            "extractor_sha256": facts.extractors.get(name),
        }
        for name, one in facts.modalities.items()
    }
    return {
        "network": type(network.body).__name__,
        "modalities": modalities,
        "classes": list(facts.classes),
        "score_range": facts.score_range,
        "assessment": network.assessing,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "torch": str(torch.__version__),
        "use": _use(network),
    }


def _use(network: EmotionNetwork) -> list[str]:
    """Lines that recognise a clip; its features are blank, to be replaced."""
    modalities = network.facts.modalities
    shapes = {name: f"1, 4, {one.width}" if one.longest else f"1, {one.width}" for name, one in modalities.items()}
    features = ", ".join(f"{json.dumps(name)}: torch.zeros({shape})" for name, shape in shapes.items())
    length = ", ".join(f"{json.dumps(name)}: torch.tensor([4])" for name, one in modalities.items() if one.longest)
    lines = [
        "import csv, json, torch",
        'classes = json.load(open("card.json", encoding="utf-8"))["classes"]',
        'network = torch.export.load("network.pt2").module()',
        f"features = {{{features}}}",
        f"length = {{{length}}}",
        "found = network(features, length, {name: torch.ones(1, dtype=torch.bool) for name in features})",
    ]
    if network.num_outputs == 1:
        lines.append('print("score", float(found["score"][0]))')
    else:
        lines.append('print(classes[int(found["probabilities"][0].argmax())], found["probabilities"][0].tolist())')
    if network.assessing:
        lines += [
            'clips = {int(row["number"]): row["clip"] for row in csv.DictReader(open("clips.csv", encoding="utf-8"))}',
            'print("consistency", float(found["consistency"][0]))',
            'for name, says in found["says"].items():',
            '    typicality, anchor = (found[each][name][0].item() for each in ("typicality", "anchor"))',
            "    print(name, classes[says[0]], typicality, clips[anchor])",
        ]
    return lines
