"""ESVAE and its family: spiking image generation (Zhan et al., arXiv:2310.14839)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_modules.esvae.ann import VAE, FeatureAutoencoder
    from lit_modules.esvae.module import ImageAutoencoder
    from lit_modules.esvae.networks import ESVAE, FSVAE, SAE

_HOME = {
    "ESVAE": "networks",
    "FSVAE": "networks",
    "FeatureAutoencoder": "ann",
    "ImageAutoencoder": "module",
    "SAE": "networks",
    "VAE": "ann",
}

__all__ = ["ESVAE", "FSVAE", "SAE", "VAE", "FeatureAutoencoder", "ImageAutoencoder"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
