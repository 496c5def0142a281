"""Wrappers on a real Atari game, training games that go on exactly, evaluation episodes."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch

from datamodules import GameDataModule
from datamodules.games.atari import SCORES, EpisodicLife, FireReset, atari_games, make_atari
from datamodules.games.boards import BOARDS
from datamodules.games.catch import Catch
from datamodules.games.play import Exploration, TrainingGame, TrainingGames, play
from datamodules.games.replay import ReplayMemory
from leanlight.contracts import GameData, UserError


def values_of(actions):
    """Values that depend on the newest frames, so that wrong states would show."""

    def values(state):
        flat = state.double().flatten(1)
        weights = torch.linspace(-1, 1, flat.shape[1] * actions, dtype=torch.float64).sin().view(-1, actions)
        return flat @ weights

    return values


# ---- Catch ----


def test_catch_rewards_the_paddle_under_the_ball():
    game = Catch()
    for seed in range(20):
        frame, _ = game.reset(seed=seed)
        column = int(frame[0].argmax())
        total, over, steps = 0.0, False, 0
        while not over:
            paddle = int(frame[-1].argmax())
            frame, reward, over, _, _ = game.step(1 + (column > paddle) - (column < paddle))
            total, steps = total + reward, steps + 1
        assert (total, steps) == (1.0, 7)


@pytest.mark.parametrize("name", BOARDS)
def test_a_random_policy_scores_what_the_text_says(name):
    game, generator, scores = Catch(**BOARDS[name].settings), np.random.default_rng(0), []
    for seed in range(3000 // game.balls):
        game.reset(seed=seed)
        over, score = False, 0.0
        while not over:
            _, reward, over, _, _ = game.step(int(generator.integers(3)))
            score += reward
        scores.append(score)
    assert np.mean(scores) == pytest.approx(BOARDS[name].random, abs=0.04 * game.balls)


@pytest.mark.parametrize("name", BOARDS)
def test_who_knows_all_balls_scores_at_most_what_the_text_says(name):
    game = Catch(**BOARDS[name].settings)
    scores = []
    for seed in range(300):
        frame, _ = game.reset(seed=seed)
        # The best score on the way to each column, by trying every way.
        best = np.where(np.arange(game.size) == game.size // 2, 0.0, -np.inf)
        over = False
        while not over:
            above = frame[-2].copy()
            frame, reward, over, _, _ = game.step(1)
            reached = np.pad(best, 1, constant_values=-np.inf)
            best = np.maximum(np.maximum(reached[:-2], reached[1:-1]), reached[2:])
            if reward:
                best += np.where(above > 0, 1.0, -1.0)
        scores.append(best.max())
    assert np.mean(scores) == pytest.approx(BOARDS[name].best, abs=0.3)


def test_every_ball_is_judged_once_and_then_gone():
    game = Catch(size=6, balls=4, apart=2)
    game.reset(seed=0)
    rewards, shown, over = [], [], False
    while not over:
        frame, reward, over, _, _ = game.step(1)
        rewards.append(reward != 0)
        shown.append(int((frame[:-1] > 0).sum()))
        assert over or frame[-1].sum() == 255  # the paddle alone
    assert [step for step, judged in enumerate(rewards, 1) if judged] == [5, 7, 9, 11]
    assert shown == [1, 2, 2, 3, 2, 3, 2, 2, 1, 1, 0]


# ---- wrappers on a real game ----


@pytest.fixture(scope="module")
def breakout():
    """Frames, rewards, infos of random play in training: (frame, reward, terminated, info)."""
    env, generator = make_atari("breakout", training=True), np.random.default_rng(0)
    first, info = env.reset(seed=7)
    steps, resets = [], [(first, info)]
    for _ in range(700):
        steps.append(env.step(int(generator.integers(4))))
        if steps[-1][2] or steps[-1][3]:
            resets.append(env.reset())
    return env, steps, resets


def test_observations_are_single_grey_frames(breakout):
    _, steps, resets = breakout
    for frame in (steps[0][0], resets[0][0]):
        assert frame.shape == (84, 84)
        assert frame.dtype == np.uint8


def test_four_frames_pass_in_a_decision(breakout):
    _, steps, _ = breakout
    passed = [
        after[4]["episode_frame_number"] - before[4]["episode_frame_number"]
        for before, after in itertools.pairwise(steps)
        if not before[2] and after[4]["lives"] > 0  # the game's last decision may be cut short
    ]
    assert set(passed) == {4}


def test_a_lost_life_ends_the_episode_and_the_game_goes_on(breakout):
    _, steps, resets = breakout
    lives = [step[4]["lives"] for step in steps]
    lost = [i for i, step in enumerate(steps) if step[4].get("life_lost")]
    assert lost
    for i in lost:
        assert steps[i][2]
        assert lives[i] == lives[i - 1] - 1
    continued = [info for _, info in resets if not info.get("new_game", True)]
    assert len(continued) == len(lost)
    assert {info["lives"] for info in continued} <= {1, 2, 3, 4}
    over = [i for i, step in enumerate(steps) if step[2] and not step[4]["life_lost"]]
    assert all(lives[i] == 0 for i in over)


def test_evaluation_plays_whole_games():
    env, generator = make_atari("breakout", training=False), np.random.default_rng(1)
    env.reset(seed=3)
    over, last = False, {}
    while not over:
        _, _, terminated, truncated, last = env.step(int(generator.integers(4)))
        over = terminated or truncated
    assert last["lives"] == 0


def test_a_seed_decides_a_game():
    def frames(seed, before):
        env = make_atari("pong", training=True)
        env.reset(seed=before)
        generator = np.random.default_rng(0)
        seen = [env.reset(seed=seed)[0]] + [env.step(int(generator.integers(6)))[0] for _ in range(60)]
        return np.stack([frame.copy() for frame in seen])

    assert np.array_equal(frames(5, before=1), frames(5, before=2))
    assert not np.array_equal(frames(5, before=1), frames(6, before=1))


def test_games_without_fire_get_no_fire():
    assert not isinstance(make_atari("tutankham", training=False), FireReset)
    assert isinstance(make_atari("pong", training=False), FireReset)


def test_the_time_limit_counts_decisions():
    env = make_atari("pong", training=True, max_decisions=20, fire_reset=False)
    env.reset(seed=0)
    ends = [env.step(0)[3] for _ in range(20)]
    assert ends == [False] * 19 + [True]


def test_the_games_of_the_paper_are_there():
    assert len(SCORES) == 17
    assert set(SCORES) <= set(atari_games())


class OneStep(gymnasium.Env):
    """A game whose every step ends it, with lives to count."""

    action_space = gymnasium.spaces.Discrete(3)
    observation_space = gymnasium.spaces.Box(0, 255, (1,), np.uint8)

    def __init__(self, lives):
        self.given, self.ale, self.resets = list(lives), self, 0

    def lives(self):
        return self.given[0]

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        return np.zeros(1, np.uint8), {}

    def step(self, action):
        self.given.pop(0)
        return np.zeros(1, np.uint8), 0.0, self.given[0] == 0, False, {}


def test_a_game_that_ends_in_the_step_after_a_lost_life_begins_anew():
    inner = OneStep([2, 1, 0, 2])
    env = EpisodicLife(inner)
    env.reset()
    _, _, terminated, _, info = env.step(1)
    assert terminated
    assert info["life_lost"]
    _, info = env.reset()  # its step without action costs the last life
    assert info["new_game"]
    assert inner.resets == 2


# ---- training games ----


def training_game(folder, make, seed=0, start=1.0, end=0.3):
    game = make()
    memory = ReplayMemory(folder, 400, game.observation_space.shape, history=4, slack=300)
    return TrainingGame(game, memory, Exploration(start, end, 100), seed)


def side_by_side(folder, make, seeds):
    games = [training_game(folder / str(number), make, seed) for number, seed in enumerate(seeds)]
    together = TrainingGames(games)
    together.values = values_of(int(games[0].game.action_space.n))
    return together


def heads(training):
    return [game.memory.head for game in training.games]


def written(training, since):
    """Everything that was written into the memories after `since`."""
    return [
        game.memory.transitions(np.arange(head, game.memory.head - 1))
        for game, head in zip(training.games, since, strict=True)
    ]


def same(a, b):
    return torch.equal(a.state, b.state) and torch.equal(a.action, b.action) and torch.equal(a.reward, b.reward)


@pytest.mark.parametrize("make", [Catch, lambda: make_atari("breakout", training=True)], ids=["catch", "breakout"])
@pytest.mark.parametrize("number", [1, 3])
def test_training_games_go_on_exactly_after_a_kill(tmp_path, make, number):
    first = side_by_side(tmp_path, make, range(number))
    first.fill(50 * number)
    for _ in range(150):
        first.decide()
    state, since = first.state_dict(), heads(first)
    for _ in range(120):
        first.decide()
    before = written(first, since)

    again = side_by_side(tmp_path, make, range(90, 90 + number))  # the state brings its seeds
    again.load_state_dict(state)
    for _ in range(120):
        again.decide()
    assert heads(again) == heads(first)
    assert all(same(a, b) for a, b in zip(written(again, since), before, strict=True))
    assert again.recent_score == first.recent_score
    assert again.epsilon == first.epsilon
    assert same(again.sample(20), first.sample(20))


def test_games_side_by_side_are_those_of_games_alone(tmp_path):
    together, calls = side_by_side(tmp_path / "together", Catch, [5, 6]), []
    values = together.values
    together.values = lambda state: calls.append(len(state)) or values(state)
    together.fill(60)
    for _ in range(200):
        together.decide()
    assert max(calls) == 2
    assert len(calls) <= 200
    assert together.total >= 400
    for number, seed in enumerate([5, 6]):
        alone = side_by_side(tmp_path / f"alone{number}", Catch, [seed])
        alone.fill(30)
        for _ in range(200):
            alone.decide()
        assert heads(alone) == [heads(together)[number]]
        assert same(written(alone, [0])[0], written(together, [0, 0])[number])


def test_a_sample_takes_from_all_memories_by_their_size(tmp_path):
    together = side_by_side(tmp_path, Catch, [0, 1])
    together.games[0].fill(100)
    together.games[1].fill(300)
    for game, reward in zip(together.games, (2.0, 3.0), strict=True):
        game.memory.rewards[:] = reward
    rewards = together.sample(4000).reward
    assert (rewards == 3.0).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_a_checkpoint_of_another_number_of_games_is_refused(tmp_path):
    state = side_by_side(tmp_path / "a", Catch, [0, 1]).state_dict()
    with pytest.raises(UserError, match="training_games"):
        side_by_side(tmp_path / "b", Catch, [0]).load_state_dict(state)


def test_rewards_are_clipped_to_their_sign_in_the_memory_only(tmp_path):
    training = training_game(tmp_path, lambda: make_atari("krull", training=True))
    training.fill(300)
    rewards = training.memory.rewards[:300]
    assert set(np.unique(rewards)) <= {-1.0, 0.0, 1.0}
    assert training._score > rewards.sum() or any(score > 50 for score in training.scores)


def test_the_memory_is_filled_to_the_end_of_an_episode(tmp_path):
    training = training_game(tmp_path, Catch)
    training.fill(20)
    assert training.memory.head > 20
    assert training.memory.ages[training.memory.head - 1] == 0
    assert training.decisions == 0


def test_exploration_falls_linearly():
    schedule = Exploration(1.0, 0.1, 1000)
    assert [schedule(i) for i in (0, 500, 1000, 5000)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


# ---- evaluation ----


def test_an_episode_does_not_depend_on_those_beside_it():
    values = values_of(3)
    together = play([Catch() for _ in range(6)], range(6), values, 0.2, 4)
    alone = [play([Catch()], [seed], values, 0.2, 4)[0] for seed in range(6)]
    assert together == alone


def test_figures_of_an_episode():
    episode = play([Catch()], [0], lambda state: torch.tensor([[0.0, 3.0, 1.0]]).expand(len(state), 3), 0.0, 1, 100)[0]
    assert (episode.decisions, episode.greedy, episode.max_q) == (7, 7, 3.0)
    assert episode.q_spread == pytest.approx(torch.tensor([0.0, 3.0, 1.0]).std().item())  # of a sample
    assert episode.frames.shape == (8, 3, 8, 8)


def test_exploration_in_evaluation_asks_the_agent_less_often():
    episodes = play([Catch() for _ in range(50)], range(50), values_of(3), 0.5, 1)
    assert 0.4 < sum(e.greedy for e in episodes) / sum(e.decisions for e in episodes) < 0.6


# ---- the DataModule ----


def test_the_data_keep_the_contract_and_validation_is_not_test():
    data = GameDataModule("catch", eval_episodes=7, test_episodes=5, eval_together=3)
    data.setup()
    assert isinstance(data, GameData)
    assert data.meta.actions == ("LEFT", "NOOP", "RIGHT")
    assert data.meta.shape == (4, 8, 8)
    loaders = data.val_dataloader(), data.test_dataloader()
    val, test = (torch.cat([batch.seed for batch in loader]) for loader in loaders)
    assert (len(val), len(test)) == (7, 5)
    assert not set(val.tolist()) & set(test.tolist())


def test_the_fingerprint_knows_the_protocol():
    prints = set()
    for options in ({}, {"sticky": 0.25}, {"episodic_life": False}, {"game": "breakout"}):
        data = GameDataModule(**{"game": "pong", **options})
        data.setup()
        prints.add(data.meta.fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"game": "brekout"}, "breakout"),
        ({"gamma": 1.5}, "gamma"),
        ({"n_step": 0}, "n_step"),
        ({"replay_start": 10, "replay_size": 5}, "replay_start"),
        ({"decisions_per_update": 10, "decisions_per_epoch": 5}, "decisions_per_update"),
        ({"decisions_per_update": 4, "training_games": 3}, "training_games"),
    ],
)
def test_wrong_settings_are_named(options, words):
    with pytest.raises(UserError, match=words):
        GameDataModule(**options).ensure_available()
