"""SFedCA: choosing the clients of a federation by how much training changes their firing."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
