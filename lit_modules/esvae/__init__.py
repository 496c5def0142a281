"""ESVAE and its family: spiking image generation (Zhan et al., arXiv:2310.14839)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
