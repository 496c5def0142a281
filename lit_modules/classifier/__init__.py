"""The image classifier that all methods share: a baseline, a teacher, and what evaluates distilled and selected data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
