import json
import multiprocessing
import random
import shutil
import signal
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import resume_run
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks import AtomicCheckpointIO, BestCheckpoint, ExactResume
from leanlight.contracts import UserError

SHAPES = {
    "automatic": {},
    "manual": {"manual": True},
    "steps Lightning does not count": {"manual": True, "use_optimizer": False},
    "validation inside the epoch": {"val_check_interval": 3},
    "validation after each batch": {"val_check_interval": 1, "log_every_n_steps": 2},
    "validation across epochs": {"val_check_interval": 4, "check_val_every_n_epoch": None, "max_steps": 18},
    "validation every other epoch": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "no validation": {"limit_val_batches": 0},
    "max_steps inside an epoch": {"max_steps": 17, "max_epochs": -1},
    "max_steps at the end of an epoch": {"max_steps": 14, "max_epochs": -1},
    "gradient accumulation": {"accumulate_grad_batches": 3},
    "accumulation and validation": {"accumulate_grad_batches": 2, "val_check_interval": 3},
    "epochs of one batch": {"limit_train_batches": 1, "max_epochs": 6},
    "saves far apart": {"every": 4},
}
HOOKS = {
    "on_train_batch_start": 21,
    "on_before_zero_grad": 21,
    "on_train_batch_end": 21,
    "on_validation_batch_end": 10,
    "on_validation_end": 4,
    "on_train_epoch_start": 3,
    "on_train_epoch_end": 3,
    "fsync": 20,
}


@pytest.fixture(autouse=True)
def quiet():
    warnings.simplefilter("ignore")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def checkpoint(folder):
    return str(folder / "checkpoints" / "last.ckpt")


def train_in_a_process(folder, expect, **options):
    """Train in a process of its own, so that it can be killed."""
    process = multiprocessing.get_context("fork").Process(target=resume_run.run, args=(folder,), kwargs=options)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == expect


@pytest.fixture
def every_state(tmp_path, monkeypatch):
    """Train in tmp_path/run and keep a copy of the run folder as it was after each save."""

    def train(**options):
        folder = tmp_path / "run"
        folder.mkdir()
        copies = []
        save = ExactResume._save

        def save_and_copy(self, *args):
            save(self, *args)
            copies.append(tmp_path / f"state{len(copies)}")
            shutil.copytree(folder, copies[-1])

        with monkeypatch.context() as patch:
            patch.setattr(ExactResume, "_save", save_and_copy)
            weights, rows, _ = resume_run.run(folder, **options)
        return weights, rows, copies

    return train


def assert_exact_from_each(every_state, options):
    weights, rows, copies = every_state(**options)
    assert len(copies) > 3
    for copy in copies[:-1]:
        with (copy / "rows.jsonl").open("a") as file:
            file.write('{"a row that came after the checkpoint": 1}\n')
        resumed, resumed_rows, _ = resume_run.run(copy, checkpoint(copy), **options)
        assert resumed_rows == rows, copy.name
        assert same(resumed, weights), copy.name
    finished, finished_rows, _ = resume_run.run(copies[-1], checkpoint(copies[-1]), **options)
    assert finished_rows == rows, "a finished run does nothing more"
    assert same(finished, weights)


def test_run_resumed_from_any_checkpoint_ends_with_the_same_weights_and_rows(every_state):
    assert_exact_from_each(every_state, {"val_check_interval": 3, "max_epochs": 2})


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_training_resumes_exactly(every_state, shape):
    assert_exact_from_each(every_state, SHAPES[shape])


def test_early_stopped_run_resumes_exactly_and_stays_finished(every_state):
    stop = EarlyStopping("val/loss", patience=1, min_delta=10.0)
    assert_exact_from_each(every_state, {"max_epochs": 6, "limit_train_batches": 2, "extra": [stop]})


@pytest.mark.parametrize("manual", [False, True])
def test_run_killed_without_warning_resumes_exactly(tmp_path, manual):
    hook, last = random.choice(list(HOOKS.items()))
    die = [hook, random.randint(2, last)]
    weights, rows, _ = resume_run.run(tmp_path / "whole", manual=manual, every=2)
    train_in_a_process(tmp_path / "killed", -signal.SIGKILL, manual=manual, every=2, die=die)
    resumed, resumed_rows, _ = resume_run.run(
        tmp_path / "killed", checkpoint(tmp_path / "killed"), manual=manual, every=2
    )
    assert resumed_rows == rows, die
    assert same(resumed, weights), die


