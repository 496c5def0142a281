"""A finished run of the classifier, made in this process in one step, for tests of what is done with runs."""

import shutil

import leanlight

QUICK = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 1, "trainer.limit_val_batches": 1}


def one_step_run(folder):
    """Train, and return the run's folder, ``run`` in `folder`."""
    root = {"trainer.default_root_dir": str(folder), "trainer.enable_progress_bar": False}
    trainer, model, data = leanlight.build("classifier/digits_small", QUICK | root)
    trainer.fit(model, data)
    return shutil.move(trainer.default_root_dir, folder / "run")
