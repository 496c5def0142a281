"""Rules that choose items of a labelled set: pure torch, positions out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
