"""SFedCA: choosing the clients of a federation by how much training changes their firing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_modules.federated import FederatedClassifier
    from lit_modules.sfedca.credit import CreditSelection, HighFiring, firing_intensity
    from lit_modules.sfedca.networks import ReLUCNN, SpikingCNN

_HOME = {
    "CreditSelection": "lit_modules.sfedca.credit",
    "FederatedClassifier": "lit_modules.federated",
    "HighFiring": "lit_modules.sfedca.credit",
    "ReLUCNN": "lit_modules.sfedca.networks",
    "SpikingCNN": "lit_modules.sfedca.networks",
    "firing_intensity": "lit_modules.sfedca.credit",
}

__all__ = ["CreditSelection", "FederatedClassifier", "HighFiring", "ReLUCNN", "SpikingCNN", "firing_intensity"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
