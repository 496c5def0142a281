"""The Q-networks against a loop over time, neuron by neuron."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional

from leanlight.contracts import UserError
from lit_modules.dsqn import DQN, DSQN
from lit_modules.dsqn.networks import _numbers_together

SMALL = {"history": 2, "frame_size": 12, "convolutions": [[6, 4, 2], [8, 3, 1]], "hidden": 16}


class ATan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + (math.pi * x) ** 2)


def looped(network, state, kind="lif", reset="hard", readout="rate"):
    """The paper's equations, one step at a time, every layer at every step."""
    layers = [*network.convolutions, network.hidden]
    v = [torch.zeros(())] * len(layers)
    rates, sequence, integrator = 0, [], torch.zeros(())
    for _ in range(network.time_steps):
        x = state
        for i, layer in enumerate(layers):
            current = layer(x.flatten(1) if i == len(layers) - 1 else x)
            u = v[i] + (current - v[i]) / 2 if kind == "lif" else v[i] + current
            x = ATan.apply(u - 1.0)
            v[i] = u * (1 - x) if reset == "hard" else u - x
        rates = rates + x / network.time_steps
        integrator = integrator + (network.head(x) - integrator) / 2
        sequence.append(integrator)
    if readout == "rate":
        return network.head(rates)
    sequence = torch.stack(sequence)
    return {"max_mem": sequence.amax(0), "last_mem": sequence[-1], "mean_mem": sequence.mean(0)}[readout]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"neuron": "if"},
        {"reset": "soft"},
        {"readout": "max_mem"},
        {"readout": "last_mem"},
        {"readout": "mean_mem"},
    ],
    ids=str,
)
@pytest.mark.parametrize("pieces", [1, 3])
def test_values_and_gradients_equal_a_loop_over_time(options, pieces, monkeypatch):
    torch.manual_seed(0)
    if pieces == 3:  # of 4, 4 and 1 of the 9 time steps; a step of the first layer has 5·6·5·5 numbers
        monkeypatch.setattr("lit_modules.dsqn.networks._TOGETHER", 4 * 750 + 1)
    network = DSQN(3, **SMALL, time_steps=9, init_gain=8.0, **options).double()
    state = torch.rand(5, 2, 12, 12, dtype=torch.float64)
    weight = torch.randn(5, 3, dtype=torch.float64)
    arguments = {"kind" if name == "neuron" else name: value for name, value in options.items()}
    expected = looped(network, state, **arguments)
    wanted = torch.autograd.grad((expected * weight).sum(), list(network.parameters()))
    got = network(state)
    gradients = torch.autograd.grad((got * weight).sum(), list(network.parameters()))
    torch.testing.assert_close(got, expected)
    assert sum(g.abs().sum() for g in wanted) > 0
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_first_convolution_runs_once_for_a_state():
    network, calls = DSQN(3, **SMALL, time_steps=7), []
    network.convolutions[0].register_forward_hook(lambda *_: calls.append(1))
    network(torch.rand(2, 2, 12, 12))
    assert calls == [1]


def test_parameter_counts_are_those_of_the_paper():
    counts = {type(n).__name__: sum(p.numel() for p in n.parameters()) for n in (DQN(4), DSQN(4, time_steps=1))}
    assert counts == {"DQN": 1_686_180, "DSQN": 1_686_180}


def test_all_networks_can_take_each_others_weights():
    ordinary = DQN(3, **SMALL)
    for readout in ("rate", "spike_rate", "max_mem"):
        DSQN(3, **SMALL, readout=readout).load_state_dict(ordinary.state_dict())


def neuron_of(**options):
    """A hidden neuron with τ = 2, whose input is the current I; it keeps τ times the potential."""
    return DSQN(3, **SMALL, **options).neurons[0]


@pytest.mark.parametrize(
    ("current", "spikes"),
    [(0.99, [0] * 8), (2.0, [1] * 8), (1.5, [0, 1] * 4)],
    ids=["below the threshold", "every step", "every second step"],
)
def test_a_constant_current_fires_as_worked_out_by_hand(current, spikes):
    fire = neuron_of()
    assert fire(torch.full((8, 1), current)).flatten().tolist() == spikes


