"""An outer step of AT-BPTT on a GPU with its inner steps as CUDA graphs and without: equal gradients, time, launches.

    python scripts/outer_step.py [--inner-steps 200] [--window 60] [--repeat 5] [--quick]

Prints JSON. Exit code 1 when the meta-gradients differ. CIFAR's shapes: ConvNet-3 of width 128, 10 images a class, real
batches of 1000, float32 without TF32. Needs PyTorch and this tree alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lit_modules.at_bptt import Adjoint, RandomWindow, TruncatedBPTT
from lit_modules.at_bptt.distillers import OuterStep, Task
from lit_modules.at_bptt.inner import SyntheticData
from lit_modules.nn import ConvNet


class Trial:
    """Outer steps of one distiller on random images; a seed stands for a fresh network, mini-batches and augmentation.

    Args:
        graph: record the inner steps.
        steps: T, inner steps.
        window: W, inner steps of the window, which ends at T.
        dtype: of everything.
        width: of the network.
    """

    def __init__(self, graph: bool, steps: int, window: int, dtype: torch.dtype, width: int = 128) -> None:
        device = torch.device("cuda")

        def network() -> ConvNet:
            return ConvNet(3, 10, width, 3, image_size=32, mean=0.0, std=1.0).to(dtype)

        selector = RandomWindow(window, min_start=steps - window)
        self.distiller = TruncatedBPTT(steps, selector, Adjoint(graph=graph))
        self.distiller.prepare(Task(network, 10, 10, 1, learn_labels=True, device=device))
        generator = torch.Generator().manual_seed(0)
        images, self.real = (torch.randn(n, 3, 32, 32, generator=generator).to(device, dtype) for n in (100, 1000))
        self.data = SyntheticData(images, torch.eye(10).repeat_interleave(10, 0).to(device, dtype))
        self.label = torch.arange(1000, device=device) % 10
        self.distiller.start_epoch(self.data, 0)

    def step(self, seed: int) -> OuterStep:
        """One outer step."""
        return self.distiller.outer_step(self.data, self.real, self.label, seed)

    def seconds(self, repeat: int) -> list[float]:
        """Of each of so many outer steps."""
        taken = []
        for seed in range(repeat):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            self.step(seed)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
        return taken


def difference(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((one - other).norm() / other.norm())


def compare(steps: int, window: int, dtype: torch.dtype, width: int) -> dict[str, float]:
    """How far graphs are from the ordinary engine over two networks, and the ordinary engine from itself."""
    ordinary, graph = (Trial(graph, steps, window, dtype, width) for graph in (False, True))
    rows = []
    for seed in range(2):
        a, b, again = ordinary.step(seed), graph.step(seed), ordinary.step(seed)
        assert a.labels is not None
        assert b.labels is not None
        rows.append(
            (difference(b.images, a.images), difference(b.labels, a.labels), difference(again.images, a.images))
        )
    images, labels, itself = (max(column) for column in zip(*rows, strict=True))
    return {"images": images, "labels": labels, "ordinary_repeated": itself}


def launches(trial: Trial) -> dict[str, int]:
    """Calls of one outer step that launch kernels or graphs, copy or wait, by name."""
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        trial.step(0)
        torch.cuda.synchronize()
    wanted = ("Launch", "Memcpy", "Synchronize")
    return {
        e.key: e.count for e in profile.key_averages() if e.key.startswith("cu") and any(w in e.key for w in wanted)
    }


def measure(graph: bool, steps: int, window: int, repeat: int, width: int) -> dict[str, Any]:
    """Time, launches and peak memory of outer steps."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trial = Trial(graph, steps, window, torch.float32, width)
    first, *seconds = trial.seconds(repeat + 1)
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "first_seconds": first,
        "peak_reserved_mb": torch.cuda.max_memory_reserved() / 2**20,
        "calls": launches(trial),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner-steps", type=int, default=200, help="T")
    parser.add_argument("--window", type=int, default=60, help="W")
    parser.add_argument("--repeat", type=int, default=5, help="timed outer steps")
    parser.add_argument("--quick", action="store_true", help="a small network and few steps, to see that it runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("outer_step.py: needs a CUDA GPU")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    width, steps, window = (16, 12, 6) if options.quick else (128, options.inner_steps, options.window)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "inner_steps": steps,
        "window": window,
        "width": width,
        # Adam divides gradients that are all but zero (biases before a norm) by their own size, and so makes rounding
        # visible: in float32 two orders of summation differ by a percent after ten steps. float64 tells what is equal.
        "float64": compare(steps, window, torch.float64, width),
        "float32": compare(steps, window, torch.float32, width),
    }
    print(json.dumps(report), flush=True)
    for name, graph in (("ordinary", False), ("graph", True)):
        report[name] = measure(graph, steps, window, options.repeat, width)
    report["speedup"] = report["ordinary"]["seconds"] / report["graph"]["seconds"]
    report["equal"] = max(report["float64"]["images"], report["float64"]["labels"]) < 1e-4
    print(json.dumps(report, indent=2))
    return 0 if report["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
