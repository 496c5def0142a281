"""The image classifier that all methods share: baseline, teacher, and evaluation of distilled and selected data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