def test_soft_and_hard_reset_differ_only_after_the_first_spike():
    current = torch.full((12, 1), 2.6)
    current[:4] = 0.5
    hard, soft = neuron_of()(current).flatten(), neuron_of(reset="soft")(current).flatten()
    first = int(hard.argmax())
    assert torch.equal(hard[: first + 1], soft[: first + 1])
    potentials = []
    for reset in ("hard", "soft"):
        fire = neuron_of(reset=reset)
        fire(current[: first + 1])
        potentials.append(float(fire.v))
    assert potentials[0] == 0.0
    assert potentials[1] > 0.0


@pytest.mark.parametrize("potential", [0.0, 1.0, -1.0])
def test_the_derivative_of_a_spike_is_the_arctangent(potential):
    current = torch.tensor([[2 * (1.0 + potential)]], requires_grad=True)  # at rest, half of it enters
    (gradient,) = torch.autograd.grad(neuron_of()(current).sum(), current)
    assert float(gradient) == pytest.approx(0.5 / (1 + (math.pi * potential) ** 2), rel=1e-5)


def test_the_rate_readout_is_the_mean_of_the_head_over_time():
    network = DSQN(3, **SMALL, time_steps=6, init_gain=8.0)
    seen = []
    network.neurons[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    values = network(torch.rand(4, 2, 12, 12))
    torch.testing.assert_close(values, torch.stack([network.head(s) for s in seen[0]]).mean(0), atol=1e-6, rtol=0)


def test_nothing_is_remembered_between_states():
    network, state = DSQN(3, **SMALL, time_steps=5, init_gain=8.0), torch.rand(3, 2, 12, 12)
    first = network(state)
    network(torch.rand(3, 2, 12, 12))
    assert torch.equal(network(state), first)


def test_the_faithful_network_is_silent_at_first_and_a_gain_wakes_it():
    torch.manual_seed(0)
    state = torch.rand(4, 2, 12, 12)
    silent, awake = DSQN(3, **SMALL, time_steps=8), DSQN(3, **SMALL, time_steps=8, init_gain=8.0)
    torch.testing.assert_close(silent(state), silent.head.bias.expand(4, 3))
    assert awake(state).std(0).sum() > 0


def test_a_spiking_output_gives_values_between_0_and_1():
    values = DSQN(3, **SMALL, time_steps=10, init_gain=8.0, readout="spike_rate")(torch.rand(6, 2, 12, 12))
    assert ((values >= 0) & (values <= 1)).all()
    torch.testing.assert_close(values * 10, (values * 10).round(), atol=1e-4, rtol=0)


def test_neurons_hold_no_graph_after_a_forward():
    network = DSQN(3, **SMALL, time_steps=3, init_gain=8.0)
    network(torch.rand(1, 2, 12, 12))
    assert all(not isinstance(n.v, torch.Tensor) for n in network.neurons)
    functional.reset_net(network)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"convolutions": [[4, 20, 1]]}, "convolutions"),
        ({"convolutions": []}, "convolutions"),
        ({"tau": 1.0}, "tau"),
        ({"time_steps": 0}, "time_steps"),
        ({"v_threshold": -1.0}, "v_threshold"),
        ({"init_gain": 0.0}, "init_gain"),
    ],
)
def test_sizes_that_make_no_sense_are_named(options, words):
    with pytest.raises(UserError, match=words):
        DSQN(3, **{**SMALL, **options})


def test_an_ordinary_network_is_what_its_layers_say():
    network, state = DQN(3, **SMALL), torch.rand(2, 2, 12, 12)
    x = F.relu(F.conv2d(state, network.convolutions[0].weight, network.convolutions[0].bias, 2))
    x = F.relu(F.conv2d(x, network.convolutions[1].weight, network.convolutions[1].bias))
    x = F.relu(F.linear(x.flatten(1), network.hidden.weight, network.hidden.bias))
    torch.testing.assert_close(network(state), F.linear(x, network.head.weight, network.head.bias))


def test_a_gpu_computes_all_time_steps_that_fit_at_once(monkeypatch):
    """The paper's network on an Atari batch: 64 steps of (32, 32, 20, 20) currents are 105 MB."""
    step = 32 * 32 * 20 * 20
    for memory, steps in ((16e9, 64), (1e9, 19)):
        card = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert min(64, _numbers_together(torch.device("cuda", 0)) // step) == steps
    assert _numbers_together(torch.device("cpu")) // step == 10
