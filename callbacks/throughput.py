"""How fast training runs, how much time passes outside the step, and how much memory it takes."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.common import items_in, writes_files
from callbacks.sending import send_figures
from leanlight.contracts import atomic_write

_WAITING = 256  # step times still on their way from a GPU; older ones have long arrived


class ThroughputMonitor(Callback):
    """Measures training speed and memory and writes the newest figures to ``<run folder>/throughput.json``.

    The figures go there and to dashboards, not into metrics.csv: they differ from run to run, and metrics.csv of a
    resumed run equals that of an undisturbed one. Lightning's own ThroughputMonitor sends to every logger and waits
    for the GPU in each step, so it does not serve here. Put this callback first: callbacks before it count as part
    of the step.

    Figures (of the newest epoch unless said otherwise): ``train/samples_per_s`` over all processes,
    ``train/steps_per_s`` (batches of one process), ``train/outside_share`` (share of training time between the end of
    one step and the start of the next: data and callbacks; on a GPU by its own clock), ``peak_rss_mb`` and
    ``peak_cuda_mb`` (MB of 2**20 bytes, this process since it started), ``samples_seen`` and ``train_wall_s`` (whole
    run, across resumes). Validation is no part of the times.

    Attributes:
        samples_seen: items trained on, over all processes, counting repeats.
        train_wall_s: seconds of training without validation, and without what a kill lost after the last checkpoint.
    """

    def __init__(self) -> None:
        self.samples_seen = 0
        self.train_wall_s = 0.0
        self._clock = _Clock(torch.device("cpu"))
        self._running_since: float | None = None
        self._goes_on = False  # what is loaded is where training goes on, not what is tested
        self._start_epoch()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._goes_on = stage == "fit"

    @property
    def peak_rss_mb(self) -> float:
        """Largest resident memory of this process so far, in MB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

    @property
    def peak_cuda_mb(self) -> float | None:
        """Largest GPU memory in use by this process so far, in MB; None without a GPU."""
        return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None

    def _start_epoch(self) -> None:
        self._epoch_wall = 0.0
        self._epoch_samples = self._epoch_steps = 0
        self._clock.inside = 0.0

    def _stop_watch(self) -> None:
        if self._running_since is not None:
            passed = time.perf_counter() - self._running_since
            self._epoch_wall += passed
            self.train_wall_s += passed
            self._running_since = None

    def _start_watch(self) -> None:
        self._running_since = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = _Clock(trainer.strategy.root_device)
        self._start_epoch()
        self._start_watch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._clock.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._clock.stop()
        samples = items_in(batch) * trainer.world_size
        self.samples_seen += samples
        self._epoch_samples += samples
        self._epoch_steps += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_watch()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._start_watch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        inside = self._clock.settle()
        self._stop_watch()
        if self._epoch_steps and writes_files(trainer):
            self._publish(trainer, self.figures(inside))
        self._start_epoch()
        self._start_watch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_watch()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_watch()

    def figures(self, inside: float) -> dict[str, float | int | None]:
        """Figures of the epoch that ends. inside: seconds of it spent in steps."""
        wall = self._epoch_wall
        return {
            "train/samples_per_s": self._epoch_samples / wall,
            "train/steps_per_s": self._epoch_steps / wall,
            "train/outside_share": max(0.0, 1.0 - inside / wall),
            "peak_rss_mb": self.peak_rss_mb,
            "peak_cuda_mb": self.peak_cuda_mb,
            "samples_seen": self.samples_seen,
            "train_wall_s": self.train_wall_s,
        }

    def _publish(self, trainer: Trainer, figures: dict[str, float | int | None]) -> None:
        text = json.dumps({"epoch": trainer.current_epoch, **figures}, indent=2)
        atomic_write(Path(trainer.default_root_dir) / "throughput.json", text + "\n")
        send_figures(trainer.loggers, {k: v for k, v in figures.items() if v is not None}, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return {"samples_seen": self.samples_seen, "train_wall_s": self.train_wall_s + running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The best checkpoint, tested after a training that went on, knows of a part of it alone.
        if self._goes_on or state_dict["train_wall_s"] > self.train_wall_s:
            self.samples_seen = state_dict["samples_seen"]
            self.train_wall_s = state_dict["train_wall_s"]


class _Clock:
    """Sums the time between `start` and `stop`; on a GPU by events, so that nobody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.inside = 0.0
        self._cuda = device.type == "cuda"
        self._begun: Any = None
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._begun = self._now()

    def stop(self) -> None:
        if not self._cuda:
            self.inside += time.perf_counter() - self._begun
            return
        self._events.append((self._begun, self._now()))
        if len(self._events) > _WAITING:
            self._collect()

    def settle(self) -> float:
        """Seconds inside since `inside` was last set to zero."""
        while self._events:
            self._collect()
        return self.inside

    def _collect(self) -> None:
        begin, end = self._events.popleft()
        end.synchronize()
        self.inside += begin.elapsed_time(end) / 1000
