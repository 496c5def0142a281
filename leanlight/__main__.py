"""The command line's front door. Imports nothing heavy: each command loads what it needs."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from leanlight import __version__
from leanlight.contracts.errors import UserError, nearest

# command → (module with `main(argv) -> int`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("leanlight.cli.train", "train a model; --resume RUN_DIR goes on with an interrupted run"),
    "validate": ("leanlight.cli.train", "measure a model on validation data"),
    "test": ("leanlight.cli.train", "measure a model on test data; --from RUN_DIR takes a finished run's model"),
    "predict": ("leanlight.cli.train", "write a model's predictions; --from RUN_DIR as for test"),
    "run": ("leanlight.cli.run", "run a pipeline of stages, reusing those that are finished"),
    "reproduce": ("leanlight.cli.reproduce", "run what a result table lacks and write its figures and verdicts"),
    "report": ("leanlight.cli.report", "turn results into Markdown, figures and one HTML page"),
    "benchmark": ("leanlight.cli.benchmark", "measure speed and memory, compare two measurements"),
    "data": ("leanlight.cli.data", "list, prepare and check data sets"),
    "play": ("leanlight.cli.play", "let a trained agent play: scores and an animation"),
    "export": ("leanlight.cli.export", "write a trained model so that it works without this suite"),
    "methods": ("leanlight.cli.methods", "list methods, configs, tables and pipelines"),
}


def usage() -> str:
    """The help text of the program."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"leanlight {__version__}: research methods and their baselines on PyTorch Lightning",
            "",
            "usage: leanlight COMMAND [OPTIONS]      leanlight COMMAND --help tells more",
            "",
            *lines,
            "",
            "a first run:  leanlight fit --config classifier/fashion_mnist_small",
            "overlays:     --config trainer/ddp, --config logger/wandb_online, ... compose left to right",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    _cwd_last()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name, *rest = argv
    try:
        if name not in COMMANDS:
            raise UserError(f"command {name!r} is unknown{nearest(name, COMMANDS)}; `leanlight --help` lists them")
        module = import_module(COMMANDS[name][0])
        arguments = argv if COMMANDS[name][0] == "leanlight.cli.train" else rest
        return int(module.main(arguments) or 0)
    except UserError as error:
        print(f"leanlight: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("leanlight: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _cwd_last() -> None:
    """Import a user's own module from the working directory, but let no folder there hide a package of the suite."""
    here = os.getcwd()
    sys.path[:] = [*(entry for entry in sys.path if entry not in ("", here)), here]


if __name__ == "__main__":
    sys.exit(main())
