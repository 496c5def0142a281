"""Compiled networks run as written where hooks in them count."""

import torch
from torch import nn

from leanlight.contracts import uncompiled


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x).relu()


def calls(network, seen):
    seen.clear()
    network(torch.ones(1, 2))
    return len(seen)


def test_hooks_are_called_inside_the_block_and_blocks_may_overlap_in_any_order():
    torch.compiler.reset()
    network, graphs, seen = Network(), [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    network.compile(backend=backend)
    network(torch.ones(1, 2))
    network.layer.register_forward_hook(lambda *_: seen.append(1))
    assert (calls(network, seen), len(graphs)) == (0, 1)
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    assert calls(network, seen) == 1
    first.__exit__(None, None, None)
    assert calls(network, seen) == 1
    second.__exit__(None, None, None)
    assert (calls(network, seen), len(graphs)) == (0, 1)
    torch.compiler.reset()
