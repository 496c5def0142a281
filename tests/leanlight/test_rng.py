"""Random states travel between machines with different GPUs."""

import pytest
import torch

from leanlight.contracts import capture_rng, isolated_rng, restore_rng


class Gpus:
    """Stands in for `torch.cuda` with some GPUs: a generator each."""

    def __init__(self, count, current=0):
        self.current, self.generators = current, [torch.Generator().manual_seed(number) for number in range(count)]

    def is_initialized(self):
        return True

    is_available = is_initialized

    def current_device(self):
        return self.current

    def get_rng_state(self):
        return self.generators[self.current].get_state()

    def set_rng_state(self, state, device=None):
        self.generators[self.current if device is None else device].set_state(state)

    def get_rng_state_all(self):
        return [generator.get_state() for generator in self.generators]

    def set_rng_state_all(self, states):
        for number, state in enumerate(states):
            self.set_rng_state(state, number)

    def manual_seed(self, seed):
        self.generators[self.current].manual_seed(seed)

    def manual_seed_all(self, seed):
        for generator in self.generators:
            generator.manual_seed(seed)

    def draw(self, number=None):
        return torch.rand((), generator=self.generators[self.current if number is None else number]).item()


@pytest.fixture
def gpus(monkeypatch):
    def put(count, current=0):
        made = Gpus(count, current)
        for name in dir(Gpus):
            if not name.startswith("_") and hasattr(torch.cuda, name):
                monkeypatch.setattr(torch.cuda, name, getattr(made, name))
        return made

    return put


def test_the_state_of_a_gpu_is_restored_where_fewer_are_visible(gpus):
    saving = gpus(4, current=2)
    state = capture_rng()
    expected = saving.draw()
    resuming = gpus(1)
    restore_rng(state)
    assert resuming.draw() == expected


def test_a_checkpoint_with_the_states_of_all_gpus_still_restores_that_of_this_process(gpus):
    saving = gpus(4)
    state = {**capture_rng(), "cuda": saving.get_rng_state_all()}
    expected = [saving.draw(number) for number in range(4)]
    second = gpus(2, current=1)
    restore_rng(state)
    assert second.draw() == expected[1]
    alone = gpus(1)
    restore_rng(state)
    assert alone.draw() == expected[0]


def test_other_gpus_are_left_alone(gpus):
    """They belong to other processes."""
    here = gpus(2, current=1)
    before = [generator.get_state() for generator in here.generators]
    with isolated_rng(seed=7):
        assert torch.equal(here.generators[0].get_state(), before[0])
        here.draw()
    assert torch.equal(here.generators[1].get_state(), before[1])
