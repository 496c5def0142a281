"""Training glue of deep Q-learning: hooks, targets, evaluation in games, logging, pictures, export, conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from leanlight.contracts import (
    Animation,
    Curve,
    Episode,
    EpisodeBatch,
    GameData,
    Histogram,
    MediaItem,
    PrimaryMetric,
    Progress,
    QFunction,
    Split,
    Transition,
    UserError,
    data_of,
    isolated_rng,
)
from lit_modules.dsqn.conversion import ConvertedDQN, Decoding, Node, convert
from lit_modules.dsqn.evaluation import disturbed_weights, noisy, summary
from lit_modules.dsqn.export import export_agent
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
from lit_modules.hparams import save_hparams
from lit_modules.nn.checks import first_line

AgentFactory = Callable[[int], nn.Module]  # number of actions → network from states in [0, 1] to values

_PICTURES = 300  # of the episode that is drawn
_TOGETHER = 10  # episodes recorded side by side
_PIPELINE = "leanlight run dsqn/pipelines/catch_small__converted trains one first"


class Player(LightningModule):
    """What a trained and a converted agent share: playing evaluation episodes, figures and pictures of them, export.

    input_noise: standard deviations of Gaussian noise on the pixels, on the scale [0, 1], under which test episodes are
    played again. weight_noise: standard deviations of a random relative change of every weight, alike.
    """

    network: nn.Module

    def __init__(self, input_noise: Sequence[float] = (), weight_noise: Sequence[float] = ()) -> None:
        super().__init__()
        for name, values in (("input_noise", input_noise), ("weight_noise", weight_noise)):
            if any(value <= 0 for value in values):
                raise UserError(f"model.init_args.{name}: expected positive numbers, got {list(values)}")
        self.input_noise, self.weight_noise = list(input_noise), list(weight_noise)
        self.shape: tuple[int, ...] = ()
        self.actions: tuple[str, ...] = ()
        self._episodes: list[Episode] = []
        self._seeds: list[int] = []
        self._history: dict[str, list[float]] = {}
        self._disturbed: dict[str, list[float]] = {}

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
        return self(_scaled(state.to(self.device)))

    # ---- evaluation: a batch is some episodes ----

    def on_validation_epoch_start(self) -> None:
        self._episodes, self._seeds = [], []

    def on_test_epoch_start(self) -> None:
        self._episodes, self._seeds = [], []

    def validation_step(self, batch: EpisodeBatch, batch_idx: int) -> dict[str, int]:
        return self._play(batch)

    def test_step(self, batch: EpisodeBatch, batch_idx: int) -> dict[str, int]:
        return self._play(batch)

    def _play(self, batch: EpisodeBatch) -> dict[str, int]:
        """Play the batch; the returned number of inputs is what figures for one input divide by."""
        seeds = batch.seed.tolist()
        episodes = self.games.play(seeds, self.values, 0 if self._episodes else _PICTURES)
        self._episodes += episodes
        self._seeds += seeds
        return {"inputs": sum(episode.greedy for episode in episodes)}

    def _publish(self, split: Split) -> None:
        values = self._all(summary(self._episodes, self.games.meta))
        self.log_dict({f"{split}/{name}": value for name, value in values.items()})
        if split == "val" and not self.trainer.sanity_checking:
            for name, value in {"frames": float(self.games.frames), **values}.items():
                self._history.setdefault(name, []).append(value)

    def _all(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the processes, which play equally many episodes or one less."""
        names = list(values)
        tensor = torch.tensor([values[name] for name in names], device=self.device)
        mean = cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op="mean"))
        return dict(zip(names, mean.tolist(), strict=True))

    def on_validation_epoch_end(self) -> None:
        self._publish("val")

    def on_test_epoch_end(self) -> None:
        self._publish("test")
        clean = sum(episode.score for episode in self._episodes) / len(self._episodes)
        self._disturbed = {"clean": [clean]}
        for kind, levels in (("input", self.input_noise), ("weight", self.weight_noise)):
            scores = [self._score_under(kind, level) for level in levels]
            if scores:
                named = {f"{kind}_noise_{level:g}": score for level, score in zip(levels, scores, strict=True)}
                lost = clean - sum(scores) / len(scores)
                values = self._all({**{f"score_{k}": v for k, v in named.items()}, f"{kind}_noise_loss": lost})
                self.log_dict({f"test/{name}": value for name, value in values.items()})
                self._disturbed[kind] = scores

    def _score_under(self, kind: str, level: float) -> float:
        """Mean score of the test episodes, played again under noise that is the same for every agent."""
        with isolated_rng(0):
            if kind == "input":
                values: QFunction = lambda state: self(noisy(_scaled(state.to(self.device)), level))  # noqa: E731
                return self._mean_score(values)
            with disturbed_weights(self.network, level):
                return self._mean_score(self.values)

    @torch.no_grad()
    def _mean_score(self, values: QFunction) -> float:
        episodes = self.games.play(self._seeds, values)
        return sum(episode.score for episode in episodes) / len(episodes)

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/score", "max")

    def progress(self) -> Progress:
        return Progress("frames", self.games.frames if self._trainer is not None else 0)

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """val, test: an episode as animation, scores; over training: scores, values, exploration; test: noise."""
        if split == "train" or not self._episodes:
            return {}
        items: dict[str, MediaItem] = {}
        if (frames := self._episodes[0].frames) is not None:
            items["play"] = Animation(frames.float() / 255, fps=15.0 if len(frames) > 60 else 5.0)
        items["scores"] = Histogram({"episodes": torch.tensor([e.score for e in self._episodes])}, "score", bins=20)
        items |= self._curves()
        if split == "test":
            for kind, levels in (("input", self.input_noise), ("weight", self.weight_noise)):
                if kind in self._disturbed:
                    scores = [*self._disturbed["clean"], *self._disturbed[kind]]
                    axis = f"standard deviation of the noise on the {'pixels' if kind == 'input' else 'weights'}"
                    items[f"{kind}_noise"] = Curve([0.0, *levels], {"mean score": scores}, axis, "score")
        return items

    def _curves(self) -> dict[str, MediaItem]:
        history = self._history
        if len(frames := history.get("frames", [])) < 2:
            return {}
        mean, spread = history["score"], history["score_std"]
        ends = [m - s for m, s in zip(mean, spread, strict=True)], [m + s for m, s in zip(mean, spread, strict=True)]
        name = "mean and standard deviation over episodes"
        values = {"largest Q-value of an episode": history["max_q"], "spread over actions": history["q_spread"]}
        items: dict[str, MediaItem] = {
            "evaluation": Curve(frames, {name: mean}, "frames", f"score: {name}", bands={name: ends}),
            "q_values": Curve(frames, values, "frames", "Q-value"),
        }
        if len(history.get("epsilon", [])) == len(frames):
            items["epsilon"] = Curve(frames, {"ε": history["epsilon"]}, "frames", "probability of a random action")
        if len(history.get("train_score", [])) == len(frames):
            items["returns"] = Curve(frames, {"training games": history["train_score"]}, "frames", "score")
        return items

    def export(self, directory: Path) -> list[Path]:
        """Write the agent for plain PyTorch: see `lit_modules.dsqn.export`."""
        return export_agent(self.network, self.shape, self.actions, Path(directory))


