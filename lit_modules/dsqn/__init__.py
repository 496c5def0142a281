"""DSQN: deep spiking Q-networks, DQN and its converted copy (Liu et al., arXiv:2201.07211)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_modules.dsqn.conversion import ConvertedDQN, convert
    from lit_modules.dsqn.module import Conversion, DeepQLearning
    from lit_modules.dsqn.networks import DQN, DSQN

_HOME = {
    "Conversion": "module",
    "ConvertedDQN": "conversion",
    "DQN": "networks",
    "DSQN": "networks",
    "DeepQLearning": "module",
    "convert": "conversion",
}

__all__ = ["DQN", "DSQN", "Conversion", "ConvertedDQN", "DeepQLearning", "convert"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
