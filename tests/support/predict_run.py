"""Predict the digits into a folder, with text; may kill its process group on the way.

python predict_run.py FOLDER [--processes N] [--kill-at CALL] [--kill-rank RANK] [--split SPLIT] [--fresh] [--plain]
"""

import argparse
import os
import signal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import PredictionWriter
from datamodules import ImageDataModule


class Module(pl.LightningModule):
    """What comes out for an item depends on its neighbours in the batch, as floating point does in its last bits."""

    def __init__(self, kill_at=0, kill_rank=0):
        super().__init__()
        self.kill_at, self.kill_rank, self.calls = kill_at, kill_rank, 0

    def predict_step(self, batch, batch_idx):
        self.calls += 1
        if self.calls == self.kill_at and self.global_rank == self.kill_rank:
            os.killpg(0, signal.SIGKILL)
        image = batch.image.flatten(1)
        text = [f"{index}: «{value:.9f}»\n…" for index, value in zip(batch.index, image.mean(1), strict=True)]
        return {
            "index": batch.index,
            "features": image - image.mean(0),
            "label": batch.label,
            "half": image[:, :2].bfloat16(),
            "text": text,
            "split": tuple(f"{self.trainer.datamodule.predict_split}" for _ in text),
        }


class Plain(ImageDataModule):
    """A DataModule that cannot leave items out."""

    skip_predicted = None


class Count(Callback):
    """Say how many batches this process went through."""

    def teardown(self, trainer, pl_module, stage):
        print(f"rank {trainer.global_rank}: {pl_module.calls} batches", flush=True)


def predict(folder, processes=1, split="test", plain=False, resume=True, kill_at=0, kill_rank=0, **data):
    torch.set_num_threads(1)
    settings = {"predict_split": split, "eval_batch_size": 8, "download": False} | data
    data = (Plain if plain else ImageDataModule)("digits", **settings)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PredictionWriter(piece_items=40, resume=resume), Count()],
    )
    module = Module(kill_at, kill_rank)
    assert trainer.predict(module, datamodule=data) is None
    return module.calls


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--split", default="test")
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--kill-rank", type=int, default=0)
    parser.add_argument("--fresh", dest="resume", action="store_false")
    parser.add_argument("--plain", action="store_true")
    predict(**vars(parser.parse_args()))