class DeepQLearning(Player):
    """Deep Q-learning with replay and a target network (Mnih et al. 2015) for ordinary and spiking networks.

    Loss: Huber(y - Q(s, a)) with ``y = r + γ max_a' Q⁻(s', a')``. One training batch is some decisions of the agent and
    one update; an epoch is what lies between two evaluations.

    network: makes the network for a number of actions (`lit_modules.dsqn`), states in [0, 1] → values. optimizer: Adam
    with lr 1e-4 by default. lr_scheduler: stepped each epoch. rule: ``dqn``; ``double`` (the online network chooses the
    action of y); ``convergent`` (experimental, Wang and Ueda 2022). loss: ``huber`` (δ = 1) or ``mse``. target_period:
    updates between two copies to the target network, 2,500 as 10,000 decisions at 4 an update. target_rate: how far it
    moves, 1 for a copy.
    """

    def __init__(
        self,
        network: AgentFactory,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        rule: Rule = "dqn",
        loss: Loss = "huber",
        target_period: int = 2_500,
        target_rate: float = 1.0,
        input_noise: Sequence[float] = (),
        weight_noise: Sequence[float] = (),
    ) -> None:
        super().__init__(input_noise, weight_noise)
        if target_period < 1:
            raise UserError(f"model.init_args.target_period: expected at least 1 update, got {target_period}")
        if not 0 < target_rate <= 1:
            raise UserError(f"model.init_args.target_rate: expected a number in (0, 1], got {target_rate}")
        save_hparams(self)
        self.make_network, self.make_optimizer, self.make_scheduler = network, optimizer, lr_scheduler
        self.rule, self.loss, self.target_period, self.target_rate = rule, loss, target_period, target_rate
        self._terms: dict[str, Tensor] = {}

    def _build(self, num_actions: int) -> None:
        """Make the networks: the number of actions is known from the game, or from a checkpoint."""
        self.network = self.make_network(num_actions)
        self.target = copy.deepcopy(self.network).requires_grad_(False)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not hasattr(self, "network"):
            self._build(len(self.actions))
        with isolated_rng(), torch.no_grad():
            try:
                values = self.network(torch.zeros(1, *self.shape, device=next(self.network.parameters()).device))
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"model.init_args.network.init_args: expected a network for states of shape {self.shape}, that is "
                    f"history {self.shape[0]} and frame_size {self.shape[-1]}; got {first_line(error)}"
                ) from error
        if values.shape != (1, len(self.actions)):
            raise UserError(
                f"model.init_args.network: expected {len(self.actions)} values, one an action of the game; "
                f"got {tuple(values.shape[1:])}"
            )
        self.games.follow(self.values)

    def configure_optimizers(self) -> Any:
        make = self.make_optimizer or (lambda params: torch.optim.Adam(params, lr=1e-4))
        optimizer = make(self.network.parameters())
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])

    def training_step(self, batch: Transition, batch_idx: int) -> Tensor:
        if self.global_step % self.target_period == 0:
            update_target(self.target, self.network, self.target_rate if self.global_step else 1.0)
        value = chosen(self(_scaled(batch.state)), batch.action)
        loss = self._loss(batch, value).mean()
        self._terms = {"loss": loss.detach()}
        values: dict[str, Tensor | float] = {"train/loss": loss, "train/q": value.mean()}
        values["train/epsilon"] = self.games.epsilon
        if (score := self.games.recent_score) is not None:
            values["train/score"] = score
        self.log_dict(values, batch_size=len(batch))
        return loss

    def _loss(self, batch: Transition, value: Tensor) -> Tensor:
        """Loss of each transition, (N,)."""
        next_state = _scaled(batch.next_state)
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
            self._history.setdefault("epsilon", []).append(self.games.epsilon)
            if (score := self.games.recent_score) is not None:
                self._history.setdefault("train_score", []).append(score)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if curve := self._history.get("score"):
            self.log("test/curve_mean", sum(curve) / len(curve))  # area under the curve of evaluations

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["q_learning"] = {
            "actions": list(self.actions),
            "shape": list(self.shape),
            "history": {name: list(values) for name, values in self._history.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["q_learning"]
        self.actions, self.shape = tuple(state["actions"]), tuple(state["shape"])
        if len(state["history"].get("frames", [])) >= len(self._history.get("frames", [])):
            # Else: the best checkpoint is tested after a training that went on; its curves are kept whole.
            self._history = {name: list(values) for name, values in state["history"].items()}
        if not hasattr(self, "network"):
            self._build(len(self.actions))


class Conversion(Player):
    """A trained DQN converted to a spiking network: `leanlight test` measures it; there is nothing to train.

    source_checkpoint: checkpoint of a `DeepQLearning` run with a `lit_modules.dsqn.DQN`. time_steps: T (500 in the
    published code). percentile: of the normalisation. decoding: ``robust`` or ``spikes``. node, tau: ``lif`` leaks, a
    control that should fail. states: how many states are recorded in play for the normalisation (15,000).
    """

    def __init__(
        self,
        source_checkpoint: Path | None = None,
        time_steps: int = 500,
        percentile: float = 99.9,
        decoding: Decoding = "robust",
        node: Node = "if",
        tau: float = 100.0,
        states: int = 15_000,
        input_noise: Sequence[float] = (),
        weight_noise: Sequence[float] = (),
    ) -> None:
        super().__init__(input_noise, weight_noise)
        for name, value in (("time_steps", time_steps), ("states", states)):
            if value < 1:
                raise UserError(f"model.init_args.{name}: expected at least 1, got {value}")
        save_hparams(self)
        self.source_checkpoint, self.time_steps, self.percentile = source_checkpoint, time_steps, percentile
        self.decoding, self.node, self.tau, self.states = decoding, node, tau, states
        self._agreement: dict[str, list[int]] = {"robust": [], "spikes": []}
        self._source: tuple[nn.Module, ...] = ()  # in a tuple, hidden from nn.Module

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            raise UserError(f"leanlight fit: a converted network is not trained; use leanlight test; {_PIPELINE}")
        if not self._source:
            source = self._load()
            self._source = (source.network.to(self.device),)
            with isolated_rng(0):
                recorded = self._record(source)
            converted = convert(
                source.network,  # type: ignore[arg-type]  # checked there
                _scaled(recorded),
                self.time_steps,
                self.percentile,
                self.decoding,
                self.node,
                self.tau,
            )
            self.network = converted.to(self.device)

    def _load(self) -> DeepQLearning:
        key = "model.init_args.source_checkpoint"
        if not Path(str(self.source_checkpoint)).is_file():
            raise UserError(f"{key}: no file at {self.source_checkpoint}; {_PIPELINE}")
        try:
            source = DeepQLearning.load_from_checkpoint(
                str(self.source_checkpoint), map_location="cpu", weights_only=True
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{key}: {self.source_checkpoint} is no trained agent ({first_line(error)})") from error
        if (source.shape, source.actions) != (self.shape, self.actions):
            raise UserError(f"{key}: trained on another game than data.init_args.game; {source.actions}")
        return source.eval()

    @torch.no_grad()
    def _record(self, source: DeepQLearning) -> Tensor:
        """States (M, K, H, W) uint8 that the DQN meets while it plays games outside of validation and test."""
        seen: list[Tensor] = []

        def values(state: Tensor) -> Tensor:
            seen.append(state)
            return source.values(state)

        seed = 0
        while sum(map(len, seen)) < self.states:
            self.games.play(list(range(seed, seed + _TOGETHER)), values)
            seed += _TOGETHER
        return torch.cat(seen)[: self.states]

    @torch.no_grad()
    def values(self, state: Tensor) -> Tensor:
        network = cast(ConvertedDQN, self.network)
        state = _scaled(state.to(self.device))
        spikes, potential = network.simulate(state)
        with _disable_current_modes():  # EnergyMeter counts what a decision executes; the DQN is no part of it
            expected = self._source[0](state).argmax(1)
        for name, values in (("robust", spikes + potential), ("spikes", spikes)):
            self._agreement[name] += (values.argmax(1) == expected).int().tolist()
        return (spikes + potential if self.decoding == "robust" else spikes) / self.time_steps

    def _publish(self, split: Split) -> None:
        super()._publish(split)
        agreement = {f"agreement_{name}": sum(same) / len(same) for name, same in self._agreement.items() if same}
        self.log_dict({f"{split}/{name}": value for name, value in self._all(agreement).items()})
        self._agreement = {"robust": [], "spikes": []}


def _scaled(state: Tensor) -> Tensor:
    """uint8 → float32 in [0, 1]."""
    return state.float() / 255
