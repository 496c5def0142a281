"""Batches of random clips for networks of emotions, and their export."""

from __future__ import annotations

import io

import torch
from torch import nn

from leanlight.contracts.emotion import Modality

#: Two sequences and one vector; the names are such that no attribute may be called so.
MODALITIES = {"text": Modality(6, 9), "keys": Modality(4), "v.1": Modality(5, 7)}
VECTORS = {"left": Modality(6), "middle": Modality(4), "right": Modality(5)}


def clips(modalities=MODALITIES, count=12, seed=0, dtype=torch.double, missing=0.0):
    """Features, length and present; the first clip has one step of each sequence, the second all."""
    generator = torch.Generator().manual_seed(seed)
    features, length, present = {}, {}, {}
    for place, (name, modality) in enumerate(modalities.items()):
        present[name] = torch.rand(count, generator=generator) >= missing
        # Clip 2 has one modality alone, clip 3 all of them.
        if missing:
            present[name][2], present[name][3] = place == 1, True
        shape = (count, modality.longest, modality.width) if modality.longest else (count, modality.width)
        x = torch.randn(shape, generator=generator, dtype=dtype)
        there = present[name].reshape(-1, *[1] * (x.dim() - 1))
        if modality.longest:
            steps = torch.randint(1, modality.longest + 1, (count,), generator=generator)
            steps[0], steps[1] = 1, modality.longest
            length[name] = steps * present[name]
            there = (torch.arange(modality.longest) < length[name][:, None])[..., None]
        features[name] = x * there
    return features, length, present


def one(batch, i):
    """Clip i of a batch alone, without padding."""
    features, length, present = batch
    cut = {name: x[i : i + 1, : max(int(length[name][i]), 1)] if name in length else x[i : i + 1]
           for name, x in features.items()}  # fmt: skip
    return cut, {name: n[i : i + 1] for name, n in length.items()}, {name: p[i : i + 1] for name, p in present.items()}


class Tensors(nn.Module):
    """A network whose answer is a plain mapping, as an exported program has it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, features, length, present):
        answer = self.network(features, length, present)
        return {"output": answer.output, **{f"hidden {name}": x for name, x in answer.hidden.items()}}


def exported(network, modalities):
    """A program written and read again, exported with numbers of clips and steps left open."""
    batch = clips(modalities, 4, 1, next(network.parameters()).dtype)
    clip = torch.export.Dim("N")
    steps = {name: torch.export.Dim(f"L{i}") for i, name in enumerate(modalities)}
    shapes = (
        {name: {0: clip, 1: steps[name]} if modality.longest else {0: clip} for name, modality in modalities.items()},
        {name: {0: clip} for name in batch[1]},
        {name: {0: clip} for name in batch[2]},
    )
    file = io.BytesIO()
    torch.export.save(torch.export.export(Tensors(network), batch, dynamic_shapes=shapes), file)
    file.seek(0)
    return torch.export.load(file).module()
