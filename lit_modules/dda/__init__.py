"""DDA and its family: distil a classifier without its data, by images that are inverted from it and varied."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
