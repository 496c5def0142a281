"""Training glue of deep Q-learning: hooks, optimisers, logging; evaluation in games, and conversion."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from rich.progress import track
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from leanlight.contracts import (
    Allows,
    EpisodeBatch,
    GameData,
    MediaItem,
    PrimaryMetric,
    Progress,
    Split,
    TrainingStep,
    Transition,
    UserError,
    data_of,
    derived_seed,
    isolated_rng,
    run_seed,
)
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, PositiveShare, TimeSteps
from lit_modules import optim
from lit_modules.dsqn.conversion import ConvertedDQN, Decoding, Node, convert, record
from lit_modules.dsqn.evaluation import GameEvaluation, scaled, summary
from lit_modules.dsqn.export import export_agent
from lit_modules.dsqn.floors import FixedValues, Policy, constant_score
from lit_modules.dsqn.learning import (
    Loss,
    Rule,
    chosen,
    convergent_loss,
    next_values,
    td_loss,
    td_target,
    update_target,
)
from lit_modules.dsqn.pictures import noise_curves, pictures
from lit_modules.frozen import Frozen, frozen_module
from lit_modules.history import History
from lit_modules.hparams import save_hparams
from lit_modules.nn.checks import device_of, first_line
from lit_modules.step_log import log_step

QNetworkFactory = Callable[[int], nn.Module]  # number of actions → network from states in [0, 1] to values

_ATARI_ACTIONS = 18  # the most a game has, for an estimate made before it is loaded
_PIPELINE = "leanlight run dsqn/pipelines/catch_small__converted trains one first"


class GameAgent(LightningModule):
    """An agent that is measured by playing whole games: what trained, converted and fixed ones share.

    Args:
        input_noise: standard deviations of Gaussian noise on the pixels, in [0, 1], for test episodes played again.
        weight_noise: standard deviations of a random relative change of every weight, for test episodes played again.
    """

    allows = Allows(precision=("32-true",), why="competing actions have values that half precision cannot tell apart")
    network: nn.Module

    def __init__(
        self, input_noise: Sequence[NonNegativeFloat] = (), weight_noise: Sequence[NonNegativeFloat] = ()
    ) -> None:
        super().__init__()
        for name, values in (("input_noise", input_noise), ("weight_noise", weight_noise)):
            if any(value <= 0 for value in values):
                raise UserError(f"{name}: expected positive numbers, got {list(values)}")
        self.shape: tuple[int, ...] = ()
        self.actions: tuple[str, ...] = ()
        self._evaluation = GameEvaluation(input_noise, weight_noise)
        self._history = History()

    @property
    def games(self) -> GameData:
        """The DataModule."""
        return data_of(self, GameData)

    def setup(self, stage: str) -> None:
        """Take shape and actions from the data."""
        meta = self.games.meta
        self.shape, self.actions = meta.shape, meta.actions

    def forward(self, state: Tensor) -> Tensor:
        """States (N, K, H, W) in [0, 1] → values (N, A)."""
        return self.network(state)

    @torch.no_grad()
    def values(self, state: Tensor) -> Tensor:
        """States (N, K, H, W) uint8, on any device → values (N, A); what plays games."""
        return self(scaled(state.to(self.device)))

    # ---- evaluation: a batch is some episodes ----

    def on_validation_epoch_start(self) -> None:
        self._evaluation.start()

    def on_test_epoch_start(self) -> None:
        self._evaluation.start()

    def validation_step(self, batch: EpisodeBatch, batch_idx: int) -> dict[str, int]:
        return self._play(batch)

    def test_step(self, batch: EpisodeBatch, batch_idx: int) -> dict[str, int]:
        return self._play(batch)

    def _play(self, batch: EpisodeBatch) -> dict[str, int]:
        """Play the batch; the returned number of inputs is what figures for one input divide by."""
        return {"inputs": self._evaluation.play(self.games, batch.seed.tolist(), self.values)}

    def on_validation_epoch_end(self) -> None:
        values = self._log_means("val", self._figures())
        if not self.trainer.sanity_checking:
            self._history.add(frames=float(self.games.frames), **values)

    def on_test_epoch_end(self) -> None:
        figures = self._log_means("test", self._figures())
        # Losses come from the means: a process whose own episodes leave one without a meaning would lack it.
        figures |= self._log_means("test", self._evaluation.play_under_noise(self.games, self.network))
        losses = self._evaluation.noise_losses(figures, self.games.meta)
        self.log_dict({f"test/{name}": value for name, value in losses.items()})

    def _figures(self) -> dict[str, float]:
        """What this process's episodes of an evaluation gave."""
        return summary(self._evaluation.episodes, self.games.meta)

    def _log_means(self, split: Split, values: dict[str, float]) -> dict[str, float]:
        """Log and return means over the processes, which play equally many episodes or one less."""
        tensor = torch.tensor(list(values.values()), device=self.device)
        mean = cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op="mean"))
        means = dict(zip(values, mean.tolist(), strict=True))
        self.log_dict({f"{split}/{name}": value for name, value in means.items()})
        return means

    # ---- checkpoints ----

    def _build(self, num_actions: int) -> None:
        """Make the networks that need to know no more: the number of actions is the game's, or a checkpoint's."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["q_learning"] = {
            "actions": list(self.actions),
            "shape": list(self.shape),
            "history": self._history.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["q_learning"]
        self.actions, self.shape = tuple(state["actions"]), tuple(state["shape"])
        if len(state["history"].get("frames", [])) >= len(self._history["frames"]):
            # Else: the best checkpoint is tested after a training that went on; its curves are kept whole.
            self._history.load_state_dict(state["history"])
        if not hasattr(self, "network"):
            self._build(len(self.actions))

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/score", "max")

    def progress(self) -> Progress:
        return Progress("frames", self.games.frames if self._trainer is not None else 0)

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """val, test: an episode as animation, scores; over training: scores, values, exploration; test: noise."""
        if split == "train":
            return {}
        return pictures(self._evaluation, self._history) | (noise_curves(self._evaluation) if split == "test" else {})

    def export(self, directory: Path) -> list[Path]:
        """Write the agent for plain PyTorch: see `lit_modules.dsqn.export`."""
        return export_agent(self.network, self.shape, self.actions, Path(directory))


class DeepQLearning(GameAgent):
    """Deep Q-learning with replay and a target network (Mnih et al. 2015) for ordinary and spiking networks.

    Loss: Huber(y - Q(s, a)) with ``y = r + γ max_a' Q⁻(s', a')``. One training batch is some decisions of the agent and
    one update; an epoch is what lies between two evaluations.

    Args:
        network: makes the network for a number of actions (`lit_modules.dsqn`): states in [0, 1] → values.
        optimizer: makes the optimiser; Adam with learning rate 1e-4 by default, as in the paper.
        lr_scheduler: makes the schedule of the learning rate, stepped each epoch; none by default.
        rule: ``dqn``; ``double``: y's action is the online network's; ``convergent``: Wang and Ueda 2022, unverified.
        loss: of y - Q(s, a): ``huber`` with δ = 1 (published code) or ``mse``.
        target_period: updates between two moves of the target network; 2,500 in the paper (10,000 decisions at 4 each).
        target_rate: how far the target network moves towards the online one, in (0, 1]; 1, a copy, in the paper.
        input_noise: standard deviations of Gaussian noise on the pixels, in [0, 1], for test episodes played again.
        weight_noise: standard deviations of a random relative change of every weight, for test episodes played again.
    """

    def __init__(
        self,
        network: QNetworkFactory,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        rule: Rule = "dqn",
        loss: Loss = "huber",
        target_period: PositiveInt = 2_500,
        target_rate: PositiveShare = 1.0,
        input_noise: Sequence[NonNegativeFloat] = (),
        weight_noise: Sequence[NonNegativeFloat] = (),
    ) -> None:
        super().__init__(input_noise, weight_noise)
        if target_period < 1:
            raise UserError(f"target_period: expected at least 1 update, got {target_period}")
        if not 0 < target_rate <= 1:
            raise UserError(f"target_rate: expected a number in (0, 1], got {target_rate}")
        save_hparams(self)
        self.make_network, self.make_optimizer, self.make_scheduler = network, optimizer, lr_scheduler
        self.rule, self.loss, self.target_period, self.target_rate = rule, loss, target_period, target_rate

    def _build(self, num_actions: int) -> None:
        self.network = self.make_network(num_actions)
        self.target = copy.deepcopy(self.network).requires_grad_(False)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not hasattr(self, "network"):
            self._build(len(self.actions))
        with isolated_rng(), torch.no_grad():
            try:
                values = self.network(torch.zeros(1, *self.shape, device=device_of(self.network)))
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"network.init_args: expected a network for states of shape {self.shape}, that is "
                    f"history {self.shape[0]} and frame_size {self.shape[-1]}; got {first_line(error)}"
                ) from error
        if values.shape != (1, len(self.actions)):
            raise UserError(
                f"network: expected {len(self.actions)} values, one an action of the game; "
                f"got {tuple(values.shape[1:])}"
            )
        self.games.follow(self.values)

    def compile_networks(self, **options: Any) -> None:
        self.network.compile(**options)
        self.target.compile(**options)

    def configure_optimizers(self) -> Any:
        make = self.make_optimizer or functools.partial(torch.optim.Adam, lr=1e-4)
        return optim.configure(self.network.parameters(), make, self.make_scheduler)

    def training_parts(self, shape: tuple[int, ...]) -> TrainingStep:
        if not hasattr(self, "network"):
            self._build(len(self.actions) or _ATARI_ACTIONS)
        return TrainingStep(self.network, shape, optim.optimizer_of(self.configure_optimizers()))

    def training_step(self, batch: Transition, batch_idx: int) -> Tensor:
        if self.global_step % self.target_period == 0:
            update_target(self.target, self.network, self.target_rate if self.global_step else 1.0)
        value = chosen(self(scaled(batch.state)), batch.action)
        loss = self._loss(batch, value).mean()
        values: dict[str, Tensor | float] = {"train/loss": loss, "train/q": value.mean()}
        values["train/epsilon"] = self.games.epsilon
        if (score := self.games.recent_score) is not None:
            values["train/score"] = score
        log_step(self, values, len(batch))
        return loss

    def _loss(self, batch: Transition, value: Tensor) -> Tensor:
        """Loss of each transition, (N,)."""
        next_state = scaled(batch.next_state)
        with torch.no_grad():
            online = self(next_state) if self.rule == "double" else None
            future = next_values(self.target(next_state), online)
        target = td_target(batch.reward, batch.discount, batch.terminal, future)
        if self.rule == "convergent":
            residual = td_target(batch.reward, batch.discount, batch.terminal, next_values(self(next_state)))
            return convergent_loss(value, target, residual, self.loss)
        return td_loss(value, target, self.loss)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking:
            self._history.add(epsilon=self.games.epsilon)
            if (score := self.games.recent_score) is not None:
                self._history.add(train_score=score)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if curve := self._history["score"]:
            self.log("test/curve_mean", sum(curve) / len(curve))  # area under the curve of evaluations


class FixedPolicy(GameAgent):
    """A policy that looks at nothing: the floor of a game, above which an agent has learned. It trains nothing.

    Args:
        policy: ``constant``: of all actions the one that scores most in training episodes; ``random``: each as likely.
        episodes: training episodes that are played with each action to choose one.
        input_noise: standard deviations of Gaussian noise on the pixels, in [0, 1], for test episodes played again.
        weight_noise: standard deviations of a random relative change of every weight, for test episodes played again.
    """

    def __init__(
        self,
        policy: Policy = "constant",
        episodes: PositiveInt = 30,
        input_noise: Sequence[NonNegativeFloat] = (),
        weight_noise: Sequence[NonNegativeFloat] = (),
    ) -> None:
        super().__init__(input_noise, weight_noise)
        save_hparams(self)
        self.policy, self.episodes = policy, episodes
        self.automatic_optimization = False

    def _build(self, num_actions: int) -> None:
        self.network = FixedValues(num_actions, self.policy)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not hasattr(self, "network"):
            self._build(len(self.actions))
        self.games.follow(self.values)

    def configure_optimizers(self) -> None:
        """There is nothing to train."""

    def training_step(self, batch: Transition, batch_idx: int) -> None:
        """Nothing: a batch passes so that the policy is validated and kept like any agent."""

    def on_train_start(self) -> None:
        """Choose the constant action; its episodes are a function of the seed, and not those of validation or test."""
        network = cast(FixedValues, self.network)
        if self.policy == "constant" and not network.values.any():
            number = len(self.actions)
            seeds = [derived_seed(run_seed(), "constant", episode) % 2**31 for episode in range(self.episodes)]
            actions = track(
                range(number), "trying each action", transient=True, disable=not self.trainer.is_global_zero
            )
            scores = [constant_score(self.games, number, action, seeds) for action in actions]
            network.always = max(range(number), key=scores.__getitem__)


class Conversion(GameAgent):
    """A trained DQN converted to a spiking network (Tan et al. 2021): it is measured; there is nothing to train.

    Args:
        source_checkpoint: checkpoint of a `DeepQLearning` run with a `lit_modules.dsqn.DQN`.
        time_steps: T, steps of a decision; 500 in the published code.
        percentile: of a layer's outputs, its scale λ in the normalisation; in (0, 100], 99.9 in the paper.
        decoding: ``robust``: a value is the number of output spikes plus the potential left (paper); ``spikes``: alone.
        node: ``if`` (paper) or ``lif``, which leaks: a control that should fail.
        tau: time constant of ``lif`` in steps.
        states: how many states are recorded in play for the normalisation; 15,000 in the paper.
        layer_lag: every layer receives what the one before it gave a step earlier, as in the published simulator.
        input_noise: standard deviations of Gaussian noise on the pixels, in [0, 1], for test episodes played again.
        weight_noise: standard deviations of a random relative change of every weight, for test episodes played again.
    """

    def __init__(
        self,
        source_checkpoint: Path | None = None,
        time_steps: TimeSteps = 500,
        percentile: PositiveFloat = 99.9,
        decoding: Decoding = "robust",
        node: Node = "if",
        tau: PositiveFloat = 100.0,
        states: PositiveInt = 15_000,
        layer_lag: bool = True,
        input_noise: Sequence[NonNegativeFloat] = (),
        weight_noise: Sequence[NonNegativeFloat] = (),
    ) -> None:
        super().__init__(input_noise, weight_noise)
        for name, value in (("time_steps", time_steps), ("states", states)):
            if value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        save_hparams(self)
        self.source_checkpoint, self.time_steps, self.percentile = source_checkpoint, time_steps, percentile
        self.decoding, self.node, self.tau, self.states = decoding, node, tau, states
        self.layer_lag = layer_lag
        self._source: Frozen[nn.Module] | None = None
        self._agreement: dict[str, list[int]] = {"robust": [], "spikes": []}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            raise UserError(f"leanlight fit: a converted network is not trained; use leanlight test; {_PIPELINE}")
        if self._source is None:
            source = frozen_module(DeepQLearning, self.source_checkpoint, "source_checkpoint", _PIPELINE)
            if (source.shape, source.actions) != (self.shape, self.actions):
                raise UserError(
                    f"source_checkpoint: expected one for states {self.shape} and actions {self.actions}, those of the "
                    f"game; got {source.shape} and {source.actions}"
                )
            with isolated_rng(0):
                states = record(self.games, source.values, self.states)
            options = (self.time_steps, self.percentile, self.decoding, self.node, self.tau, self.layer_lag)
            self.network = convert(cast(Any, source.network), scaled(states), *options).to(self.device)
            self._source = Frozen(source.network)

    @torch.no_grad()
    def values(self, state: Tensor) -> Tensor:
        network = cast(ConvertedDQN, self.network)
        state = scaled(state.to(self.device))
        spikes, potential = network.simulate(state)
        assert self._source is not None
        # EnergyMeter counts what a decision executes by a dispatch mode. The DQN it is compared with is no part of it.
        with _disable_current_modes():
            preferred = self._source.to(self.device)(state).argmax(1)
        for name, values in (("robust", spikes + potential), ("spikes", spikes)):
            self._agreement[name] += (values.argmax(1) == preferred).int().tolist()
        return network.decode(spikes, potential)

    def _figures(self) -> dict[str, float]:
        """With the shares of decisions in which the DQN would have taken the same action."""
        agreement = {f"agreement_{name}": sum(same) / len(same) for name, same in self._agreement.items() if same}
        self._agreement = {"robust": [], "spikes": []}
        return super()._figures() | agreement
