"""Training steps at the paper's shapes: steps a second, memory, and what bf16 and a compiler make of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch

from leanlight.benchmarks.core import PaperStep, interleave, ratios
from leanlight.benchmarks.gpu.checks import Check, Found, NotRun, at_least
from leanlight.benchmarks.gpu.neurons import launches

_LONG = 0.5  # seconds of a step from which it is repeated less often
_BF16_SPEED = 0.9


def checks(method: str, benchmark: ModuleType, device: str = "cuda") -> Iterator[Check]:
    """Of every step that the method's benchmark offers. benchmark: its module, with ``paper_steps(device)``."""
    makers = getattr(benchmark, "paper_steps", None)
    if makers is None:
        yield Check(method, "speed", "training step at the paper's shapes", _no_steps, alone=True)
        return
    for name, make in makers(device).items():
        yield Check(method, f"speed/{name}", "training step at the paper's shapes", partial(plain, make), alone=True)
        what = f"bf16 autocast: at least {_BF16_SPEED} of the float32 speed"
        yield Check(method, f"speed/{name}/bf16", what, partial(mixed, make, device), alone=True)
        what = "compiled: times the speed without the compiler"
        yield Check(method, f"speed/{name}/compile", what, partial(compiled, make), alone=True)


def _no_steps() -> Found:
    raise NotRun("the method's benchmark offers no paper_steps")


def measure(step: PaperStep) -> dict[str, float]:
    """Speed, memory and launches of a step."""
    for _ in range(2):
        step.run()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    step.run()
    if cuda:
        torch.cuda.synchronize()
    once = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    seconds = statistics.median(interleave({"step": step.run}, 3 if once > _LONG else 10, warmup=0)["step"])
    figures = {"steps/s": 1 / seconds, "samples/s": step.samples / seconds}
    counted = float(launches(step.run)) if once < _LONG else float("nan")
    return figures | {"peak GPU memory (MiB)": peak, "launches": counted}


def plain(make: Callable[[], PaperStep]) -> Found:
    """A mere fact: passed where the step runs at all."""
    figures = measure(make())
    return Found(figures["steps/s"], None, None, True, "", figures)


def mixed(make: Callable[[], PaperStep], device: str) -> Found:
    """The step with and without autocast, in turn."""
    step = make()
    if not step.mixed:
        raise NotRun("the method refuses bf16-mixed")

    def in_bf16() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            step.run()

    figures = measure(PaperStep(in_bf16, step.samples))
    return at_least(_times_faster(step.run, in_bf16, figures), _BF16_SPEED, figures=figures)


def compiled(make: Callable[[], PaperStep]) -> Found:
    """The step with its network compiled, and as it is, in turn: a mere fact, as in `plain`."""
    step, fast = make(), make()
    if fast.compile is None:
        raise NotRun("its step is not compiled")
    begin = time.perf_counter()
    fast.compile()
    fast.run()
    once = time.perf_counter() - begin
    figures = measure(fast) | {"compile once (s)": once}
    ratio = _times_faster(step.run, fast.run, figures)
    return Found(ratio, None, None, True, "", figures)


def _times_faster(before: Callable[[], object], after: Callable[[], object], figures: dict[str, float]) -> float:
    long = 1 / figures["steps/s"] > _LONG
    seconds = interleave({"before": before, "after": after}, 2 if long else 7, warmup=1)
    return statistics.median(ratios(seconds["before"], seconds["after"]))
