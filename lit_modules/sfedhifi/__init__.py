"""SFedHIFI: federated spiking networks of different widths that share their bases (Tao et al., arXiv:2603.14956)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_modules.sfedhifi.decomposition import DecomConv
    from lit_modules.sfedhifi.fusion import HIFI
    from lit_modules.sfedhifi.module import WidthFederation
    from lit_modules.sfedhifi.networks import (
        FactorisedCNN,
        FactorisedResNet18,
        FactorisedSpikingCNN,
        FactorisedSpikingResNet18,
    )
    from lit_modules.sfedhifi.widths import DynamicWidths, FixedWidths, InformativeLayer

_HOME = {
    "DecomConv": "decomposition",
    "DynamicWidths": "widths",
    "FactorisedCNN": "networks",
    "FactorisedResNet18": "networks",
    "FactorisedSpikingCNN": "networks",
    "FactorisedSpikingResNet18": "networks",
    "FixedWidths": "widths",
    "HIFI": "fusion",
    "InformativeLayer": "widths",
    "WidthFederation": "module",
}

__all__ = [
    "HIFI",
    "DecomConv",
    "DynamicWidths",
    "FactorisedCNN",
    "FactorisedResNet18",
    "FactorisedSpikingCNN",
    "FactorisedSpikingResNet18",
    "FixedWidths",
    "InformativeLayer",
    "WidthFederation",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
