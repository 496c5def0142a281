"""Spike-NVPT and its baselines: tuning a frozen vision transformer by prompts, spiking or not."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
