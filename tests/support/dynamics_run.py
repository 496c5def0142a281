"""Record made-up outputs on two gloo processes, with an item that both have; may stop and go on inside an epoch.

python dynamics_run.py FILE RANK RENDEZVOUS
"""

import sys

import torch
import torch.distributed as dist

from lit_modules.selection import TrainingDynamics

ITEMS, CLASSES, EPOCHS = 9, 3, 2
LABEL = torch.arange(ITEMS) % CLASSES


def batches(epoch, rank, world):
    """Index and logits of a rank's batches: of 2 * `world` items, the last filled up from the start of the order."""
    order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(epoch))
    size = 4
    for number, start in enumerate(range(0, ITEMS, size)):
        index = order[start : start + size]
        index = torch.cat([index, order[: -len(index) % world]]).view(world, -1)[rank]
        drawn = [torch.Generator().manual_seed(1000 * epoch + 100 * number + int(item)) for item in index]
        yield number, index, torch.stack([torch.randn(CLASSES, generator=generator) for generator in drawn])


def recorded(rank=0, world=1, stop=None):
    """Dynamics after all epochs; with `stop` carried over to new ones after so many batches of the last epoch."""
    dynamics = TrainingDynamics(ITEMS)
    for epoch in range(EPOCHS):
        for number, index, logits in batches(epoch, rank, world):
            if epoch == EPOCHS - 1 and number == stop:
                state = dynamics.state_dict()
                dynamics = TrainingDynamics(ITEMS)
                dynamics.load_state_dict(state)
            dynamics.record(index, logits, LABEL[index], number)
        dynamics.end_epoch()
    return dynamics.by_item()


if __name__ == "__main__":
    file, rank, rendezvous = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    results = {stop: recorded(rank, 2, stop) for stop in (None, 0, 1, 2)}
    gathered = [None, None]
    dist.all_gather_object(gathered, results)
    if rank == 0:
        torch.save(gathered, file)
    dist.destroy_process_group()
