"""Graphs of sessions and of items against loops over sessions."""

import numpy as np
import pytest
import torch

from leanlight.contracts import Sessions, UserError
from lit_modules.hid.graphs import edge_types, global_neighbours, session_graph
from lit_modules.hid.reference import loop_edge_types, loop_neighbours, loop_session_graphs


def padded(count, longest, items, seed):
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, longest + 1, (count,), generator=generator)
    clicks = torch.randint(1, items + 1, (count, longest), generator=generator)
    return clicks * (torch.arange(longest) < length[:, None])


SHAPES = [(50, 12, 5, 0), (50, 12, 1000, 1), (7, 2, 2, 2), (5, 1, 9, 3), (1, 30, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_graph_is_that_of_the_loop_of_published_code(shape):
    items = padded(*shape)
    graph = session_graph(items)
    nodes, alias, adjacency = loop_session_graphs(items.numpy())
    width = items.shape[1]
    np.testing.assert_array_equal(graph.nodes.numpy(), nodes)
    np.testing.assert_array_equal(graph.alias.numpy(), alias)
    np.testing.assert_array_equal(graph.inward.numpy(), adjacency[:, :, :width].astype(np.float32))
    np.testing.assert_array_equal(graph.outward.numpy(), adjacency[:, :, width:].astype(np.float32))


def test_a_graph_by_hand():
    """5 → 3 → 3 → 5 → 7 → 3: the node of 3 is entered from 5, 7 and itself, 5 is left for 3 and 7."""
    graph = session_graph(torch.tensor([[5, 3, 3, 5, 7, 3, 0]]))
    assert graph.nodes.tolist() == [[3, 5, 7, 0, 0, 0, 0]]
    assert graph.alias.tolist() == [[1, 0, 0, 1, 2, 0, 3]]
    inward, outward = graph.inward[0, :3, :3], graph.outward[0, :3, :3]
    third = 1 / 3
    torch.testing.assert_close(inward, torch.tensor([[third, third, third], [1, 0, 0], [0, 1, 0]]))
    torch.testing.assert_close(outward, torch.tensor([[0.5, 0.5, 0], [0.5, 0, 0.5], [1, 0, 0]]))
    assert not graph.inward[0, 3:].any()
    assert not graph.outward[0, :, 3:].any()
    assert edge_types(graph)[0, :4, :4].tolist() == [[1, 4, 3, 0], [4, 1, 2, 0], [2, 3, 1, 0], [0] * 4]


@pytest.mark.parametrize("shape", SHAPES)
def test_types_of_edges_are_those_of_a_loop(shape):
    items = padded(*shape)
    graph = session_graph(items)
    types = edge_types(graph)
    for row, nodes, found in zip(items.tolist(), graph.nodes.tolist(), types.tolist(), strict=True):
        expected = loop_edge_types([item for item in row if item])
        got = {(nodes[i], nodes[j]): kind for i, line in enumerate(found) for j, kind in enumerate(line) if kind}
        assert got == expected


@pytest.mark.parametrize(("window", "count"), [(3, 12), (1, 2), (9, 5)])
def test_neighbours_of_items_are_those_of_a_loop(window, count):
    lists = [[item for item in row if item] for row in padded(80, 9, 25, seed=window).tolist()]
    items = torch.tensor([item for clicks in lists for item in clicks])
    offsets = torch.tensor([0, *(len(clicks) for clicks in lists)]).cumsum(0)
    neighbours, weights = global_neighbours(Sessions(items, offsets), 30, window, count)
    assert neighbours.shape == weights.shape == (31, count)
    assert weights.dtype == torch.float32
    expected = loop_neighbours(lists, window, count)
    for item, (near, times) in enumerate(zip(neighbours.tolist(), weights.tolist(), strict=True)):
        pairs = list(expected.get(item, {}).items())
        blank = [(0, 0)] * (count - len(pairs))
        assert list(zip(near, times, strict=True)) == pairs + blank


def test_no_session_gives_no_neighbours():
    none = torch.zeros(0, dtype=torch.int64)
    neighbours, weights = global_neighbours(Sessions(none, torch.zeros(1, dtype=torch.int64)), 4)
    assert not neighbours.any()
    assert not weights.any()
    with pytest.raises(UserError, match="window: expected"):
        global_neighbours(Sessions(none, none), 4, window=0)
