"""The fused neuron on a GPU: against the CPU, against spikingjelly, and its kernels against the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from leanlight.benchmarks.core import interleave, summarise
from leanlight.benchmarks.gpu.checks import Check, Found, at_least
from lit_modules.nn import integrate_and_fire, lif, reset, scan

_SURROGATES = ("rect", "rect_zero", "atan", "sigmoid")
_MARGIN = 2e-3  # potentials nearer than this to a point where a spike or a slope jumps are left out
_STEPS, _CANDIDATES = 16, 20_000


def checks(device: str = "cuda") -> Iterator[Check]:
    """All of them. device: where the fused scan runs; its counterpart runs on the CPU."""
    kinds: dict[str, Callable[..., Any]] = {
        "lif": lif,
        "lif_decay_input": partial(lif, decay_input=True),
        "if": integrate_and_fire,
    }
    for (kind, make), surrogate, soft, detach in product(kinds.items(), _SURROGATES, (False, True), (False, True)):
        build = partial(_neuron, make, soft, surrogate_gradient=surrogate, detach_reset=detach)
        name = f"scan/{kind}/{surrogate}/{'soft' if soft else 'hard'}_reset{'_detached' if detach else ''}"
        what = "fused neuron: spikes of the CPU, gradients within 1e-5 of the largest"
        yield Check("nn", name, what, partial(against_cpu, build, device))
    for layout in ("channels_last", "one_view", "from_a_potential"):
        what = f"fused neuron, {layout.replace('_', ' ')}: spikes of the CPU, gradients within 1e-5 of the largest"
        yield Check("nn", f"scan/layout/{layout}", what, partial(against_cpu, lif, device, layout))
    for kind, make in kinds.items():
        what = "under bf16 autocast: spikes of spikingjelly's plain float32 neuron, gradients within bf16 rounding"
        yield Check("nn", f"autocast/{kind}", what, partial(under_autocast, make, device))
    for surrogate in ("rect", "atan"):
        what = f"kernels of the scan ({surrogate}): no slower than the loop, T = 64, 131,072 neurons, both ways"
        yield Check("nn", f"kernel/{surrogate}", what, partial(kernel_time, surrogate, device), alone=True)


def _neuron(make: Callable[..., Any], soft: bool, **constants: Any) -> Any:
    node = make(**constants)
    if soft:
        node.v_reset = None
    return node


def separated_currents(node: Any, layout: str = "") -> Tensor:
    """Currents (T, N) in multiples of 2**-7 with which no potential comes near a point where a spike or slope jumps.

    bf16 holds them exactly.

    Args:
        node: whose potentials are meant.
        layout: how they will be shown: ``one_view``: the first of them T times, ``from_a_potential``: it once before.
    """
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(_STEPS, _CANDIDATES, generator=generator, dtype=torch.float64) * node.v_threshold
    current = (current * 2**7).round().clamp(-255, 255) / 2**7
    keep, enter = node._leak()
    potential, near = torch.zeros(_CANDIDATES, dtype=torch.float64), torch.zeros(_CANDIDATES, dtype=torch.bool)
    shown = current[:1].expand_as(current) if layout == "one_view" else current
    for x in [*(shown[:1] if layout == "from_a_potential" else ()), *shown]:
        h = keep * potential + enter * x
        for jump in (node.v_threshold, node.v_threshold - 0.5, node.v_threshold + 0.5, -0.5, 0.5):
            near |= (h - jump).abs() < _MARGIN
        potential = torch.where(h >= node.v_threshold, h - node.v_threshold if node.v_reset is None else 0.0, h)
    kept = current[:, ~near].float()
    return kept[:, : len(kept[0]) // 64 * 64]


def against_cpu(make: Callable[[], Any], device: str, layout: str = "") -> Found:
    """Spikes and gradients of a neuron on the device and on the CPU, for the same currents."""
    current = separated_currents(make(), layout)
    weight = torch.randn(current.shape, generator=torch.Generator().manual_seed(1))
    x, w = (value.view(_STEPS, -1, 4, 4, 4) for value in (current, weight))
    results = [_spikes_and_gradient(make(), x, w, place, layout) for place in ("cpu", device)]
    (spikes, gradient), (ours, our_gradient) = results
    wrong = (ours != spikes).float().mean().item()
    error = ((our_gradient - gradient).abs().max() / gradient.abs().max()).item()
    figures = {"spikes that differ": wrong, "firing rate": spikes.mean().item(), "neurons": float(current.shape[1])}
    return Found(error, 0.0, 1e-5, wrong == 0 and error <= 1e-5, "" if not wrong else "spikes differ", figures)


def _spikes_and_gradient(node: nn.Module, current: Tensor, weight: Tensor, device: str, layout: str) -> list[Tensor]:
    node.to(device)
    reset(node)
    x = current.to(device, copy=True)
    if layout == "channels_last":
        x = x.flatten(0, 1).to(memory_format=torch.channels_last).view(x.shape)
    elif layout == "one_view":  # a constant current: one step of memory shown T times
        x = x[0]
    x.requires_grad_()
    shown = x.expand(_STEPS, *x.shape) if layout == "one_view" else x
    if layout == "from_a_potential":
        node(shown[:1])
    spikes = node(shown)
    (spikes * weight.to(device)).sum().backward()
    assert x.grad is not None
    return [spikes.detach().cpu(), x.grad.cpu()]


def plain(node: Any) -> Any:
    """Spikingjelly's own neuron with the constants of a fused one."""
    constants = {
        "v_threshold": node.v_threshold,
        "v_reset": node.v_reset,
        "detach_reset": node.detach_reset,
        "step_mode": "m",
    }
    constants["surrogate_function"] = node.surrogate_function
    if isinstance(node, neuron.LIFNode):
        return neuron.LIFNode(tau=node.tau, decay_input=node.decay_input, **constants)
    return neuron.IFNode(**constants)


