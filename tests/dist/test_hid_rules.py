"""The parts of HID that look at a whole batch, or at all recommendations, see on two processes what one sees."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from leanlight.contracts.sessions import SessionBatch
from lit_modules.hid.intents import Intents
from lit_modules.hid.losses import ICLoss

CASES, ITEMS, DIM = 12, 20, 5
LOSSES = [
    {"form": form, "against": against, "sigma": 0.3}
    for form in ("paper", "released")
    for against in ("intents", "last_items")
]


def gradients(options, part=slice(None)):
    """Of the weights of a tiny model, from a share of the cases."""
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(1, ITEMS + 1, (CASES, 4), generator=generator)
    target = torch.randint(1, ITEMS + 1, (CASES,), generator=generator)
    batch = SessionBatch(items, torch.full((CASES,), 4), target, torch.arange(CASES)).select(torch.arange(CASES)[part])
    table = torch.randn(ITEMS + 1, DIM, generator=generator, requires_grad=True)
    weight = torch.randn(DIM, DIM, generator=generator, requires_grad=True)
    intents = Intents(torch.arange(1, ITEMS + 1), torch.arange(ITEMS) % 6, 6, ITEMS)
    session = table[batch.items].mean(1) @ weight
    return torch.autograd.grad(ICLoss(**options)(session, batch, table, intents), (table, weight))


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    found = []
    for options in LOSSES:
        for gather in (True, False):
            got = gradients({**options, "gather": gather}, slice(rank, None, 2))
            for each in got:
                dist.all_reduce(each)
            found.append([each / 2 for each in got])
    torch.save(found, f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"result{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("number", range(len(LOSSES)), ids=lambda number: "-".join(map(str, LOSSES[number].values())))
def test_a_gathered_loss_has_the_gradient_of_the_whole_batch(results, number):
    expected = gradients(LOSSES[number])
    for found in results:
        gathered, own = found[2 * number], found[2 * number + 1]
        for got, alone, wanted in zip(gathered, own, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(alone, wanted, rtol=1e-2)
