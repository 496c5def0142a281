"""TiCAL and its family: emotion recognition that knows when text, voice and face disagree."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
