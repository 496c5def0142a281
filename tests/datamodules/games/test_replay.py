"""The replay memory against one that stores whole episodes and stacks them in a loop."""

import numpy as np
import pytest
import torch

from datamodules.games.replay import CLOSING, GOES_ON, TERMINAL, TRUNCATED, ReplayMemory
from leanlight.contracts import UserError

SHAPE, HISTORY, GAMMA = (3, 3), 4, 0.9


class Naive:
    """Whole episodes in lists; a transition is put together frame by frame."""

    def __init__(self, capacity, n_step):
        self.capacity, self.n_step, self.rows, self.episodes = capacity, n_step, 0, []

    def begin(self, frame):
        self.episodes.append({"start": self.rows, "frames": [frame], "actions": [], "rewards": [], "end": GOES_ON})
        self.rows += 1

    def record(self, action, reward, end=GOES_ON):
        episode = self.episodes[-1]
        episode["actions"].append(action)
        episode["rewards"].append(reward)
        episode["end"] = end

    def observe(self, frame):
        self.episodes[-1]["frames"].append(frame)
        self.rows += 1

    close = observe

    def transitions(self):
        """Row → (state, action, reward, next state, terminal, discount) of every usable one."""
        found = {}
        for episode in self.episodes:
            start, frames, actions = episode["start"], episode["frames"], episode["actions"]

            def stack(i, frames=frames):
                return np.stack([frames[max(0, j)] for j in range(i - HISTORY + 1, i + 1)])

            for i in range(len(actions)):
                steps = min(self.n_step, len(actions) - i) if episode["end"] != GOES_ON else self.n_step
                oldest = start + max(0, i - HISTORY + 1)
                if oldest < self.rows - self.capacity or i + steps >= len(frames):
                    continue
                reward = sum(GAMMA**k * episode["rewards"][i + k] for k in range(steps))
                ended = i + steps == len(actions) and episode["end"] == TERMINAL
                found[start + i] = (stack(i), actions[i], reward, stack(i + steps), ended, GAMMA**steps)
        return found


def write_random_episodes(memories, generator, steps):
    """Play `steps` random steps; episodes have 1 to 9 of them and end by a terminal or by truncation."""
    for memory in memories:
        memory.begin(np.zeros(SHAPE, np.uint8))
    left = 3
    for _ in range(steps):
        frame = generator.integers(0, 256, SHAPE, dtype=np.uint8)
        action, reward = int(generator.integers(5)), float(generator.normal())
        left -= 1
        end = GOES_ON if left else int(generator.choice([TERMINAL, TRUNCATED]))
        for memory in memories:
            memory.record(action, reward, end)
            (memory.close if end else memory.observe)(frame)
        if end:
            left = int(generator.integers(1, 10))
            first = generator.integers(0, 256, SHAPE, dtype=np.uint8)
            for memory in memories:
                memory.begin(first)


def make(tmp_path, capacity=50, n_step=1, slack=20):
    return ReplayMemory(tmp_path / "replay", capacity, SHAPE, HISTORY, n_step, GAMMA, slack)


def check_equal(memory, naive):
    expected = naive.transitions()
    window = np.arange(max(0, memory.head - memory.capacity), memory.head)
    usable = window[memory._usable(window)]
    assert usable.tolist() == sorted(expected)
    batch = memory.transitions(usable)
    for i, row in enumerate(usable.tolist()):
        state, action, reward, next_state, terminal, discount = expected[row]
        assert np.array_equal(batch.state[i].numpy(), state)
        assert np.array_equal(batch.next_state[i].numpy(), next_state)
        assert batch.action[i] == action
        assert batch.terminal[i] == terminal
        assert batch.reward[i] == pytest.approx(reward, rel=1e-5, abs=1e-6)
        assert batch.discount[i] == pytest.approx(discount)


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("steps", [4, 40, 60, 75, 300])
def test_every_transition_equals_that_of_whole_episodes(tmp_path, n_step, steps):
    memory, naive = make(tmp_path, n_step=n_step), Naive(50, n_step)
    write_random_episodes([memory, naive], np.random.default_rng(steps), steps)
    check_equal(memory, naive)


def test_samples_are_uniform_over_the_usable_rows(tmp_path):
    memory = make(tmp_path)
    write_random_episodes([memory], np.random.default_rng(0), 120)
    window = np.arange(memory.head - memory.capacity, memory.head)
    usable = window[memory._usable(window)]
    states = memory.transitions(usable).state.flatten(1)
    drawn = memory.sample(20_000, np.random.default_rng(1)).state.flatten(1)
    counts = torch.stack([(drawn == state).all(1).sum() for state in states])
    assert counts.sum() == 20_000
    expected = 20_000 / len(usable)
    assert ((counts - expected) ** 2 / expected).sum() < len(usable) + 4 * (2 * len(usable)) ** 0.5


def test_the_present_state_repeats_the_first_frame_of_its_episode(tmp_path):
    memory = make(tmp_path)
    frames = [np.full(SHAPE, i, np.uint8) for i in range(6)]
    memory.begin(frames[0])
    memory.record(0, 0.0)
    memory.observe(frames[1])
    assert memory.newest()[:, 0, 0].tolist() == [0, 0, 0, 1]
    memory.record(0, 0.0, TERMINAL)
    memory.close(frames[2])
    assert memory.ends[2] == CLOSING
    memory.begin(frames[3])
    assert memory.newest()[:, 0, 0].tolist() == [3, 3, 3, 3]


def test_a_state_survives_what_was_written_after_it_by_a_killed_process(tmp_path):
    memory, naive = make(tmp_path), Naive(50, 1)
    generator = np.random.default_rng(3)
    write_random_episodes([memory, naive], generator, 200)
    state = memory.state_dict()
    written = memory.head
    while memory.head < written + 20:
        memory.record(1, 1.0)
        memory.observe(np.zeros(SHAPE, np.uint8))
    again = make(tmp_path)
    again.load_state_dict(state)
    check_equal(again, naive)


def test_more_writing_than_the_slack_is_refused(tmp_path):
    memory = make(tmp_path)
    write_random_episodes([memory], np.random.default_rng(3), 80)
    state = memory.state_dict()
    for _ in range(21):
        memory.record(1, 1.0)
        memory.observe(np.zeros(SHAPE, np.uint8))
    with pytest.raises(UserError, match="slack"):
        make(tmp_path).load_state_dict(state)


def test_files_that_are_gone_are_refused(tmp_path):
    memory = make(tmp_path)
    write_random_episodes([memory], np.random.default_rng(3), 80)
    state = memory.state_dict()
    memory.delete()
    with pytest.raises(UserError, match="keep_replay"):
        make(tmp_path).load_state_dict(state)


def test_a_memory_too_small_for_its_transitions_is_named(tmp_path):
    memory = make(tmp_path, capacity=4, n_step=5)
    write_random_episodes([memory], np.random.default_rng(0), 2)
    with pytest.raises(UserError, match="replay_size"):
        memory.sample(4, np.random.default_rng(0))


def test_a_disk_that_is_too_small_is_found_at_once(tmp_path):
    with pytest.raises(UserError, match="GB"):
        ReplayMemory(tmp_path, 10**13, (84, 84))
