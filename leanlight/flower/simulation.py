"""A federation on Flower's simulation: nodes in processes of Ray, the server in this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.simulation import run_simulation

from leanlight.experiment import LeanlightCLI
from leanlight.flower.client import client_app
from leanlight.flower.server import server_app


def simulate(cli: LeanlightCLI, timeout: float = 3600.0, resources: Mapping[str, Any] | None = None) -> None:
    """Run a federation, each client a node.

    Args:
        cli: trainer, model and data.
        timeout: seconds to wait for nodes and answers.
        resources: of a client, ``num_cpus`` and ``num_gpus``; one core by default.
    """
    cli.datamodule.ensure_available()
    cli.datamodule.setup("fit")
    run_simulation(
        server_app(lambda: cli, timeout),
        client_app(cli.config_text()),
        num_supernodes=len(cli.datamodule.client_sizes),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0, **(resources or {})}},
    )
