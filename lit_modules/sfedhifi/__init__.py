"""SFedHIFI: federated spiking networks of different widths that share their bases (Tao et al., arXiv:2603.14956)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
