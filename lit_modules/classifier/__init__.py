"""The image classifier that every method shares: baseline, teacher, and evaluation of distilled or selected data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
