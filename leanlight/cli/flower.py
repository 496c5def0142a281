"""`leanlight flower`: run a federation on Flower, in its simulation or on the nodes of a SuperLink."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanlight.cli.arguments import Parser, number, output_folder
from leanlight.configs_path import find_configs
from leanlight.contracts.errors import MissingExtraError, UserError
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from leanlight.experiment import LeanlightCLI

_PROJECT = """\
[project]
name = "leanlight-federation"
version = "1.0.0"
description = "A federation of Leanlight"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "leanlight"

[tool.flwr.app.components]
serverapp = "federation_server:app"
clientapp = "federation_client:app"
"""
# A module each: a node has no use for what the server imports.
_CLIENT = """\
from leanlight.flower import client_app

CONFIG = {config!r}
app = client_app(CONFIG)
"""
_SERVER = """\
from functools import partial

from federation_client import CONFIG
from leanlight.flower import build, server_app

app = server_app(partial(build, CONFIG), {timeout!r})
"""


def main(argv: list[str]) -> int:
    """Run a federation; an option that is none of this command is one of the config, as for `leanlight fit`."""
    parser = Parser(
        prog="leanlight flower",
        description=__doc__,
        epilog="Any option of `leanlight fit` but --resume may follow, as --KEY=VALUE.",
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="name or path; later ones are laid over the first")
    parser.add_argument("--superlink", metavar="NAME", help="a connection of Flower's config.toml; else a simulation")
    parser.add_argument(
        "--cpus", type=number(PositiveInt), default=1, help="of each client in a simulation (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus", type=number(NonNegativeFloat), default=0.0, help="share of a GPU of each client in a simulation"
    )
    parser.add_argument(
        "--timeout",
        type=number(PositiveFloat),
        default=3600.0,
        help="seconds to wait for nodes and answers (default: %(default)g)",
    )
    parser.add_argument(
        "--app", type=output_folder, metavar="DIR", help="only write the Flower app, for `flwr run DIR NAME`"
    )
    own = {option for action in parser._actions for option in action.option_strings}
    rest = [word for word in argv if word.startswith("--") and word.partition("=")[0] not in own]
    args = parser.parse_args([word for word in argv if word not in rest])
    for config in args.configs:
        find_configs(config)  # a misspelt one is told before a missing extra
    if find_spec("flwr") is None:
        raise MissingExtraError("flwr", "flower")
    if "--resume" in {word.partition("=")[0] for word in rest}:
        raise UserError("--resume: a federation on Flower starts anew; `leanlight fit --resume` goes on without it")
    cli = _federation([*(f"--config={config}" for config in args.configs), *rest])
    if (args.app or args.superlink) and cli.model.buffers_rule == "static":
        raise UserError("model.buffers: static reads all clients' images, which no server has; use average or keep")
    if args.app is not None:
        _write_app(args.app, cli, args.timeout)
        print(f"app: {args.app}; run it with: flwr run {args.app} NAME")
        return 0
    if args.superlink is not None:
        return _deploy(cli, args.superlink, args.timeout)
    return _simulate(cli, args.timeout, {"num_cpus": args.cpus, "num_gpus": args.gpus})


def _federation(words: Sequence[str]) -> LeanlightCLI:
    """What `leanlight fit` would run; UserError where Flower cannot."""
    from leanlight.experiment import LeanlightCLI
    from leanlight.flower.member import rounds_of
    from leanlight.invocation import expand
    from leanlight.messages import quiet_lightning

    quiet_lightning()
    cli = LeanlightCLI(expand(["fit", *words]))
    rounds_of(cli)
    return cli


def _simulate(cli: LeanlightCLI, timeout: float, resources: dict[str, Any]) -> int:
    """Each client a node of Flower's simulation."""
    if find_spec("ray") is None:
        raise MissingExtraError("ray", "flower")
    from leanlight.flower import simulate

    simulate(cli, timeout, resources)
    return 0


def _deploy(cli: LeanlightCLI, superlink: str, timeout: float) -> int:
    """Hand the federation to a SuperLink as a Flower app, and show its log until it ends."""
    with tempfile.TemporaryDirectory() as folder:
        _write_app(Path(folder), cli, timeout)
        code = "import sys; from flwr.cli.app import app; sys.argv[0] = 'flwr'; app()"
        command = [sys.executable, "-c", code, "run", folder, superlink, "--stream"]
        return subprocess.run(command, check=False).returncode


def _write_app(folder: Path, cli: LeanlightCLI, timeout: float) -> None:
    """A Flower app that needs this suite where it runs, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
    (folder / "federation_client.py").write_text(_CLIENT.format(config=cli.config_text()), encoding="utf-8")
    (folder / "federation_server.py").write_text(_SERVER.format(timeout=timeout), encoding="utf-8")
