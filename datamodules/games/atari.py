"""Atari games as the field plays them: wrappers, the facts of the 17 games of the DSQN paper, and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, TimeLimit

from datamodules.games.boards import BOARDS
from leanlight.contracts import MissingExtraError, UserError, nearest

NOOP, FIRE, SECOND = 0, 1, 2


@dataclass(frozen=True)
class Scores:
    """Mean scores of a game (Mnih et al. 2015, Wang et al. 2016).

    Args:
        random: of a random policy.
        human: of a human player.
    """

    random: float
    human: float


# The games on which DQN does best (Tan et al. 2021), which the DSQN paper takes over.
SCORES: dict[str, Scores] = {
    "atlantis": Scores(12850.0, 29028.1),
    "beam_rider": Scores(363.9, 16926.5),
    "boxing": Scores(0.1, 12.1),
    "breakout": Scores(1.7, 30.5),
    "crazy_climber": Scores(10780.5, 35829.4),
    "gopher": Scores(257.6, 2412.5),
    "jamesbond": Scores(29.0, 302.8),
    "kangaroo": Scores(52.0, 3035.0),
    "krull": Scores(1598.0, 2665.5),
    "name_this_game": Scores(2292.3, 8049.0),
    "pong": Scores(-20.7, 14.6),
    "road_runner": Scores(11.5, 7845.0),
    "space_invaders": Scores(148.0, 1668.7),
    "star_gunner": Scores(664.0, 10250.0),
    "tennis": Scores(-23.8, -8.3),
    "tutankham": Scores(11.4, 167.6),
    "video_pinball": Scores(16256.9, 17667.9),
}


class EpisodicLife(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The loss of a life ends the episode that the learner sees, and the game goes on.

    `reset` then takes one step without action; it starts a new game when the old one is over, or when a seed is given.
    ``info["life_lost"]`` says of a step whether a life was lost in a game that goes on, ``info["new_game"]`` of a reset
    whether a new game began. Games without a counter of lives are left alone.

    Args:
        env: an Atari game.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self._lives, self._over = 0, True

    def _count(self) -> int:
        return int(self.unwrapped.ale.lives())  # type: ignore[attr-defined]

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        frame, reward, terminated, truncated, info = self.env.step(action)
        self._over = terminated or truncated
        lives, before = self._count(), self._lives
        self._lives = lives
        lost = 0 < lives < before and not self._over
        return frame, reward, terminated or lost, truncated, {**info, "life_lost": lost}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        over = self._over or seed is not None
        if not over:
            frame, _, terminated, truncated, info = self.env.step(NOOP)
            over = terminated or truncated  # the step without action can end the game, too
        if over:
            frame, info = self.env.reset(seed=seed, options=options)
        self._over, self._lives = False, self._count()
        return frame, {**info, "new_game": over}


class FireReset(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Press FIRE, then the next action, after every reset: some games do not begin before.

    Only for games whose second action is FIRE.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        frame, info = self.env.reset(seed=seed, options=options)
        new_game = info.get("new_game", True)
        for action in (FIRE, SECOND):
            frame, _, terminated, truncated, more = self.env.step(action)
            if terminated or truncated:
                frame, more = self.env.reset(seed=seed, options=options)
                new_game |= more.get("new_game", True)
        return frame, {**more, "new_game": new_game}


def make_atari(
    game: str,
    training: bool,
    noop_max: int = 30,
    frame_skip: int = 4,
    screen_size: int = 84,
    max_decisions: int = 18_000,
    sticky: float = 0.0,
    episodic_life: bool = True,
    fire_reset: bool = True,
) -> gymnasium.Env[np.ndarray, int]:
    """A game whose observations are single frames (screen_size, screen_size) uint8, with the paper's wrappers.

    Frames are grey; of the last two pictures of an action the brighter counts. Rewards are the game's. Raises UserError
    for an unknown game.

    Args:
        game: name of the ROM, e.g. ``breakout``.
        training: whether `episodic_life` applies.
        noop_max: most steps without action at the start of a game.
        frame_skip: times that an action is repeated.
        screen_size: side of a frame in pixels.
        max_decisions: actions after which a game is cut off.
        sticky: probability that the emulator repeats the last action.
        episodic_life: whether a lost life ends an episode.
        fire_reset: whether to press FIRE after a reset, where the game has it.
    """
    base = _emulator(game, sticky)
    try:
        env: Any = AtariPreprocessing(base, noop_max, frame_skip, screen_size)
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingExtraError("opencv-python-headless", "rl") from error
    env = TimeLimit(env, max_decisions)
    if training and episodic_life:
        env = EpisodicLife(env)
    meanings = base.unwrapped.get_action_meanings()  # type: ignore[attr-defined]
    return FireReset(env) if fire_reset and len(meanings) > SECOND and meanings[FIRE] == "FIRE" else env


def _emulator(game: str, sticky: float) -> gymnasium.Env[Any, Any]:
    roms = atari_games()
    if game not in roms:
        raise UserError(
            f"game: {game!r} is neither catch, catch_hard nor an Atari game{nearest(game, [*BOARDS, *roms])}"
        )
    name = "".join(word.capitalize() for word in game.split("_"))
    options: dict[str, Any] = {"frameskip": 1, "repeat_action_probability": sticky}
    options |= {"obs_type": "grayscale", "render_mode": "rgb_array"}  # AtariPreprocessing fetches its pictures itself
    try:
        return gymnasium.make(f"ALE/{name}-v5", disable_env_checker=True, **options)
    except gymnasium.error.Error as error:
        raise UserError(f"game: gymnasium cannot make {game!r} ({error})") from error


def atari_games() -> list[str]:
    """Names of all games whose ROMs ship with ale-py."""
    try:
        import ale_py
        from ale_py import roms
    except ModuleNotFoundError as error:
        raise MissingExtraError("ale-py", "rl") from error
    gymnasium.register_envs(ale_py)
    return list(roms.get_all_rom_ids())