def under_autocast(make: Callable[[], Any], device: str) -> Found:
    """The fused neuron on bf16 currents under autocast, against spikingjelly's plain one in float32."""
    node = make()
    current = separated_currents(node).to(device)
    weight = torch.randn(current.shape, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    found = []
    for each, dtype in ((plain(node), torch.float32), (node, torch.bfloat16), (plain(node), torch.bfloat16)):
        x = current.to(dtype, copy=True).requires_grad_()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            spikes = each.to(device)(x)
        (spikes * weight).sum().backward()
        assert x.grad is not None
        found.append((spikes.detach(), x.grad.float()))
    (expected, gradient), (ours, our_gradient), (theirs, _) = found
    wrong = (ours.float() != expected).float().mean().item()
    error = ((our_gradient - gradient).abs().max() / gradient.abs().max()).item()
    figures = {"gradient error": error, "plain bf16: spikes that differ": (theirs != expected).float().mean().item()}
    typed = ours.dtype == torch.bfloat16
    why = "" if typed else f"expected spikes of the autocast type, got {ours.dtype}"
    return Found(wrong, 0.0, "none; gradients 2**-7", wrong == 0 and error <= 2**-7 and typed, why, figures)


def kernel_time(surrogate: Any, device: str, steps: int = 64, count: int = 2**17, rounds: int = 10) -> Found:
    """Forward and backward of the scan by its kernel and by the loop: microseconds and launched kernels."""
    node = lif(surrogate_gradient=surrogate).to(device)
    x = torch.randn(steps, count, device=device).mul_(0.3).requires_grad_()
    weight = torch.randn_like(x)

    def both_ways(kernel: bool) -> None:
        x.grad = None
        with scan.use_kernel(kernel):
            reset(node)
            node(x).backward(weight)

    calls = {"kernel": partial(both_ways, True), "loop": partial(both_ways, False)}
    seconds = interleave(calls, rounds)
    figures = {f"{name} (µs)": 1e6 * summarise(values, "s").value for name, values in seconds.items()}
    figures |= {f"{name} (launches)": float(launches(call)) for name, call in calls.items()}
    return at_least(figures["loop (µs)"] / figures["kernel (µs)"], 1.0, figures=figures)


def launches(call: Callable[[], object]) -> int:
    """Kernels and copies that a call starts on the GPU; 0 without one."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return 0
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    # As they come: making Python's events of a hundred thousand takes minutes.
    results = seen.profiler.kineto_results
    return sum(event.device_type() == torch.autograd.DeviceType.CUDA for event in results.events())
