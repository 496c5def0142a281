"""`leanlight fit|validate|test|predict`."""

from __future__ import annotations

import logging
import warnings


def main(argv: list[str]) -> int:
    """Run a subcommand of LightningCLI; 0 done, 130 interrupted. Raises UserError for bad input."""
    if {"-h", "--help"} & set(argv):
        from leanlight.cli.training_help import training_help

        print(training_help(argv))
        return 0
    from leanlight.allocator import keep_freed_memory
    from leanlight.experiment import LeanlightCLI, Session
    from leanlight.invocation import expand

    if estimates := argv[0] == "fit" and "--estimate" in argv:
        argv = [word for word in argv if word != "--estimate"]
    keep_freed_memory()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    # A pre-trained network stays in evaluation mode while prompts are tuned.
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
    # A module that puts images of its own into batches, before the data scales and augments them.
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)  # device lists and advertisements, on every start
    if estimates:
        from leanlight.estimate import main as estimate

        return estimate(expand(argv))
    try:
        Session(LeanlightCLI(expand(argv))).run()
    except SystemExit as error:  # Lightning ends an interrupted fit this way
        if error.code in (0, None):
            return 0
        raise KeyboardInterrupt from error
    return 0
