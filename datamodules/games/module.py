"""Games as data: training batches from a replay memory that an agent fills, evaluation batches of episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.games.boards import BOARDS
from datamodules.loaders import rank_and_world
from leanlight.contracts import (
    Episode,
    EpisodeBatch,
    GameMeta,
    MissingExtraError,
    QFunction,
    Transition,
    UserError,
    derived_seed,
    run_seed,
)
from leanlight.contracts.ranges import NonNegativeInt, PositiveInt, Seed, UnitInterval

if TYPE_CHECKING:
    from datamodules.games.play import Game, TrainingGame, TrainingGames

_SPLITS = {"val": 0, "test": 1}
_WRAPPERS = ("frame_skip", "noop_max", "screen_size", "max_decisions", "sticky", "episodic_life", "fire_reset")
_COUNTS = (
    *("batch_size", "decisions_per_update", "decisions_per_epoch", "training_games"),
    *("replay_size", "replay_start", "slack", "n_step", "eval_episodes", "test_episodes", "eval_together"),
    *("history", "frame_skip", "screen_size", "max_decisions"),
)
_SHARES = ("gamma", "epsilon_start", "epsilon_end", "eval_epsilon", "sticky")


class PlayLoader:
    """Training batches: some decisions in each training game, then transitions drawn from their memories.

    Iteration has no state: the games have, and the DataModule keeps it.

    Args:
        training: the games.
        batches: of an epoch; the Trainer counts them.
        batch_size: transitions of a batch.
        rounds: decisions in each game before a batch.
    """

    def __init__(self, training: TrainingGames, batches: int, batch_size: int, rounds: int) -> None:
        self.training, self.batches, self.batch_size, self.rounds = training, batches, batch_size, rounds

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Transition]:
        while True:
            for _ in range(self.rounds):
                self.training.decide()
            yield self.training.sample(self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Nothing; that it is there tells Lightning that the middle of an epoch can be resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""


class EpisodeLoader:
    """Evaluation episodes in groups that are played side by side; ranks share them.

    Args:
        seeds: (N,) int64, one an episode.
        size: episodes of a group.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, seeds: torch.Tensor, size: int, rank: int = 0, world: int = 1) -> None:
        if len(seeds) < world:
            raise UserError(f"{len(seeds)} episodes cannot be spread over {world} processes; raise eval_episodes")
        self._groups = list(seeds[rank::world].split(size))

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[EpisodeBatch]:
        return map(EpisodeBatch, iter(self._groups))


