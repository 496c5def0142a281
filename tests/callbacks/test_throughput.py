import json

import pytest
import resume_run
import torch

from callbacks import ThroughputMonitor
from callbacks.common import items_in
from leanlight.contracts import ImageBatch

ITEMS_AN_EPOCH = sum(3 + number % 2 for number in range(resume_run.BATCHES))


def test_figures_go_to_a_file_of_their_own_and_not_into_the_rows(tmp_path):
    _, rows, _ = resume_run.run(tmp_path, max_epochs=2, extra=[ThroughputMonitor()])
    figures = json.loads((tmp_path / "throughput.json").read_text())
    assert figures["samples_seen"] == 2 * ITEMS_AN_EPOCH
    assert figures["train/samples_per_s"] / figures["train/steps_per_s"] == pytest.approx(
        ITEMS_AN_EPOCH / resume_run.BATCHES
    )
    assert 0 <= figures["train/outside_share"] <= 1
    assert figures["peak_rss_mb"] > 50
    assert not any("per_s" in row or "rss" in row for row in rows)


def test_totals_go_on_after_a_resume(tmp_path):
    resume_run.run(tmp_path, max_epochs=1, extra=[ThroughputMonitor()])
    before = json.loads((tmp_path / "throughput.json").read_text())
    monitor = ThroughputMonitor()
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    resume_run.run(tmp_path, last, max_epochs=3, extra=[monitor])
    assert monitor.samples_seen == 3 * ITEMS_AN_EPOCH
    assert monitor.train_wall_s > before["train_wall_s"]


def test_measuring_an_earlier_checkpoint_leaves_the_totals_of_the_training(tmp_path):
    resume_run.run(tmp_path / "short", max_epochs=1, extra=[ThroughputMonitor()])
    earlier = str(tmp_path / "short" / "checkpoints" / "last.ckpt")
    monitor = ThroughputMonitor()
    _, _, trainer = resume_run.run(tmp_path / "long", extra=[monitor])
    trained = monitor.train_wall_s
    trainer.validate(trainer.lightning_module, resume_run.val_loader(), ckpt_path=earlier, verbose=False)
    assert (monitor.samples_seen, monitor.train_wall_s) == (3 * ITEMS_AN_EPOCH, trained)
    alone = ThroughputMonitor()  # a process that trained nothing says what the checkpoint knows
    module, trainer = resume_run.build(tmp_path / "long", extra=[alone])
    trainer.validate(module, resume_run.val_loader(), ckpt_path=earlier, verbose=False)
    assert alone.samples_seen == ITEMS_AN_EPOCH


@pytest.mark.parametrize(
    ("batch", "items"),
    [
        (ImageBatch(torch.zeros(5, 1, 2, 2), torch.zeros(5), torch.zeros(5)), 5),
        (torch.zeros(4, 2), 4),
        ((torch.zeros(3, 2), torch.zeros(3)), 3),
        (7, 1),
    ],
)
def test_batches_of_every_kind_are_counted(batch, items):
    assert items_in(batch) == items
