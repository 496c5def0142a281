"""What happens around training: resume, guards, media, spikes, energy, robustness, throughput, export, federations.

Names load on first use, so that importing one callback does not import the libraries of the others.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
