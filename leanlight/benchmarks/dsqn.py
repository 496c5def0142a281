"""Benchmark of deep spiking Q-networks: the environment, an update by network and time steps, both together."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from datamodules import GameDataModule
from datamodules.games.atari import make_atari
from datamodules.games.play import Exploration, TrainingGame, TrainingGames, open_memory
from leanlight.benchmarks.core import (
    QUIET,
    Measurement,
    PaperStep,
    Target,
    interleave,
    one_thread,
    ratios,
    summarise,
)
from leanlight.benchmarks.gpu.checks import Check, Found, near
from leanlight.benchmarks.gpu.training import Runs, run_here
from lit_modules.dsqn import DQN, DSQN, DeepQLearning
from lit_modules.dsqn.reference import Published, StepByStep

_GAME = "breakout"
_SMALL: dict[str, Any] = {"history": 4, "frame_size": 84, "convolutions": [[8, 8, 8], [8, 4, 2]], "hidden": 16}


def run(quick: bool) -> Measurement:
    """Measure everything at the paper's shapes.

    Args:
        quick: tiny networks and few repetitions: figures without meaning.
    """
    measured = Measurement()
    layers: dict[str, Any] = _SMALL if quick else {}
    batch, rounds, steps = (4, 2, (2, 4)) if quick else (32, 10, (8, 64))
    measured.settings |= {"game": _GAME, "batch": batch, "time_steps": list(steps), "threads": torch.get_num_threads()}
    measured.settings["threads_of_updates"] = 1
    parts: dict[str, Callable[[], None]] = {
        "equality": lambda: check_equality(measured),
        "environment": lambda: measure_environment(50 if quick else 500, rounds, measured),
        "updates": lambda: measure_updates(layers, batch, steps, rounds, measured),
        "end to end": lambda: measure_training(layers, batch, steps, 3 if quick else 30, measured),
    }
    for name, part in parts.items():
        with Console(stderr=True).status(f"dsqn: {name}"):
            part()
    return measured


def _update(network: nn.Module, optimizer: torch.optim.Optimizer, state: Tensor, target: Tensor) -> None:
    """One gradient step towards `target` values, with the forward pass of the next states as Q-learning has it."""
    with torch.no_grad():
        network(state)
    optimizer.zero_grad(set_to_none=True)
    nn.functional.smooth_l1_loss(network(state), target).backward()
    optimizer.step()


def check_equality(measured: Measurement) -> None:
    """Values and gradients of our network and of its references, in float64."""
    torch.manual_seed(0)
    network = DSQN(4, **_SMALL, time_steps=8, init_gain=6.0).double()
    state, weight = torch.rand(3, 4, 84, 84, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def found(each: nn.Module) -> list[Tensor]:
        values = each(state)
        return [values, *torch.autograd.grad((values * weight).sum(), list(each.parameters()))]

    for name, reference in (("T separate calls", StepByStep), ("the published form", Published)):
        pairs = zip(found(network), found(reference(network).double()), strict=True)
        same = all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)
        measured.checks[f"{name}: the same values and gradients (float64)"] = same


def measure_environment(decisions: int, rounds: int, measured: Measurement) -> None:
    """A training game with its replay memory, beside the same wrapped emulator alone.

    Args:
        decisions: of a timed round.
        rounds: timed rounds of each.
        measured: takes the figures.
    """
    bare = make_atari(_GAME, training=True)
    bare.reset(seed=0)
    generator = np.random.default_rng(0)

    def play_bare() -> None:
        for _ in range(decisions):
            _, _, terminated, truncated, _ = bare.step(int(generator.integers(4)))
            if terminated or truncated:
                bare.reset()

    with tempfile.TemporaryDirectory() as folder:
        game = make_atari(_GAME, training=True)
        memory = open_memory(Path(folder), game, capacity=20_000)
        training = TrainingGames([TrainingGame(game, memory, Exploration(1.0, 1.0, 1), 0)])
        training.fill(10)

        def play_training() -> None:
            for _ in range(decisions):
                training.decide()

        seconds = interleave({"bare": play_bare, "training": play_training}, rounds)
    for name, values in seconds.items():
        frames = [4 * decisions / s for s in values]
        measured.figures[f"environment/{name}"] = summarise(frames, "frames/s", "higher")
    more = [100 * (ratio - 1) for ratio in ratios(seconds["training"], seconds["bare"])]
    measured.figures["environment/more_than_bare"] = summarise(more, "%")
    text = "a decision with exploration and replay memory takes at most 10 % more than the wrapped emulator alone"
    measured.targets.append(Target("environment/more_than_bare", 10.0, text))


@one_thread()
def measure_updates(
    layers: dict[str, Any], batch: int, steps: tuple[int, int], rounds: int, measured: Measurement
) -> None:
    """Seconds of an update on one thread: DQN, DSQN and its published form at two T, the longer T in separate calls.

    Args:
        layers: arguments of the networks that are not their default.
        batch: transitions of an update.
        steps: a small and a large T.
        rounds: timed updates of each.
        measured: takes the figures.
    """
    torch.manual_seed(0)
    state, target = torch.rand(batch, 4, 84, 84), torch.randn(batch, 4)
    few, many = steps
    spiking = functools.partial(DSQN, 4, **layers)
    networks: dict[str, nn.Module] = {"dqn": DQN(4, **layers)}
    for time_steps in steps:
        networks[f"dsqn_T{time_steps}"] = spiking(time_steps=time_steps)
        networks[f"published_T{time_steps}"] = Published(spiking(time_steps=time_steps))
    networks["separate_calls"] = StepByStep(spiking(time_steps=many))
    calls = {
        name: functools.partial(_update, network, torch.optim.Adam(network.parameters(), lr=1e-4), state, target)
        for name, network in networks.items()
    }
    seconds = interleave(calls, rounds)
    for name, values in seconds.items():
        measured.figures[f"update/{name}"] = summarise([1 / s for s in values], "updates/s", "higher")
    times = ratios(seconds["separate_calls"], seconds[f"dsqn_T{many}"])
    measured.figures["update/times_separate_calls"] = summarise(times, "x", "higher")
    measured.targets.append(
        Target("update/times_separate_calls", 2.0, f"an update at T = {many} is at least twice as fast as T calls")
    )
    for time_steps, bound in ((few, 3.0), (many, 8.0)):
        figure = f"update/dsqn_T{time_steps}_times_published"
        times = ratios(seconds[f"published_T{time_steps}"], seconds[f"dsqn_T{time_steps}"])
        measured.figures[figure] = summarise(times, "x", "higher")
        text = f"an update at T = {time_steps} is at least {bound:g} times as fast as the published form"
        measured.targets.append(Target(figure, bound, text))


class _Watch(pl.Callback):
    """Seconds of each batch: decisions, sampling, update, callbacks."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def measure_training(
    layers: dict[str, Any], batch: int, steps: tuple[int, int], updates: int, measured: Measurement
) -> None:
    """Frames a second of training under Lightning: four decisions (each of a greedy agent) and one update a batch.

    Args:
        layers: arguments of the networks that are not their default.
        batch: transitions of an update.
        steps: the first is T of the spiking network.
        updates: timed training batches.
        measured: takes the figures.
    """
    spiking = functools.partial(DSQN, **layers, time_steps=steps[0])
    makers: dict[str, tuple[Callable[[int], nn.Module], int]] = {
        "dqn": (functools.partial(DQN, **layers), 1),
        f"dsqn_T{steps[0]}": (spiking, 1),
        f"dsqn_T{steps[0]}_4_games": (spiking, 4),
    }
    for name, (make, games) in makers.items():
        watch = _Watch()
        memory: dict[str, Any] = {"replay_size": 2000, "replay_start": 200, "slack": 2000}
        data = GameDataModule(_GAME, batch, training_games=games, **memory, epsilon_start=0.1, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                max_steps=updates + 3, limit_val_batches=0, default_root_dir=folder, callbacks=[watch], **QUIET
            )
            trainer.fit(DeepQLearning(make), datamodule=data)
        frames = [16 / s for s in watch.seconds[2:]]
        measured.figures[f"end_to_end/{name}"] = summarise(frames, "frames/s", "higher")


