"""Tests of the device itself, for a process of its own: ``pytest tests/support/mock_gpu/checks.py``."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mock_gpu import COUNTS, DEVICE, NAME, DeviceTensor, register

register()


@pytest.fixture(autouse=True)
def counts():
    COUNTS.take()
    return COUNTS


def here(*shape):
    made = torch.randn(shape).to(DEVICE)
    COUNTS.take()
    return made


def twice(function, inputs):
    """A function's value, gradients and gradients of gradients."""
    value = function(*inputs)
    first = torch.autograd.grad(value.sin().sum(), inputs, create_graph=True)
    return [value, *first, *torch.autograd.grad(sum(x.pow(2).sum() for x in first), inputs)]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (F.conv2d, [(2, 4, 6, 6), (3, 4, 3, 3)]),
        (F.conv_transpose2d, [(2, 4, 6, 6), (4, 3, 3, 3)]),
        (lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1), [(2, 4, 6, 6), (4, 3, 3, 3)]),
        (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 6, 6), (4,), (4,)]),
        (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [(2, 4, 6, 6), (4,), (4,)]),
        (lambda x, w: F.linear(x, w).unsqueeze_(1).squeeze_(1), [(2, 4), (3, 4)]),
    ],
)
def test_values_gradients_and_their_gradients_are_those_of_the_cpu(function, shapes):
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    moved = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
    for expected, got in zip(twice(function, inputs), twice(function, moved), strict=True):
        assert got.device.type == NAME
        torch.testing.assert_close(got.detach().cpu(), expected.detach())


@pytest.mark.parametrize("convolution", [F.conv2d, F.conv_transpose2d])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_dispatch_mode_that_leaves_python_out_computes_too(convolution, mode):
    """As the rules of spikingjelly's operation counter, which `EnergyMeter` asks."""

    class Again(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Python)):
                seen.append(torch.ones(2, device=DEVICE).sum().item())
                return func(*args, **(kwargs or {}))

    x, w, seen = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), []
    with mode(), Again():
        got = convolution(x.to(DEVICE), w.to(DEVICE))
    torch.testing.assert_close(got.cpu(), convolution(x, w))
    assert seen
    assert set(seen) == {2.0}


@pytest.mark.parametrize(
    "meet",
    [
        lambda: here(2) + torch.ones(2),
        lambda: torch.ones(2) + here(2),
        lambda: torch.ones(2).add_(here()),
        lambda: torch.tensor(1.0).add_(here()),
        lambda: torch.stack([here(), torch.tensor(1.0)]),
        lambda: torch.ones(4)[here(2).long()],
        lambda: here(4).index_put_((here(2).long(),), torch.ones(2)),
        lambda: here(4).masked_fill_(torch.ones(4).bool(), 0),
        lambda: F.linear(here(2, 3), torch.ones(4, 3)),
        lambda: torch._foreach_add([here(2)], [torch.ones(2)]),
        lambda: torch.add(here(2), 1, out=torch.empty(2)),
    ],
)
def test_cpu_tensors_are_refused(meet):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        meet()


def test_numbers_and_indices_of_the_cpu_are_admitted_and_indices_are_copied(counts):
    x = here(4)
    torch.testing.assert_close((x * torch.tensor(2.0)).cpu(), x.cpu() * 2)
    counts.take()
    assert x[torch.tensor([0, 2])].shape == (2,)
    assert counts.take().copies.total() == 1


def test_generators_of_the_cpu_and_numpy_are_refused():
    with pytest.raises(RuntimeError, match=f"Expected a '{NAME}' device type for generator"):
        torch.randn(3, device=DEVICE, generator=torch.Generator())
    for read in (lambda x: x.numpy(), np.asarray):
        with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
            read(here(2))


