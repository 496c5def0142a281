"""The CUDA kernels of the fused neuron, run by Triton's interpreter on CPU tensors, against the scan step by step."""

import pytest
import torch

from lit_modules.nn import SpikingConvNet, integrate_and_fire, lif, reset, scan

pytest.importorskip("triton")


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    """Kernels are interpreted when this variable is set at their definition; nothing else here imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        library = torch.library.Library("leanlight", "IMPL")
        library.impl("lif_scan", scan._kernel_scan, "CPU")
        library.impl("lif_scan_backward", scan._kernel_backward, "CPU")
        yield
        library._destroy()


def both(node, current, upstream, monkeypatch, calls=1):
    """Spikes, potential and input gradient by the kernels and step by step."""
    results = []
    for use in (True, False):
        monkeypatch.setattr(scan, "_uses_kernel", lambda current, use=use: use)
        reset(node)
        x = current.clone(memory_format=torch.preserve_format).requires_grad_()
        spikes = torch.cat([node(piece) for piece in x.chunk(calls)])
        ((spikes * upstream).sum() + node.v.square().sum()).backward()
        results.append((spikes.detach(), node.v.detach(), x.grad))
    return results


def exact(*shape, seed=0):
    """Multiples of 1/64 between -1 and 1: a few leaky steps of them are exact in float32, however they are added."""
    return torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(seed)) / 64


@pytest.mark.parametrize("surrogate", ["rect", "rect_zero", "atan", "sigmoid"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("calls", [1, 3])
def test_kernels_equal_the_steps(surrogate, soft, detach, leaky, calls, monkeypatch):
    node = lif(0.5, 0.25, surrogate, detach) if leaky else integrate_and_fire(0.25, surrogate, detach)
    node.v_reset = None if soft else 0.0
    current, upstream = exact(6, 5, 31), exact(6, 5, 31, seed=1)
    (spikes, v, grad), expected = both(node, current, upstream, monkeypatch, calls)
    assert 0.1 < spikes.mean() < 0.9
    assert torch.equal(spikes, expected[0])
    assert torch.equal(v, expected[1])
    torch.testing.assert_close(grad, expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("surrogate", ["rect", "atan"])
def test_half_currents(half, surrogate, monkeypatch):
    current, upstream = exact(6, 3, 50).to(half), exact(6, 3, 50, seed=1).to(half)
    (spikes, v, grad), expected = both(lif(0.5, 0.25, surrogate), current, upstream, monkeypatch)
    assert (spikes.dtype, v.dtype, grad.dtype) == (half, torch.float32, half)
    assert torch.equal(spikes, expected[0])
    assert torch.equal(v, expected[1])
    torch.testing.assert_close(grad, expected[2], rtol=torch.finfo(half).eps, atol=1e-3)


@pytest.mark.parametrize(
    "layout",
    ["channels last", "one view of all steps", "every second neuron", "more than one block", "one step", "no neurons"],
)
def test_memory_layouts(layout, monkeypatch):
    current = {
        "channels last": lambda: exact(4, 2, 3, 5, 5).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        "one view of all steps": lambda: exact(2, 3, 5, 5).expand(4, 2, 3, 5, 5),
        "every second neuron": lambda: exact(4, 2, 10)[..., ::2],
        "more than one block": lambda: exact(3, 1000),
        "one step": lambda: exact(1, 7),
        "no neurons": lambda: exact(3, 0, 4),
    }[layout]()
    upstream = exact(*current.shape, seed=1)
    (spikes, v, grad), expected = both(lif(0.5, 0.25, "rect"), current, upstream, monkeypatch)
    assert torch.equal(spikes, expected[0])
    assert torch.equal(v, expected[1])
    torch.testing.assert_close(grad, expected[2], rtol=1e-5, atol=1e-6)
    assert spikes[0].stride() == expected[0][0].stride()


def test_gradients_that_do_not_have_the_currents_layout(monkeypatch):
    """A mean over time hands one gradient to all steps, a sum one number; a loss of the potential alone, none."""
    current = exact(4, 2, 3, 6, 6).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    weights = exact(2, 3, 6, 6, seed=1)
    losses = (
        lambda spikes, v: (spikes.mean(0) * weights).sum(),
        lambda spikes, v: spikes.sum(),
        lambda spikes, v: v.sum(),
        lambda spikes, v: spikes[-1].sum() + v.square().mean(),
    )
    for loss in losses:
        gradients = []
        for use in (True, False):
            monkeypatch.setattr(scan, "_uses_kernel", lambda current, use=use: use)
            x = current.clone().requires_grad_()
            potential = exact(2, 3, 6, 6, seed=2).requires_grad_()
            spikes, v = scan.lif_scan(x, potential, scan.Cell(0.5, 0.25, scan.Atan(0.25, 2.0)))
            loss(spikes, v).backward()
            gradients.append((x.grad, potential.grad))
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_without_a_graph_potentials_are_not_stored(monkeypatch):
    node, current = lif(0.5, 0.25, "rect"), exact(6, 40)
    monkeypatch.setattr(scan, "_uses_kernel", lambda current: True)
    with torch.no_grad():
        spikes = node(current)
    v = node.v
    reset(node)
    monkeypatch.setattr(scan, "_uses_kernel", lambda current: False)
    assert torch.equal(spikes, node(current))
    assert torch.equal(v, node.v)


def test_a_second_derivative_is_refused(monkeypatch):
    monkeypatch.setattr(scan, "_uses_kernel", lambda current: True)
    x = exact(3, 5).requires_grad_()
    spikes, v = scan.lif_scan(x, torch.zeros(5), scan.Cell(0.5, 0.25, scan.Atan(0.25, 2.0)))
    (gradient,) = torch.autograd.grad((spikes.sum() + v.square().sum()), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_shapes_and_layouts_are_known_without_running(monkeypatch):
    """What `torch.compile` is told of the operators is what they give."""
    constants = (0.5, 0.25, False)
    x = exact(4, 2, 3, 5, 5).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3).bfloat16()
    v = torch.zeros(2, 3, 5, 5)
    for store in (True, False):
        torch.library.opcheck(torch.ops.leanlight.lif_scan, (x, v, *constants, store), test_utils="test_faketensor")
    _, end, h = torch.ops.leanlight.lif_scan(x, v, *constants, True)
    backward = torch.ops.leanlight.lif_scan_backward
    for grad_v in (None, end):
        arguments = (torch.ones_like(x), grad_v, h, *constants, False, 1, 0.25, 2.0)
        torch.library.opcheck(backward, arguments, test_utils="test_faketensor")


def test_a_compiled_network_takes_each_scan_as_one_call(monkeypatch):
    monkeypatch.setattr(scan, "_uses_kernel", lambda current: True)
    network, image = SpikingConvNet(width=4, depth=2, image_size=8, time_steps=3), torch.rand(2, 1, 8, 8)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=backend, fullgraph=True)
    compiled(image).sum().backward()
    gradients = [weight.grad.clone() for weight in network.parameters()]
    network.zero_grad()
    network(image).sum().backward()
    for got, weight in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(got, weight.grad)
    assert len(graphs) == 1