class GameDataModule(pl.LightningDataModule):
    """Atari games and Catch, with the training and evaluation protocol of the DSQN paper.

    A training batch is `Transition`: before it is drawn, the agent that `follow` names makes `decisions_per_update`
    decisions. An evaluation batch is `EpisodeBatch`; `play` plays it, in whole games with unclipped rewards.
    All counts are in decisions (of `frame_skip` emulator frames each).

    Args:
        game: an Atari game by the name of its ROM (``breakout``, ``space_invaders``), ``catch`` or ``catch_hard``.
        batch_size: transitions of an update; 32 in the paper.
        decisions_per_update: decisions between two updates, of all training games together; 4 in the paper.
        decisions_per_epoch: decisions of an epoch, that is, between two evaluations.
        training_games: games side by side, decided for together; they share updates, replay and exploration; paper: 1.
        replay_size: rows of the replay memory, a decision each; 1,000,000 in the paper.
        replay_start: rows filled by random play before training; 50,000 in the paper.
        slack: rows that may be written between two checkpoints, at least `decisions_per_update`.
        keep_replay: keep the memory's files when training has ended, so that the run can be made longer.
        gamma: discount γ of a decision, in [0, 1]; 0.99 in the paper.
        n_step: steps of a transition; 1 is plain Q-learning, as in the paper.
        epsilon_start: probability ε of a random action when training begins, in [0, 1].
        epsilon_end: ε after `epsilon_decisions` decisions; it falls linearly.
        epsilon_decisions: decisions until ε is `epsilon_end`.
        eval_epsilon: ε in evaluation episodes, in [0, 1]; 0.05 in the paper.
        eval_episodes: episodes of a validation.
        test_episodes: episodes of the test; 30 in the paper.
        eval_together: evaluation episodes played side by side; changes the speed alone.
        history: frames K of a state, the newest last; 4 in the paper.
        frame_skip: emulator frames that an action lasts; Catch: always 1.
        noop_max: most steps without action at the start of a game; not in Catch.
        screen_size: side of a frame in pixels; not in Catch, whose boards have 8 and 12.
        max_decisions: actions after which a game is cut off; 18,000 of 4 frames are 20 minutes; not in Catch.
        sticky: probability that the emulator repeats the last action, in [0, 1]; not in Catch.
        episodic_life: whether a lost life ends a training episode; not in Catch.
        fire_reset: whether to press FIRE after a reset, where the game has it; not in Catch.
        clip_rewards: learn from the sign of rewards; scores stay unclipped.
        bootstrap_on_truncation: let transitions that meet `max_decisions` have a future; the paper does not.
        seed: of training games and exploration; default that of ``seed_everything``, else 0.
        split_seed: of evaluation episodes, which are the same for every run.
    """

    meta: GameMeta

    def __init__(
        self,
        game: str = "breakout",
        batch_size: PositiveInt = 32,
        decisions_per_update: PositiveInt = 4,
        decisions_per_epoch: PositiveInt = 250_000,
        training_games: PositiveInt = 1,
        replay_size: PositiveInt = 1_000_000,
        replay_start: PositiveInt = 50_000,
        slack: PositiveInt = 20_000,
        keep_replay: bool = False,
        gamma: UnitInterval = 0.99,
        n_step: PositiveInt = 1,
        epsilon_start: UnitInterval = 1.0,
        epsilon_end: UnitInterval = 0.1,
        epsilon_decisions: PositiveInt = 1_000_000,
        eval_epsilon: UnitInterval = 0.05,
        eval_episodes: PositiveInt = 30,
        test_episodes: PositiveInt = 30,
        eval_together: PositiveInt = 10,
        history: PositiveInt = 4,
        frame_skip: PositiveInt = 4,
        noop_max: NonNegativeInt = 30,
        screen_size: PositiveInt = 84,
        max_decisions: PositiveInt = 18_000,
        sticky: UnitInterval = 0.0,
        episodic_life: bool = True,
        fire_reset: bool = True,
        clip_rewards: bool = True,
        bootstrap_on_truncation: bool = False,
        seed: Seed | None = None,
        split_seed: Seed = 0,
    ) -> None:
        super().__init__()
        given = dict(locals())
        _check(given)
        self.game, self.batch_size, self.decisions_per_update = game, batch_size, decisions_per_update
        self.decisions_per_epoch, self.replay_start, self.keep_replay = decisions_per_epoch, replay_start, keep_replay
        self.training_games = training_games
        self.memory_settings = {"history": history, "n_step": n_step, "gamma": gamma}
        self.memory_settings |= {"capacity": replay_size // training_games, "slack": -(-slack // training_games)}
        self.exploration_settings = (epsilon_start, epsilon_end, epsilon_decisions // training_games)
        self.eval_epsilon, self.eval_together, self.history = eval_epsilon, eval_together, history
        self.episodes = {"val": eval_episodes, "test": test_episodes}
        self.frame_skip = 1 if game in BOARDS else frame_skip
        atari = {name: given[name] for name in _WRAPPERS}
        self.game_settings: dict[str, Any] = BOARDS[game].settings if game in BOARDS else atari
        self.clip_rewards, self.bootstrap_on_truncation = clip_rewards, bootstrap_on_truncation
        self.seed, self.split_seed = seed, split_seed
        self.training: TrainingGames | None = None
        self._values: QFunction | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._pool: list[Game] = []

    # ---- games ----

    def make_game(self, training: bool) -> Game:
        """A game whose observations are single frames (H, W) uint8. Raises UserError, or names the missing extra."""
        try:
            if self.game in BOARDS:
                from datamodules.games.catch import Catch

                return Catch(**self.game_settings)
            from datamodules.games.atari import make_atari
        except ModuleNotFoundError as error:
            raise MissingExtraError(str(error.name), "rl") from error
        return make_atari(self.game, training, **self.game_settings)

    @property
    def step_shape(self) -> tuple[int, ...]:
        """(N, K, H, W) of the states of a training batch, before a game is made."""
        side = BOARDS[self.game].size if self.game in BOARDS else self.game_settings["screen_size"]
        return (self.batch_size, self.history, side, side)

    def ensure_available(self) -> None:
        """Make the game once: unknown names and missing packages show here."""
        if not self._pool:
            self._pool.append(self.make_game(training=False))

    def prepare_data(self) -> None:
        """Nothing: games come with their packages."""

    def setup(self, stage: str | None = None) -> None:
        """Describe the game."""
        if hasattr(self, "meta"):
            return
        self.ensure_available()
        game: Any = self._pool[0]
        height, width = game.observation_space.shape
        shape = (self.history, height, width)
        packages = [f"{name} {version(name)}" for name in ("gymnasium", *([] if self.game in BOARDS else ["ale-py"]))]
        facts = (self.game, shape, self.game_settings, packages, self.split_seed, _rom(self.game))
        self.meta = GameMeta(
            name=self.game,
            source=", ".join(packages),
            actions=tuple(game.unwrapped.get_action_meanings()),
            shape=shape,
            counts={"train": self.decisions_per_epoch, **self.episodes},
            fingerprint=hashlib.sha256(repr(facts).encode()).hexdigest(),
            **_scores(self.game),
        )

    # ---- training ----

    def follow(self, values: QFunction) -> None:
        """See `GameData.follow`."""
        self._values = values
        if self.training is not None:
            self.training.values = values

    def train_dataloader(self) -> PlayLoader:
        """Open the replay memories in the run folder, fill them at random or go on with them, and play."""
        from datamodules.games.play import TrainingGames

        rank, world = rank_and_world()
        numbers = range(rank * self.training_games, (rank + 1) * self.training_games)
        games = [self._training_game(number, len(numbers) * world) for number in numbers]
        self.training = TrainingGames(games)
        self.training.values = self._values
        # Killed in the test that follows training: the memories are gone, and nothing will be drawn from them.
        trained = self._resumed is not None and self.trainer is not None and self.trainer.fit_loop.done
        if self._resumed is not None and world == self._resumed.get("processes", 1) == 1:
            self.training.load_state_dict(self._resumed, trained)
        elif self._resumed is not None:  # the checkpoint has rank zero's games only: go on with fresh memories
            for game in games:
                game.decisions = self._resumed["games"][0]["decisions"]
        self._resumed = None
        if self.training.rows < self.replay_start and not trained:
            self._fill()
        batches = max(1, self.decisions_per_epoch // self.decisions_per_update)
        rounds = self.decisions_per_update // self.training_games
        return PlayLoader(self.training, batches, self.batch_size, rounds)

    @property
    def _memories(self) -> Path:
        """The folder of all replay memories."""
        assert self.trainer is not None
        return Path(self.trainer.default_root_dir) / "replay"

    def _training_game(self, number: int, total: int) -> TrainingGame:
        """The training game of this number, counted over all processes."""
        from datamodules.games.play import Exploration, TrainingGame, open_memory

        folder = self._memories / (f"game{number}" if total > 1 else "")
        game, seed = self.make_game(training=True), derived_seed(run_seed(self.seed), number)
        memory, exploration = open_memory(folder, game, **self.memory_settings), Exploration(*self.exploration_settings)
        return TrainingGame(game, memory, exploration, seed, self.clip_rewards, self.bootstrap_on_truncation)

    def _fill(self) -> None:
        from rich.progress import Progress

        assert self.training is not None
        with Progress(transient=True, disable=rank_and_world()[0] > 0) as bar:
            task = bar.add_task("filling the replay memory", total=self.replay_start)
            self.training.fill(self.replay_start, lambda done: bar.update(task, completed=done))

    @property
    def frames(self) -> int:
        """See `GameData.frames`; with those that filled the memories."""
        return self.training.total * self.frame_skip * rank_and_world()[1] if self.training else 0

    @property
    def epsilon(self) -> float:
        """See `GameData.epsilon`."""
        return self.training.epsilon if self.training else self.eval_epsilon

    @property
    def recent_score(self) -> float | None:
        """See `GameData.recent_score`."""
        return self.training.recent_score if self.training else None

    def state_dict(self) -> dict[str, Any]:
        """The training games' state; empty before training."""
        return {**self.training.state_dict(), "processes": rank_and_world()[1]} if self.training else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the training games are made."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._resumed = state_dict

    def teardown(self, stage: str) -> None:
        """Training has ended well: remove the memories, unless they are to be kept."""
        if stage == "fit" and self.training is not None and not self.keep_replay:
            self.training.delete()
            with suppress(OSError):  # not empty while other processes keep theirs, or gone
                self._memories.rmdir()

    # ---- evaluation ----

    def _eval_loader(self, split: str) -> EpisodeLoader:
        number = np.random.SeedSequence([self.split_seed, 5, _SPLITS[split]])
        seeds = torch.from_numpy(number.generate_state(self.episodes[split]).astype(np.int64) >> 1)
        return EpisodeLoader(seeds, self.eval_together, *rank_and_world())

    def val_dataloader(self) -> EpisodeLoader:
        """Evaluation episodes; the same for every run."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EpisodeLoader:
        """Other episodes than those of validation."""
        return self._eval_loader("test")

    def play(self, seeds: Sequence[int], values: QFunction, pictures: int = 0) -> list[Episode]:
        """See `GameData.play`."""
        from datamodules.games.play import play

        episodes: list[Episode] = []
        for start in range(0, len(seeds), self.eval_together):
            group = seeds[start : start + self.eval_together]
            while len(self._pool) < len(group):
                self._pool.append(self.make_game(training=False))
            games, shown = self._pool[: len(group)], 0 if start else pictures
            episodes += play(games, group, values, self.eval_epsilon, self.history, shown)
        return episodes


def _check(given: Mapping[str, Any]) -> None:
    """Raise UserError for the first argument that makes no sense."""
    for name in _COUNTS:
        if given[name] < 1:
            raise UserError(f"{name}: expected at least 1, got {given[name]}")
    for name in _SHARES:
        if not 0 <= given[name] <= 1:
            raise UserError(f"{name}: expected a number in [0, 1], got {given[name]}")
    for small, large in (
        ("replay_start", "replay_size"),
        ("decisions_per_update", "decisions_per_epoch"),
        ("decisions_per_update", "slack"),
    ):
        if given[small] > given[large]:
            raise UserError(f"{small}: expected at most {large} ({given[large]}), got {given[small]}")
    if given["decisions_per_update"] % given["training_games"]:
        raise UserError(
            f"training_games: expected a divisor of decisions_per_update "
            f"({given['decisions_per_update']}), got {given['training_games']}"
        )


def _scores(game: str) -> dict[str, float]:
    if game in BOARDS:
        return {"random_score": BOARDS[game].random, "human_score": BOARDS[game].best}
    from datamodules.games.atari import SCORES

    known = SCORES.get(game)
    return {"random_score": known.random, "human_score": known.human} if known else {}


def _rom(game: str) -> str:
    """Digest of the game's program, empty for the suite's own."""
    if game in BOARDS:
        return ""
    from ale_py import roms

    return hashlib.sha256(Path(str(roms.get_rom_path(game))).read_bytes()).hexdigest()
