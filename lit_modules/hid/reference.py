"""Networks of sessions as written by hand, session after session, click after click: for equality tests, benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_modules.hid.backbones import STAMP, Backbone, GRU4Rec


def encode_one(network: Backbone, clicks: Sequence[int]) -> Tensor:
    """(d,) vector of one session by the weights of a network, without dropout.

    Args:
        network: any of ours.
        clicks: of the session, items from 1.
    """
    return {GRU4Rec: _gru4rec, STAMP: _stamp}[type(network)](network, clicks)  # type: ignore[operator]


def _gru4rec(network: GRU4Rec, clicks: Sequence[int]) -> Tensor:
    """Cho et al. 2014, with PyTorch's order of gates: reset, update, candidate."""
    state = [torch.zeros_like(network.embedding.weight[0])] * network.gru.num_layers
    for click in clicks:
        x = network.embedding.weight[click]
        for layer in range(len(state)):
            w_in, w_state, b_in, b_state = network.gru.all_weights[layer]
            x = state[layer] = _gated(x, state[layer], w_in, w_state, b_in, b_state)
    return state[-1]


def _gated(x: Tensor, state: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor) -> Tensor:
    reset_x, update_x, new_x = (w_in @ x + b_in).chunk(3)
    reset_h, update_h, new_h = (w_state @ state + b_state).chunk(3)
    update = torch.sigmoid(update_x + update_h)
    candidate = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return update * state + (1 - update) * candidate


def _stamp(network: STAMP, clicks: Sequence[int]) -> Tensor:
    """Liu et al. 2018, equations 1 to 11."""
    x = []
    for click in clicks:
        vector = network.embedding.weight[click]
        norm = vector.norm()
        x.append(
            vector * network.max_norm / norm if network.max_norm is not None and norm > network.max_norm else vector
        )
    last, mean = x[-1], torch.stack(x).mean(0)
    read = mean
    for vector in x:
        inner = (
            network.of_click.weight @ vector
            + network.of_last.weight @ last
            + network.of_mean.weight @ mean
            + network.of_click.bias
        )
        read = read + (network.attention.weight[0] @ torch.sigmoid(inner)) * vector
    session = torch.tanh(network.session_head.weight @ read + network.session_head.bias)
    return session * torch.tanh(network.last_head.weight @ last + network.last_head.bias)
