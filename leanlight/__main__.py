"""The command line's front door. Imports nothing heavy: each command loads what it needs."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import import_module

from leanlight import __version__
from leanlight.contracts.errors import UserError, nearest
from leanlight.import_path import order_path
from leanlight.messages import disk_problem, memory_errors
from leanlight.registry import commands, methods
from leanlight.terminal import enduring_output


def usage() -> str:
    """The help text of the program."""
    width = max(map(len, commands()))
    return "\n".join(
        [
            f"leanlight {__version__}: research methods and their baselines on PyTorch Lightning",
            "",
            "usage: leanlight COMMAND [OPTIONS]      leanlight COMMAND --help tells more",
            "",
            *(f"  {name:<{width}}  {command.help}" for name, command in commands().items()),
            "",
            f"methods:      {', '.join(methods())}",
            "a first run:  leanlight fit --config classifier/fashion_mnist_small",
            "overlays:     --config trainer/ddp, --config logger/wandb_online, ... compose left to right",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    with enduring_output():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int:
    order_path()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name, *rest = argv
    try:
        if name not in commands():
            raise UserError(f"command {name!r} is unknown{nearest(name, commands())}; `leanlight --help` lists them")
        path = commands()[name].module
        arguments = argv if path == "leanlight.cli.train" else rest  # one module for the four commands of Lightning
        with memory_errors():
            return int(import_module(path).main(arguments) or 0)
    except UserError as error:
        print(f"leanlight: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("leanlight: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (problem := disk_problem(error)) is None:
            raise
        run = os.environ.get("LEANLIGHT_RUN_DIR")  # of a training that has begun
        resumes = run and name in ("fit", "predict")
        again = f", then go on with: leanlight {name} --resume {shlex.quote(str(run))}" if resumes else ""
        print(f"leanlight: error: {problem}; free some space{again}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
