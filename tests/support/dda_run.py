"""A student of noise images, or a bank: by one process, or by one of two that are started with this script.

python dda_run.py FOLDER VARIANT RANK PORT [STOP]
"""

import os
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

from callbacks import ExactResume
from datamodules import BankDataModule, NoiseDataModule
from lit_modules.dda import BankSynthesis, DataFreeDistillation, GeneratorInversion, Teacher
from lit_modules.nn import ConvNet

CONV = partial(ConvNet, in_channels=1, image_size=8, depth=2)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
POOL = {
    "synthesis": GeneratorInversion(steps=2, width=4, rotation_weight=10.0),
    "synthesis_items": 6,
    "synthesis_rounds": 2,
    "latent_size": 8,
}
#: Width, norm and options of the student. Of one batch in two halves, batch norm would see other statistics.
VARIANTS = {
    "bank": ("none", {"recipe": "kl", "temperature": 4.0, "self_weight": 0.5, "clip": 0.1}),
    "pool": ("batch", {"recipe": "kl_ce_fea", "self_weight": 0.1, **POOL}),
}


class Stop(pl.Callback):
    """Breaks off before the batch of this number."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.global_step == self.at:
            raise RuntimeError("killed")


def make_teacher(folder):
    """Write the weights of a teacher that two processes shall share."""
    torch.manual_seed(0)
    torch.save(CONV(norm="batch", width=6).state_dict(), Path(folder) / "teacher.pt")


def parts(teacher, variant, world):
    """Module and data: of a student, or for the variant `synthesis` of a bank of five calls."""
    if variant == "synthesis":
        data = NoiseDataModule("digits", items=60, batch_size=12, latent_size=8)
        return BankSynthesis(teacher, GeneratorInversion(steps=3, width=4)), data
    norm, options = VARIANTS[variant]
    data = BankDataModule(dataset="digits", instead="noise", items=60, batch_size=12 // world, drop_last=True)
    return DataFreeDistillation(partial(CONV, norm=norm, width=4), teacher, optimizer=SGD, **options), data


def trained(folder, variant, world=1, stop=None):
    """Fit, or go on with a fit in `folder`, beside which the teacher lies; the module and its Trainer."""
    folder = Path(folder)
    last = folder / "checkpoints" / "last.ckpt"
    teacher = Teacher(network=partial(CONV, norm="batch", width=6), weights=folder.parent / "teacher.pt")
    pl.seed_everything(3, verbose=False)
    module, data = parts(teacher, variant, world)
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=1 if variant == "synthesis" else 3,
        logger=False,
        callbacks=[ExactResume(1), *([] if stop is None else [Stop(stop)])],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    return module, trainer


if __name__ == "__main__":
    folder, variant, rank, port, *stop = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=rank, NODE_RANK="0")
    torch.set_num_threads(1)
    module, trainer = trained(folder, variant, 2, int(stop[0]) if stop else None)
    if variant == "synthesis":
        if trainer.is_global_zero:
            module.export(Path(folder))
        sys.exit()
    pool = module._pool
    result = {
        "state": module.state_dict(),
        "values": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "pool": None if pool is None else [len(pool), len(pool.own), *pool.read(torch.arange(len(pool)))],
        "own": None if pool is None else torch.from_numpy(pool.own.images.copy()),
    }
    torch.save(result, Path(folder).parent / f"rank{rank}.pt")