def paper_steps(where: str, quick: bool = False) -> dict[str, Callable[[], PaperStep]]:
    """An update of DSQN at T = 64 and of DQN with 32 transitions of 84x84 pixels."""

    batch = 2 if quick else 32

    def make(network: Callable[[], nn.Module]) -> PaperStep:
        torch.manual_seed(0)
        built = network().to(where)
        state, target = torch.rand(batch, 4, 84, 84, device=where), torch.randn(batch, 4, device=where)
        optimizer = torch.optim.Adam(built.parameters(), lr=1e-4)
        return PaperStep(functools.partial(_update, built, optimizer, state, target), batch, built.compile, mixed=False)

    spiking = functools.partial(DSQN, 4, time_steps=64)
    return {"dsqn_T64": functools.partial(make, spiking), "dqn": functools.partial(make, functools.partial(DQN, 4))}


def gpu_checks(folder: Path, where: str) -> Iterator[Check]:
    """What only this method promises on a GPU."""
    what = "a converted DQN plays on the GPU, with the score of the CPU within 0.3"
    yield Check("dsqn", "converted", what, functools.partial(converted, folder, where))


def converted(folder: Path, where: str) -> Found:
    """Train a DQN where it is to be converted; test the spiking network there and on the CPU."""
    dqn = Runs(["dsqn/catch_small__dqn"], folder / "dqn", where, epochs=4).on_device()
    converted = Runs(["dsqn/catch_small__converted"], folder / "converted", where)
    short = [f"--model.init_args.source_checkpoint={dqn.folder / 'checkpoints' / 'last.ckpt'}"]
    short += ["--model.init_args.states=500", "--data.init_args.test_episodes=100"]
    scores = []
    for name, device in (("reference", "cpu"), ("device", where)):
        options = ["test", "--config", *converted.config, *converted.options(name, device), *short]
        scores.append(run_here(options).metrics["test/score"])
    return near(scores[1], scores[0], 0.3)
