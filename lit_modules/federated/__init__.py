"""Federated learning, simulated: local training, objectives, aggregation and the module that the methods share."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_modules.federated.aggregation import FedAvg, FedNova
    from lit_modules.federated.local import FedProx, LocalObjective, LocalTraining, Scaffold
    from lit_modules.federated.module import FederatedClassifier
    from lit_modules.federated.selection import LargestClients, LargestUpdate, PowerOfChoice, RandomClients

_HOME = {
    "FedAvg": "aggregation",
    "FedNova": "aggregation",
    "FedProx": "local",
    "FederatedClassifier": "module",
    "LargestClients": "selection",
    "LargestUpdate": "selection",
    "LocalObjective": "local",
    "LocalTraining": "local",
    "PowerOfChoice": "selection",
    "RandomClients": "selection",
    "Scaffold": "local",
}

__all__ = [
    "FedAvg",
    "FedNova",
    "FedProx",
    "FederatedClassifier",
    "LargestClients",
    "LargestUpdate",
    "LocalObjective",
    "LocalTraining",
    "PowerOfChoice",
    "RandomClients",
    "Scaffold",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
