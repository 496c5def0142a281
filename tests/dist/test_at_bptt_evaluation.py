"""Evaluation networks train at the same time on two processes, and score as on one."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lit_modules.at_bptt.evaluation import TrainedNetworks, train_on_sets
from lit_modules.at_bptt.together import Course
from lit_modules.classifier.training import Recipe

SEEDS, COURSE = [3, 4, 5], Course(Recipe(epochs=3, batch_size=4, lr=0.1), [1, 3])


class Alone:
    """One process."""

    global_rank, world_size = 0, 1

    def broadcast(self, obj, src=0):
        return obj

    def reduce(self, tensor, *, reduce_op):
        return tensor


class Gloo(Alone):
    """What a strategy of Lightning does, by gloo."""

    def __init__(self, rank):
        self.global_rank, self.world_size = rank, 2

    def broadcast(self, obj, src=0):
        objects = [obj if self.global_rank == src else None]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor, *, reduce_op):
        dist.all_reduce(tensor)
        return tensor


class Judge(nn.Module):
    """A network that comes into being only when the other process makes one, too."""

    meeting = None

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        if Judge.meeting is not None:
            meet(*Judge.meeting)

    def forward(self, image):
        return self.layer(image.flatten(1))


def meet(folder, rank):
    """Wait until the other process has come here as often."""
    number = len(list(Path(folder).glob(f"{rank}_*")))
    Path(folder, f"{rank}_{number}").touch()
    give_up = time.monotonic() + 30
    while not Path(folder, f"{1 - rank}_{number}").exists():
        if time.monotonic() > give_up:
            raise TimeoutError("the other process trains nothing meanwhile")
        time.sleep(0.01)


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 2, 3, generator=generator), torch.arange(count) % 3


def evaluate(processes):
    """Accuracies on this process' half of twelve images of networks trained on two sets."""
    trained = TrainedNetworks(SEEDS, torch.device("cpu"), processes)
    for name, seed in (("set", 0), ("random", 1)):
        train_on_sets([trained], name, [images(9, seed)], Judge, COURSE)
    trained.exchange()
    image, label = images(12, 2)
    rank, world = processes.global_rank, processes.world_size
    trained.count(image[rank::world], label[rank::world])
    return trained.accuracies()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    Judge.meeting = folder, rank
    torch.save(evaluate(Gloo(rank)), f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


def test_networks_of_two_processes_train_side_by_side_and_score_as_on_one(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    expected = evaluate(Alone())
    assert expected["set"].shape == (2, 3)
    assert len({score.item() for score in torch.cat([*expected.values()]).flatten()}) > 1
    for rank in (0, 1):
        got = torch.load(tmp_path / f"result{rank}.pt")
        for name, value in expected.items():
            assert torch.equal(got[name], value), name
