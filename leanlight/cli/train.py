"""`leanlight fit|validate|test|predict`."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Run a subcommand of LightningCLI; 0 done, 130 interrupted. Raises UserError for bad input."""
    if {"-h", "--help"} & set(argv):
        from leanlight.cli.training_help import training_help

        print(training_help(argv))
        return 0
    from leanlight.allocator import keep_freed_memory
    from leanlight.experiment import LeanlightCLI, Session
    from leanlight.invocation import expand
    from leanlight.messages import quiet_lightning

    if estimates := argv[0] == "fit" and "--estimate" in argv:
        argv = [word for word in argv if word != "--estimate"]
    keep_freed_memory()
    quiet_lightning()
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
