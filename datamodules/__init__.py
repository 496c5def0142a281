"""Reusable LightningDataModules, by kind of data. Names load on first use: the catalogue alone needs no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
