"""Contracts between data, methods and callbacks. Imports only torch, numpy and the standard library.

Names load on first use, so that the command line can read the errors without importing torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