@pytest.mark.slow
@pytest.mark.parametrize("hook", HOOKS)
def test_kill_in_every_hook_resumes_exactly(tmp_path, hook):
    weights, rows, _ = resume_run.run(tmp_path / "whole", every=2)
    for count in {2, HOOKS[hook] // 2 + 1, HOOKS[hook]}:  # the first call may come before there is a checkpoint
        folder = tmp_path / f"killed{count}"
        train_in_a_process(folder, -signal.SIGKILL, every=2, die=[hook, count])
        resumed, resumed_rows, _ = resume_run.run(folder, checkpoint(folder), every=2)
        assert resumed_rows == rows, count
        assert same(resumed, weights), count


@pytest.mark.slow
def test_two_processes_with_random_states_of_their_own_resume_exactly(tmp_path):
    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 11:
                raise RuntimeError("broken")

    two = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "every": 2}
    weights, rows, _ = resume_run.run(tmp_path / "whole", **two)
    with pytest.raises(Exception, match="broken"):
        resume_run.run(tmp_path / "failed", extra=[Fail()], **two)
    state = torch.load(checkpoint(tmp_path / "failed"), weights_only=True)
    first, second = (rank["rng"]["torch"] for rank in state["callbacks"]["ExactResume"]["ranks"])
    assert not torch.equal(first, second)
    resumed, resumed_rows, _ = resume_run.run(tmp_path / "failed", checkpoint(tmp_path / "failed"), **two)
    assert resumed_rows == rows
    assert same(resumed, weights)


def test_interrupt_saves_the_step_it_came_in(tmp_path):
    train_in_a_process(tmp_path / "stopped", 1, every=100, die=["on_train_batch_start", 5, signal.SIGINT])
    assert torch.load(checkpoint(tmp_path / "stopped"), weights_only=True)["global_step"] == 5
    weights, rows, _ = resume_run.run(tmp_path / "whole", every=100)
    resumed, resumed_rows, _ = resume_run.run(tmp_path / "stopped", checkpoint(tmp_path / "stopped"), every=100)
    assert resumed_rows == rows
    assert same(resumed, weights)


@pytest.mark.parametrize(
    ("short", "long"),
    [({"max_epochs": 1}, {"max_epochs": 3}), ({"max_steps": 7}, {"max_steps": 21})],
    ids=["epochs", "steps"],
)
def test_finished_run_made_longer_equals_a_run_that_was_long_from_the_start(tmp_path, short, long):
    weights, rows, _ = resume_run.run(tmp_path / "whole", **long)
    resume_run.run(tmp_path / "grown", **short)
    resumed, resumed_rows, _ = resume_run.run(tmp_path / "grown", checkpoint(tmp_path / "grown"), **long)
    assert resumed_rows == rows
    assert same(resumed, weights)


def test_validation_does_not_change_training(tmp_path):
    with_validation, *_ = resume_run.run(tmp_path / "a")
    without, *_ = resume_run.run(tmp_path / "b", limit_val_batches=0)
    weights = [name for name in without if name.startswith("net.")]
    assert all(torch.equal(with_validation[name], without[name]) for name in weights)


def test_checkpoints_load_without_trusting_them(tmp_path):
    resume_run.run(tmp_path, max_epochs=1)
    for name in ("last.ckpt", "best.ckpt"):
        torch.load(tmp_path / "checkpoints" / name, weights_only=True)


def test_a_checkpoint_of_another_writer_resumes_without_error(tmp_path):
    resume_run.run(tmp_path, max_epochs=2)
    _, _, trainer = resume_run.run(tmp_path, str(tmp_path / "checkpoints" / "best.ckpt"), max_epochs=3)
    assert trainer.current_epoch == 3


def test_testing_a_checkpoint_does_not_count_as_resuming(tmp_path):
    _, _, trainer = resume_run.run(tmp_path, max_epochs=1)
    resume = next(c for c in trainer.callbacks if isinstance(c, ExactResume))
    trainer.validate(dataloaders=resume_run.val_loader(), ckpt_path=checkpoint(tmp_path), verbose=False)
    assert resume._resumed is None


