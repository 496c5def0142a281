"""Take the networks of all widths out of the suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from lit_modules.classifier.export import export_network
from lit_modules.sfedhifi.decomposition import can_fold, fold_network
from lit_modules.sfedhifi.widths import percent


def export_widths(
    networks: Mapping[float, nn.Module], example: Tensor, directory: Path, classes: Sequence[str]
) -> list[Path]:
    """Write the widest network, and every other into ``width_<percent>/``; folded where that computes the same.

    Args:
        networks: by width p.
        example: two images (2, C, H, W), as for `lit_modules.classifier.export.export_network`.
        directory: where to; it exists.
        classes: label names; index = label.
    """
    files: list[Path] = []
    for width, network in networks.items():
        folder = directory if width == max(networks) else directory / f"width_{percent(width)}"
        folder.mkdir(parents=True, exist_ok=True)
        files += export_network(fold_network(network) if can_fold(network) else network, example, folder, classes)
    return files
