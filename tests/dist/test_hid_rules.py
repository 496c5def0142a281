"""The parts of HID that look at a whole batch, or at all recommendations, see on two processes what one sees."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from leanlight.contracts.sessions import Catalogue, SessionBatch
from lit_modules.hid.intents import Intents
from lit_modules.hid.losses import ICLoss
from lit_modules.hid.metrics import ranking_metrics

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


def measured(part=slice(None)):
    """All metrics; the first half of the cases never sees the items that the second half sees."""
    clicks = torch.arange(ITEMS + 1)
    none = torch.zeros(0, dtype=torch.int64)
    catalogue = Catalogue(tuple(map(str, range(1, ITEMS + 1))), (), none, none, clicks, clicks > 12)
    recommended = torch.stack([torch.randperm(ITEMS // 2) + 1 + ITEMS // 2 * (case >= 6) for case in range(CASES)])
    metrics = ranking_metrics(catalogue, (2, 4))
    metrics.update(recommended[part], (torch.arange(CASES) * 7 % ITEMS + 1)[part])
    return metrics.compute()


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
    torch.manual_seed(2)
    halves = slice(0, 5) if rank == 0 else slice(5, CASES)
    torch.save({"gradients": found, "metrics": measured(halves)}, f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"result{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("number", range(len(LOSSES)), ids=lambda number: "-".join(map(str, LOSSES[number].values())))
def test_a_gathered_loss_has_the_gradient_of_the_whole_batch(results, number):
    expected = gradients(LOSSES[number])
    for found in (result["gradients"] for result in results):
        gathered, own = found[2 * number], found[2 * number + 1]
        for got, alone, wanted in zip(gathered, own, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(alone, wanted, rtol=1e-2)


def test_metrics_of_two_processes_are_those_of_one(results):
    torch.manual_seed(2)
    expected = measured()
    for result in results:
        for name, value in expected.items():
            torch.testing.assert_close(result["metrics"][name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert expected["coverage_2"] > 0.5  # neither process has seen so many items