@pytest.mark.parametrize(
    ("ask", "kernels", "copies", "async_copies", "waits"),
    [
        (lambda x: x * 2, 1, 0, 0, 0),
        (lambda x: x.view(2, 2).t()[0], 0, 0, 0, 0),
        (lambda x: torch.zeros(3, device=DEVICE), 1, 0, 0, 0),
        (lambda x: torch.arange(3, device=DEVICE), 1, 0, 0, 0),
        (lambda x: torch._foreach_mul([x, x], 2.0), 1, 0, 0, 0),
        (lambda x: torch.mul(x, 2, out=x), 1, 0, 0, 0),
        (lambda x: torch.tensor([1.0], device=DEVICE), 0, 1, 0, 0),
        (lambda x: torch.ones(3).to(DEVICE), 0, 1, 0, 0),
        (lambda x: torch.ones(3).pin_memory().to(DEVICE, non_blocking=True), 0, 0, 1, 0),
        (lambda x: x.copy_(torch.ones(4)), 0, 1, 0, 0),
        (lambda x: torch._foreach_copy_([x], [torch.ones(4)]), 1, 1, 0, 0),
        (lambda x: x.cpu(), 0, 0, 0, 1),
        (lambda x: x.to("cpu", non_blocking=True), 0, 0, 0, 0),
        (lambda x: x[0].item(), 0, 0, 0, 1),
        (lambda x: x.tolist(), 0, 0, 0, 1),
        (lambda x: bool(x[0] > 0), 1, 0, 0, 1),
        (lambda x: x.nonzero(), 1, 0, 0, 1),
        (lambda x: x[x > 0], 2, 0, 0, 1),
        (lambda x: torch.equal(x, x), 1, 0, 0, 1),
        (lambda x: torch.get_device_module(NAME).synchronize(), 0, 0, 0, 1),
    ],
)
def test_what_is_asked_is_counted(counts, ask, kernels, copies, async_copies, waits):
    ask(here(4))
    taken = counts.take()
    assert (taken.kernels, taken.copies.total(), taken.async_copies, taken.waits.total()) == (
        kernels,
        copies,
        async_copies,
        waits,
    )


def test_a_wait_names_the_line_of_the_suite(counts):
    from lit_modules.at_bptt.lowrank import LowRankHessian

    LowRankHessian().ranks(here(3).abs())
    ((line, times),) = counts.take().waits.items()
    assert line.startswith("lit_modules/at_bptt/lowrank.py:")
    assert times == 1


def test_an_out_of_another_size_takes_the_result_and_in_place_views_the_shape():
    assert torch.add(here(3), 1, out=torch.empty(0, device=DEVICE)).shape == (3,)
    assert here(3, 1).t_().shape == (1, 3)


def test_a_module_keeps_its_parameters_and_its_optimiser_steps_as_on_a_gpu(counts):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    first = network[0].weight
    twin = copy.deepcopy(network)
    assert network.to(DEVICE)[0].weight is first
    assert isinstance(first, DeviceTensor)
    for net in (network, twin):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(5, 3, device=net[0].weight.device)).pow(2).sum().backward()
            counts.take()
            optimizer.step()
            if net is network:
                assert counts.take().kernels <= 20  # for all parameters together; one by one they are 50
    assert network.cpu()[0].weight is first
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value)


def test_copies_stay_and_files_hold_cpu_tensors():
    network = nn.Linear(3, 4).to(DEVICE)
    twin = copy.deepcopy(network)
    assert isinstance(twin.weight, nn.Parameter)
    assert twin.weight.device.type == NAME
    with torch.no_grad():
        twin.weight.zero_()
    assert network.weight.abs().sum() > 0
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["weight"]) is torch.Tensor
    torch.testing.assert_close(loaded["weight"], network.weight.detach().cpu())


def test_many_networks_at_once_work():
    w, x = torch.randn(2, 3, 4, 3, 3), torch.randn(2, 5, 4, 6, 6)
    step = torch.func.vmap(torch.func.grad(lambda w, x: F.conv2d(x, w).pow(2).sum()))
    torch.testing.assert_close(step(w.to(DEVICE), x.to(DEVICE)).cpu(), step(w, x))


def test_what_is_drawn_is_what_the_cpu_draws():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(3, device=DEVICE).cpu(), expected)
