"""The conversion against spikingjelly's own graph, numpy's percentiles and a simulation step by step."""

import copy

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import ann2snn, functional, neuron

from leanlight.contracts import UserError
from lit_modules.dsqn import DQN, DSQN, convert
from lit_modules.dsqn.conversion import _Chain, _ExactPercentile

SHAPE = {"history": 1, "frame_size": 8, "convolutions": [[8, 3, 1], [8, 3, 2]], "hidden": 32}


@pytest.fixture(scope="module")
def trained():
    """A network whose values differ clearly, and states."""
    torch.manual_seed(0)
    network = DQN(3, **SHAPE)
    states = (torch.rand(400, 1, 8, 8) > 0.8).float()
    goal = torch.stack([part.mean((1, 2)) for part in states[:, 0].split([3, 2, 3], dim=2)])
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (network(states) - 3 * goal.T).square().mean().backward()
        optimizer.step()
    return network.eval(), states


def agreement(network, states, **options):
    with torch.no_grad():
        converted = convert(network, states, **options)
        return float((converted(states).argmax(1) == network(states).argmax(1)).float().mean())


def test_more_time_steps_agree_better_with_the_source(trained):
    shares = [agreement(*trained, time_steps=steps) for steps in (4, 16, 64, 400)]
    assert shares == sorted(shares)
    assert shares[0] < 0.95 < shares[-1]


def test_without_lag_the_robust_readout_agrees_at_least_as_well_as_counting_spikes(trained):
    robust, spikes = (
        [agreement(*trained, time_steps=steps, decoding=decoding, layer_lag=False) for steps in (4, 8, 16, 32)]
        for decoding in ("robust", "spikes")
    )
    assert sum(robust) > sum(spikes)


def test_leaking_neurons_convert_worse(trained):
    assert agreement(*trained, time_steps=128, node="lif", tau=4.0) < agreement(*trained, time_steps=128)


def test_normalisation_alone_leaves_the_ranking_alone(trained):
    network, states = trained
    layers = convert(network, states, time_steps=1).layers
    x = states
    for layer in layers[:-1]:
        x = layer(x.flatten(1) if isinstance(layer, torch.nn.Linear) else x).relu()
    assert torch.equal(layers[-1](x).argmax(1), network(states).argmax(1))


def test_scales_are_percentiles_of_what_the_layers_give(trained):
    network, states = trained
    layers = convert(network, states, time_steps=1, percentile=99.0).layers
    with torch.no_grad():
        first = network.convolutions[0](states)
        scale = np.percentile(first.numpy(), 99.0, method="nearest")
    torch.testing.assert_close(layers[0].weight, network.convolutions[0].weight / scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layers[0].bias, network.convolutions[0].bias / scale, rtol=1e-4, atol=1e-6)


def test_folded_weights_spike_like_spikingjellys_scaled_graph(trained):
    network, recorded = copy.deepcopy(trained[0]).double(), trained[1].double()
    recipe = _ExactPercentile(recorded, 99.9, lambda scale: neuron.IFNode(v_reset=None))
    graph = ann2snn.FXConverter(recipe).convert(_Chain(network))
    functional.reset_net(graph)
    with torch.no_grad():
        total = sum(graph(recorded[:50]) for _ in range(70))
        converted = convert(network, recorded, time_steps=70, decoding="spikes", layer_lag=False)
        counts, _ = converted.simulate(recorded[:50])
    fired = counts > 0
    assert torch.equal(total > 0, fired)
    scales = (total / counts)[fired]
    torch.testing.assert_close(scales, scales[:1].expand_as(scales))


@pytest.mark.parametrize("lag", [True, False])
def test_integrate_and_fire_step_by_step(trained, lag):
    network, states = trained
    converted = convert(network, states, time_steps=70, layer_lag=lag)
    x, layers = states[:5], list(converted.layers)
    v, counts = [0.0] * len(layers), 0.0
    sent = [torch.zeros_like(x)]  # what image and layers gave at the step before: nothing at first
    with torch.no_grad():
        for layer in layers[:-1]:
            sent.append(torch.zeros_like(layer(flat(layer, sent[-1]))))
        for _ in range(70):
            signals = [x]
            for i, layer in enumerate(layers):
                v[i] = v[i] + layer(flat(layer, sent[i] if lag else signals[i]))
                signals.append((v[i] >= 1).float())
                v[i] = v[i] - signals[-1]
            counts, sent = counts + signals[-1], signals
        got = converted(x)
    torch.testing.assert_close(got, (counts + v[-1]) / 70, rtol=1e-4, atol=1e-3)


def flat(layer, signal):
    return signal.flatten(1) if isinstance(layer, torch.nn.Linear) else signal


def test_with_lag_as_many_steps_as_there_are_layers_know_nothing_of_the_image(trained):
    network, states = trained  # four layers: two convolutions, the hidden one, the output
    bright = 9 * states[:9]  # so that whatever sees them fires at once
    early, late = (convert(network, states, time_steps=steps).simulate(bright) for steps in (4, 5))
    assert all(torch.equal(part, part[:1].expand_as(part)) for part in early)
    assert len(late[1].unique(dim=0)) > 1


def test_values_that_are_all_negative_are_ranked_by_the_potential(trained):
    network, states = trained
    shifted = DQN(3, **SHAPE)
    shifted.load_state_dict(network.state_dict())
    with torch.no_grad():
        shifted.head.bias.sub_(50.0)
    assert agreement(shifted, states, time_steps=300) > 0.9


def test_only_an_ordinary_network_is_converted(trained):
    with pytest.raises(UserError, match="DQN"):
        convert(DSQN(3, **SHAPE), trained[1])
    with pytest.raises(UserError, match="percentile"):
        convert(trained[0], trained[1], percentile=0.0)
