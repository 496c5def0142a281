"""Federations of the suite on Flower (https://flower.ai): the same methods, on its simulation and its deployments."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
