"""The fused neuron against spikingjelly's plain one and against known inputs of the ESVAE paper's constants."""

import copy

import pytest
import torch
from spikingjelly.activation_based import neuron

from lit_modules.nn import integrate_and_fire, lif, reset


def pair(*args, make=lif, **kwargs):
    """Spikingjelly's plain neuron and ours, with the same constants."""
    fast = make(*args, **kwargs)
    leaky = isinstance(fast, neuron.LIFNode)
    names = ("v_threshold", "v_reset", "detach_reset", "step_mode", *(("tau", "decay_input") if leaky else ()))
    constants = {name: getattr(fast, name) for name in names}
    plain = neuron.LIFNode if leaky else neuron.IFNode
    return plain(surrogate_function=copy.deepcopy(fast.surrogate_function), **constants), fast


def run(node, current, upstream, calls=1):
    """Spikes, potential and input gradient of the sequence given in `calls` pieces, one after another."""
    reset(node)
    x = current.clone().requires_grad_()
    spikes = torch.cat([node(piece) for piece in x.chunk(calls)])
    ((spikes * upstream).sum() + node.v.square().sum()).backward()
    return spikes.detach(), node.v.detach(), x.grad


@pytest.mark.parametrize("surrogate", ["rect", "rect_zero", "atan", "sigmoid"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("leak", ["full input", "decayed input", "none"])
def test_spikes_potential_and_gradient_equal_the_plain_neuron(surrogate, detach, calls, leak):
    torch.manual_seed(0)
    current, upstream = torch.randn(2, 6, 5, 4, 3, 3, dtype=torch.float64).mul(0.5)
    if leak == "none":
        plain, fast = pair(0.2, surrogate, detach, make=integrate_and_fire)
    else:
        plain, fast = pair(0.25, 0.2, surrogate, detach, decay_input=leak == "decayed input")
    for got, expected in zip(run(fast, current, upstream, calls), run(plain, current, upstream, calls), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_without_gradients_it_gives_the_same_spikes_and_state():
    current = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    _, fast = pair(0.25, 0.2, "rect_zero")
    with_graph = fast(current.clone().requires_grad_()).detach()
    potential = fast.v.detach()
    reset(fast)
    with torch.no_grad():
        assert torch.equal(fast(current), with_graph)
    assert torch.equal(fast.v, potential)


def test_memory_layout_of_a_step_is_kept_and_does_not_change_values():
    current = torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    channels_last = current.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2))
    upstream = torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    _, fast = pair(0.25, 0.2, "rect")
    assert fast(channels_last).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    spikes, _, grad = run(fast, channels_last, upstream)
    for got, expected in zip((spikes, grad), run(fast, current, upstream)[::2], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("surrogate", ["atan", "sigmoid"])
def test_steps_too_large_to_be_taken_together_have_the_same_gradient(surrogate, monkeypatch):
    torch.manual_seed(0)
    current, upstream = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    _, fast = pair(0.25, 0.2, surrogate)
    together = run(fast, current, upstream)
    monkeypatch.setattr("lit_modules.nn.neurons._LARGE_STEP", 1)
    for got, expected in zip(run(fast, current, upstream), together, strict=True):
        assert torch.equal(got, expected)


def test_a_view_repeated_over_time_equals_copies():
    step = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    upstream = torch.randn(5, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for repeated in (lambda x: x.expand(5, *x.shape), lambda x: x.repeat(5, 1, 1, 1, 1)):
        node, x = lif(0.25, 0.2, "rect_zero"), step.clone().requires_grad_()
        (node(repeated(x)) * upstream).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_constants_of_the_paper_decide_when_a_constant_input_fires():
    """0.149 settles at 0.149 / (1 - 0.25) < 0.2 and never fires; 0.17 reaches 0.2125 at the second step."""
    node = lif(0.25, 0.2, "rect_zero")
    assert node(torch.full((50, 1), 0.149)).sum() == 0
    reset(node)
    assert node(torch.full((4, 1), 0.17)).flatten().tolist() == [0, 1, 0, 1]


def test_a_neuron_whose_surrogate_was_replaced_obeys_the_new_one():
    class Never(torch.nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    node = lif(0.25, 0.2, "rect")
    node.surrogate_function = Never()
    assert node(torch.full((3, 2), 5.0)).sum() == 0


def test_half_precision_runs_as_the_plain_neuron():
    current = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain, fast = pair(0.25, 0.2, "rect")
    assert torch.equal(fast(current), plain(current))
