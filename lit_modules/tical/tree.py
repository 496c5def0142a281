"""Trees of labels: which emotions are near each other, by the length of the path between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from leanlight.contracts import UserError

_EDGE = "edge"  # key of the length of the edge above an inner node


@dataclass(frozen=True)
class LabelTree:
    """A rooted tree whose leaves are the classes.

    Args:
        distances: (K, K) float length of the path between nodes; the root is node 0.
        members: (K, C) bool, which classes lie at or below a node.
    """

    distances: Tensor
    members: Tensor

    @classmethod
    def named(cls, name: str, classes: Sequence[str]) -> LabelTree:
        """``flat``, ``ordinal``, or the tree of a file; of the classes by name."""
        if name == "flat":
            return cls.flat(len(classes))
        return cls.ordinal(len(classes)) if name == "ordinal" else cls.read(name, classes)

    @classmethod
    def flat(cls, num_classes: int) -> LabelTree:
        """All C classes at one edge from the root: what is learned is to lie apart alike."""
        classes = [str(k) for k in range(num_classes)]
        return _grown(dict.fromkeys(classes), classes)

    @classmethod
    def ordinal(cls, num_classes: int) -> LabelTree:
        """C classes in ascending order: negative, neutral (where C is odd) and positive.

        On either side each level hangs one edge deeper than the weaker one, so that no class is nearer to one beyond.
        """
        half, classes = num_classes // 2, [str(k) for k in range(num_classes)]
        negative, positive = classes[:half][::-1], classes[num_classes - half :]
        tree = {"negative": _levels(negative), "positive": _levels(positive)} if half > 1 else dict.fromkeys(classes)
        return _grown(tree | dict.fromkeys(classes[half : num_classes - half]), classes)

    @classmethod
    def read(cls, path: str | Path, classes: Sequence[str]) -> LabelTree:
        """The tree of a YAML or JSON file.

        Nested mappings are nodes; a class has the length of its edge, or nothing for 1; an inner node may have one too,
        under ``edge``: ``{negative: {edge: 2, sad: 1, angry: 1}, happy: 3}``.

        Raises:
            UserError: the file cannot be read, an edge is not positive, or not each class is a leaf once.
        """
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            problem = " ".join(str(error).split())
            raise UserError(f"tree: expected flat, ordinal or a YAML file, got {path}: {problem}") from error
        if not isinstance(tree, Mapping):
            raise UserError(f"tree: expected a mapping of nodes in {path}, got {type(tree).__name__}")
        return _grown(tree, classes)

    def to(self, device: torch.device | str) -> LabelTree:
        """The same tree on a device."""
        return LabelTree(self.distances.to(device), self.members.to(device))


def _levels(classes: Sequence[str]) -> dict[str, Any]:
    """Two or more classes of one side, the weakest first, each one edge deeper; the last two are alike deep."""
    if len(classes) == 2:
        return dict.fromkeys(classes)
    return {classes[0]: None, f"beyond {classes[0]}": _levels(classes[1:])}


def _grown(tree: Mapping[str, Any], classes: Sequence[str]) -> LabelTree:
    above, edges, leaves = [[0]], [0.0], dict[str, int]()  # of each node: those on its path from the root, and itself

    def grow(branches: Mapping[str, Any], path: list[int]) -> None:
        for name, branch in branches.items():
            if name == _EDGE and path != [0]:
                continue
            inner = isinstance(branch, Mapping)
            length = branch.get(_EDGE) if inner else branch
            above.append([*path, len(above)])
            edges.append(_length(name, length))
            if inner:
                grow(branch, above[-1])
            elif str(name) in leaves or str(name) not in classes:
                known = ", ".join(classes)
                raise UserError(f"tree: expected each class once, of {known}; got another {name!r}")
            else:
                leaves[str(name)] = len(above) - 1

    grow(tree, above[0])
    lacking = [name for name in classes if name not in leaves]
    if lacking:
        raise UserError(f"tree: expected every class, got none of {', '.join(lacking)}")
    ancestors = torch.zeros(len(above), len(above))
    for node, path in enumerate(above):
        ancestors[node, path] = 1
    shared = (ancestors * torch.tensor(edges)) @ ancestors.T  # path from the root to where two nodes part
    depth = shared.diagonal()
    members = ancestors[[leaves[name] for name in classes]].T.bool()
    return LabelTree(depth[:, None] + depth - 2 * shared, members)


def _length(name: str, given: object) -> float:
    if given is None:
        return 1.0
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < float("inf"):
        raise UserError(f"tree: expected a positive length of the edge above {name}, got {given!r}")
    return float(given)
