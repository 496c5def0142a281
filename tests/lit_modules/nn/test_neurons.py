"""The fused neuron against spikingjelly's plain one and against known inputs of the ESVAE paper's constants."""

import copy
from contextlib import nullcontext

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate

from leanlight.contracts import UserError
from lit_modules.nn import SpikingConvNet, integrate_and_fire, lif, reset
from lit_modules.nn.scan import plain_autograd


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
@pytest.mark.parametrize("soft", [False, True])
def test_spikes_potential_and_gradient_equal_the_plain_neuron(surrogate, detach, calls, leak, soft):
    torch.manual_seed(0)
    current, upstream = torch.randn(2, 6, 5, 4, 3, 3, dtype=torch.float64).mul(0.5)
    if leak == "none":
        plain, fast = pair(0.2, surrogate, detach, make=integrate_and_fire, soft_reset=soft)
    else:
        plain, fast = pair(0.25, 0.2, surrogate, detach, decay_input=leak == "decayed input", soft_reset=soft)
    assert plain.v_reset == (None if soft else 0.0)
    wanted = run(plain, current, upstream, calls)
    for way in (nullcontext(), plain_autograd()):
        with way:
            found = run(fast, current, upstream, calls)
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "function"), [("atan", surrogate.ATan), ("sigmoid", surrogate.Sigmoid)])
@pytest.mark.parametrize("alpha", [None, 0.5, 1.0, 7.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("leaky", [False, True])
def test_a_surrogate_of_any_steepness_is_spikingjellys(name, function, alpha, soft, leaky):
    torch.manual_seed(0)
    current, upstream = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    options = {"surrogate_gradient": name, "soft_reset": soft, "alpha": alpha}
    fast = lif(0.25, 0.7, **options) if leaky else integrate_and_fire(0.7, **options)
    constants = {
        "v_threshold": 0.7,
        "v_reset": None if soft else 0.0,
        "surrogate_function": function() if alpha is None else function(alpha=alpha),
        "step_mode": "m",
    }
    plain = neuron.LIFNode(4 / 3, decay_input=False, **constants) if leaky else neuron.IFNode(**constants)
    assert fast._cell() is not None  # else it is the plain neuron that is compared with itself
    for got, expected in zip(run(fast, current, upstream), run(plain, current, upstream), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [lif, integrate_and_fire])
def test_a_steepness_that_makes_no_sense_is_refused_in_one_line(make):
    for options in ({"surrogate_gradient": "atan", "alpha": 0.0}, {"surrogate_gradient": "rect", "alpha": 2.0}):
        with pytest.raises(UserError, match="alpha: expected a positive number, with atan or sigmoid; got"):
            make(**options)


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
    monkeypatch.setattr("lit_modules.nn.scan._LARGE_STEP", 1)
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


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("surrogate", ["rect", "rect_zero", "atan", "sigmoid"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("decay_input", [False, True])
def test_half_currents_give_the_spikes_of_float32_potentials(half, surrogate, soft, decay_input):
    torch.manual_seed(0)
    current, upstream = torch.randn(2, 16, 5, 40).to(half)
    plain, fast = pair(0.9, 0.2, surrogate, decay_input=decay_input, soft_reset=soft)
    spikes, potential, grad = run(fast, current, upstream)
    expected_spikes, expected_potential, expected_grad = run(plain, current.float(), upstream.float())
    assert (spikes.dtype, potential.dtype, grad.dtype) == (half, torch.float32, half)
    assert torch.equal(spikes.float(), expected_spikes)
    torch.testing.assert_close(potential, expected_potential, rtol=1e-5, atol=1e-6)
    rounding = torch.finfo(half).eps
    torch.testing.assert_close(grad.float(), expected_grad, rtol=rounding, atol=rounding)


def test_half_potentials_would_give_other_spikes():
    """What the test above guards against: spikingjelly's own path keeps potentials in the currents' type."""
    current = torch.randn(16, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain, fast = pair(0.9, 0.2, "rect")
    assert not torch.equal(fast(current), plain(current))


def test_what_the_scan_does_not_cover_keeps_float32_potentials_too():
    current = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain, fast = pair(0.9, 0.2, "rect")
    plain.store_v_seq = fast.store_v_seq = True
    spikes = fast(current)
    assert (spikes.dtype, fast.v_seq.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(spikes.float(), plain(current.float()))


def test_a_spiking_network_under_autocast_fires_by_float32_potentials():
    """Every neuron, on the currents that mixed precision hands it, fires as in float32."""
    torch.manual_seed(0)
    network, image = SpikingConvNet(width=8, time_steps=8), torch.rand(4, 1, 28, 28)
    seen = []
    for node in network.neurons:
        node.register_forward_hook(lambda node, inputs, spikes: seen.append((node, inputs[0], spikes, node.v.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        network(image).sum().backward()
    assert len(seen) == 3
    for node, current, spikes, kept in list(seen):
        assert current.dtype == spikes.dtype == torch.bfloat16
        assert kept == torch.float32
        reset(node)
        assert 0 < spikes.float().mean() < 1
        assert torch.equal(node(current.detach().float()), spikes.float())
    assert all(weight.grad.isfinite().all() for weight in network.parameters())
