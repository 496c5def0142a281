"""Images of the growing pool in batches of the bank: how often, which, and again after a kill."""

import math

import pytest
import torch

from leanlight.contracts import ImageBatch, UserError
from lit_modules.dda.pool import GrowingPool

SHAPE = (1, 4, 4)


def images(numbers):
    """An image that tells its number."""
    return torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None].expand(-1, *SHAPE)


def filled(folder, count, capacity=100):
    pool = GrowingPool(folder, capacity, SHAPE)
    numbers = torch.arange(count)
    pool.put(0, images(numbers.tolist()), numbers + 1000, numbers)
    pool.grow(count)
    return pool


def bank(size, dtype=torch.uint8):
    image = torch.full((size, *SHAPE), 200 if dtype == torch.uint8 else 0.5, dtype=dtype)
    return ImageBatch(image, torch.arange(size), torch.arange(size))


def test_bank_and_pool_are_drawn_uniformly_together(tmp_path):
    pool, size, passes = filled(tmp_path, 30), 50, 2000
    counts = torch.zeros(80)
    for number in range(passes):  # each is an epoch of one batch, that is of the whole bank
        counts += torch.bincount(pool.mix(bank(size), size, number).index, minlength=80)
    expected = passes * size / 80
    assert counts.sum() == passes * size
    of_bank, of_pool = counts[:50], counts[50:]
    # Five standard deviations of binomial counts: of one item, then of all items of the pool.
    assert (of_bank - expected).abs().max() < 5 * math.sqrt(expected * 0.4)
    assert (of_pool - expected).abs().max() < 5 * math.sqrt(expected)
    assert abs(of_pool.sum() - 30 * expected) < 5 * math.sqrt(passes * size * 0.375 * 0.625)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_item_of_the_pool_brings_all_that_belongs_to_it(tmp_path, dtype):
    pool, before = filled(tmp_path, 30), bank(40, dtype)
    copies = before.image.clone(), before.label.clone()
    mixed = pool.mix(before, 40, 5)
    of_pool = mixed.index >= 40
    assert 5 < of_pool.sum() < 35
    number = mixed.index[of_pool] - 40
    assert torch.equal(mixed.label[of_pool], number + 1000)
    scale = 1 if dtype == torch.uint8 else 255
    expected = images(number.tolist()).to(dtype) / scale
    torch.testing.assert_close(mixed.image[of_pool].float(), expected.float())
    assert torch.equal(mixed.index[~of_pool], torch.arange(40)[~of_pool])
    assert torch.equal(mixed.image[~of_pool], before.image[~of_pool])
    assert torch.equal(before.image, copies[0])
    assert torch.equal(before.label, copies[1])


def test_what_is_drawn_follows_from_the_seed_alone(tmp_path):
    pool = filled(tmp_path, 30)
    first = pool.mix(bank(40), 40, 5)
    torch.rand(3)
    assert torch.equal(pool.mix(bank(40), 40, 5).index, first.index)
    assert not torch.equal(pool.mix(bank(40), 40, 6).index, first.index)


def test_a_pool_goes_on_with_what_its_checkpoint_counted(tmp_path):
    pool = filled(tmp_path, 10)
    state = pool.state_dict()
    pool.put(10, images([77] * 10), torch.arange(10), torch.arange(10))  # and then it is killed
    again = GrowingPool(tmp_path, 100, SHAPE)
    again.take_over(state)
    assert len(again) == 10
    longer = GrowingPool(tmp_path, 300, SHAPE)
    longer.take_over(state)
    for resumed in (again, longer):
        resumed.grow(10)
        index = torch.arange(10)
        assert torch.equal(resumed.read(index)[0], images(range(10)))
        assert torch.equal(resumed.read(index)[1], index + 1000)
    with pytest.raises(UserError, match="is not there"):
        GrowingPool(tmp_path / "elsewhere", 100, SHAPE).take_over(state)


def test_processes_read_one_anothers_files(tmp_path):
    pools = [GrowingPool(tmp_path, 20, SHAPE, rank, 2) for rank in range(2)]
    for rank, pool in enumerate(pools):
        numbers = [100 * rank + number for number in range(6)]
        pool.put(0, images(numbers), torch.tensor(numbers), torch.zeros(6, dtype=torch.int64))
    for pool in pools:
        pool.grow(6)
    assert len(pools[0]) == len(pools[1]) == 12
    index = torch.randperm(12)
    found = [pool.read(index) for pool in pools]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].sort().values, torch.tensor([*range(6), *range(100, 106)]))
    assert torch.equal(found[0][0], images(found[0][1].tolist()))


def test_a_process_that_wrote_too_little_is_noticed(tmp_path):
    pools = [GrowingPool(tmp_path, 20, SHAPE, rank, 2) for rank in range(2)]
    pools[0].put(0, images([1, 2, 3]), torch.arange(3), torch.arange(3))
    pools[1].put(0, images([1, 2]), torch.arange(2), torch.arange(2))
    with pytest.raises(RuntimeError, match="never written"):
        pools[0].grow(3)