def test_saves_at_the_start_then_every_n_steps_then_at_the_end(every_state):
    _, _, copies = every_state(every=4, max_epochs=2)
    steps = [torch.load(copy / "checkpoints/last.ckpt", weights_only=True)["global_step"] for copy in copies]
    assert steps == [0, 4, 8, 12, 14]


def test_progress_is_saved_where_global_step_stands_still(every_state):
    _, _, copies = every_state(manual=True, use_optimizer=False, every=5, max_epochs=2)
    saved = [torch.load(copy / "checkpoints/last.ckpt", weights_only=True) for copy in copies]
    assert [int(state["state_dict"]["batches"]) for state in saved] == [0, 5, 10, 14]
    assert {state["global_step"] for state in saved} == {0}


@pytest.mark.parametrize("optimizer", [True, False])
def test_the_best_checkpoint_survives_a_kill_and_a_move_of_the_folder(tmp_path, optimizer):
    options = {"manual": not optimizer, "use_optimizer": optimizer}
    _, rows, _ = resume_run.run(tmp_path / "whole", **options)
    train_in_a_process(tmp_path / "killed", -signal.SIGKILL, die=["on_train_batch_end", 17], **options)
    shutil.move(tmp_path / "killed", tmp_path / "moved")
    resume_run.run(tmp_path / "moved", checkpoint(tmp_path / "moved"), **options)
    whole, moved = (
        torch.load(tmp_path / run / "checkpoints" / "best.ckpt", weights_only=True) for run in ("whole", "moved")
    )
    assert same(whole["state_dict"], moved["state_dict"])
    losses = [row["val/loss"] for row in map(json.loads, rows) if "val/loss" in row]
    assert whole["callbacks"]["BestCheckpoint min val/loss"]["best"] == pytest.approx(min(losses))


def test_a_metric_that_is_never_logged_is_named(tmp_path):
    module, trainer = resume_run.build(tmp_path, max_epochs=1)
    trainer.callbacks = [BestCheckpoint("val/misspelt", "min"), *trainer.callbacks]
    with pytest.raises(UserError, match=r"primary_metric: 'val/misspelt' was not logged, but .*val/loss"):
        trainer.fit(module, resume_run.Loader(), resume_run.val_loader())


def test_resume_on_another_number_of_processes_goes_on_and_warns(tmp_path):
    """From inside an epoch, whose means were to be taken over two processes."""
    train_in_a_process(tmp_path, -signal.SIGKILL, die=["on_train_batch_end", 10])
    state = torch.load(checkpoint(tmp_path), weights_only=True)
    for result in state["callbacks"]["ExactResume"]["ranks"][0]["epoch"]["logged"].values():
        result["sync"] = [True, False]
    state["callbacks"]["ExactResume"]["ranks"] *= 2
    torch.save(state, checkpoint(tmp_path))
    with pytest.warns(UserWarning, match="will not be exact"):
        _, rows, trainer = resume_run.run(tmp_path, checkpoint(tmp_path))
    assert trainer.global_step == 21
    steps = [row["at"] for row in map(json.loads, rows) if "train/loss_step" in row]
    assert steps == sorted(set(steps))


def test_interval_below_one_is_refused():
    with pytest.raises(UserError, match="at least 1, got 0"):
        ExactResume(0)


def test_fast_dev_run_writes_no_checkpoint(tmp_path):
    module, trainer = resume_run.build(tmp_path, fast_dev_run=True)
    trainer.fit(module, resume_run.Loader(), resume_run.val_loader())
    assert not (tmp_path / "checkpoints").exists()


def test_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    target = tmp_path / "last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"step": 1}, target)

    def half_written(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_written)
        with pytest.raises(OSError, match="No space"):
            plugin.save_checkpoint({"step": 2}, target)
    assert plugin.load_checkpoint(target) == {"step": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "sha256.json"}


def test_atomic_plugin_refuses_objects_when_loading_weights_only(tmp_path):
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"code": ModelCheckpoint}, tmp_path / "bad.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        plugin.load_checkpoint(tmp_path / "bad.ckpt")
