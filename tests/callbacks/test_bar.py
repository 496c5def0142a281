"""The bar fits the terminal; without one, lines tell how far a run is."""

import io
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from rich.console import Console
from rich.progress import Progress

from callbacks.bar import ProgressLines, TerminalBar
from leanlight.contracts import PrimaryMetric


@pytest.mark.parametrize("width", [20, 50, 80])
def test_the_bar_is_one_line_of_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    bar, out = TerminalBar(), io.StringIO()
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[bar], enable_checkpointing=False)
    console = Console(file=out, width=width, force_terminal=True, no_color=True)
    with Progress(*bar.configure_columns(trainer), console=console, auto_refresh=False) as progress:
        progress.add_task("Epoch 3/19  ", total=400, completed=120)
    shown = out.getvalue()
    assert "120/400" in shown
    assert "…" not in shown


def test_a_line_says_how_far_training_is_and_what_validation_gave():
    lines = ProgressLines()
    batches = SimpleNamespace(current=SimpleNamespace(completed=50))
    lines._trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit", stage="validate"),
        sanity_checking=False,
        max_epochs=4,
        current_epoch=1,
        num_training_batches=100,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=batches)),
        callback_metrics={"val/accuracy": 0.91234},
    )
    lines.on_validation_end(lines._trainer, SimpleNamespace(primary_metric=PrimaryMetric("val/accuracy", "max")))
    line = lines.line()
    assert line.startswith("epoch 2/4, batch 50/100, validation, val/accuracy 0.9123, ")
    assert "left" in line


def test_lines_are_told_by_themselves_until_the_end(capsys):
    lines = ProgressLines(every_s=0.01)
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[lines], enable_checkpointing=False, max_epochs=2)
    said = []
    lines.line = lambda: said.append(len(said)) or "still at it"
    lines.setup(trainer, pl.LightningModule(), "fit")
    ended = lines._ended
    while len(said) < 2:
        ended.wait(0.01)
    lines.teardown(trainer, pl.LightningModule(), "fit")
    assert ended.is_set()
    assert "still at it" in capsys.readouterr().out
