"""Trees of labels have the path lengths of a search along their edges."""

import math

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.tical.tree import LabelTree

CLASSES = ("angry", "sad", "happy", "calm")
FILE = "negative: {edge: 2, sad: 1, angry: 0.5}\npositive:\n  happy:\n  quiet: {calm: 3}\n"
EDGES = {  # of FILE, by hand
    ("root", "negative"): 2,
    ("negative", "sad"): 1,
    ("negative", "angry"): 0.5,
    ("root", "positive"): 1,
    ("positive", "happy"): 1,
    ("positive", "quiet"): 1,
    ("quiet", "calm"): 3,
}


def shortest(edges):
    """Path lengths by Floyd and Warshall."""
    nodes = {node for pair in edges for node in pair}
    far = {(a, b): 0 if a == b else edges.get((a, b), edges.get((b, a), math.inf)) for a in nodes for b in nodes}
    for via in nodes:
        far = {(a, b): min(old, far[a, via] + far[via, b]) for (a, b), old in far.items()}
    return far


def test_a_tree_of_a_file_has_the_shortest_paths_of_its_edges(tmp_path):
    path = tmp_path / "tree.yaml"
    path.write_text(FILE)
    tree, far = LabelTree.named(str(path), CLASSES), shortest(EDGES)
    order = ["root", "negative", "sad", "angry", "positive", "happy", "quiet", "calm"]
    assert tree.distances.tolist() == [[far[a, b] for b in order] for a in order]
    below = {
        "root": CLASSES,
        "negative": ("sad", "angry"),
        "positive": ("happy", "calm"),
        "quiet": ("calm",),
    }
    for node, row in zip(order, tree.members.tolist(), strict=True):
        assert row == [name in below.get(node, (node,)) for name in CLASSES], node


def test_in_a_flat_tree_all_classes_are_alike():
    tree = LabelTree.named("flat", CLASSES)
    assert tree.distances.tolist() == [
        [0, 1, 1, 1, 1],
        *([1, *[0 if a == b else 2 for b in range(4)]] for a in range(4)),
    ]
    assert tree.members.tolist() == [[True] * 4, *([a == b for b in range(4)] for a in range(4))]


def of_classes(tree):
    """(C, C) distances of the leaves."""
    single = tree.members.sum(1) == 1
    leaf = [max(k for k in single.nonzero()[:, 0].tolist() if tree.members[k, c]) for c in range(tree.members.shape[1])]
    return tree.distances[leaf][:, leaf]


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 7, 9])
def test_in_an_ordinal_tree_distances_never_fall_along_the_order(classes):
    distances = of_classes(LabelTree.named("ordinal", [str(k) for k in range(classes)]))
    for row in range(classes):
        right, left = distances[row, row:].tolist(), distances[row, : row + 1].tolist()[::-1]
        assert right == sorted(right)
        assert left == sorted(left)
    torch.testing.assert_close(distances, distances.flip(0, 1).T)


def test_seven_levels_have_the_paths_written_down_by_hand():
    """negative: {-1, beyond: {-2, -3}}, neutral, positive: {1, beyond: {2, 3}}."""
    distances = of_classes(LabelTree.ordinal(7))
    assert distances[0].tolist() == [0, 2, 3, 4, 5, 6, 6]
    assert distances[2].tolist() == [3, 3, 0, 3, 4, 5, 5]
    assert distances[3].tolist() == [4, 4, 3, 0, 3, 4, 4]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("angry: 1\nsad: 1\nhappy: 1\n", "expected every class, got none of calm"),
        ("angry: 1\nsad: 1\nhappy: 1\ncalm: 1\nbored: 1\n", "expected each class once.* got another 'bored'"),
        ("angry: 1\nsad: 1\nhappy: 1\ncalm: 1\nmore: {sad: 1}\n", "expected each class once.* got another 'sad'"),
        ("angry: 0\nsad: 1\nhappy: 1\ncalm: 1\n", "positive length of the edge above angry, got 0"),
        ("more: {edge: true, angry: 1}\n", "positive length of the edge above more, got True"),
        ("angry: .inf\n", "positive length of the edge above angry, got inf"),
        ("- angry\n", "expected a mapping of nodes in .*, got list"),
        ("{", "expected flat, ordinal or a YAML file, got"),
        (None, "expected flat, ordinal or a YAML file, got"),
    ],
)
def test_trees_that_do_not_fit_are_refused_in_one_line(tmp_path, text, problem):
    path = tmp_path / "tree.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"^tree: .*{problem}") as caught:
        LabelTree.read(path, CLASSES)
    assert "\n" not in str(caught.value)
