"""ADQ and DQ: keep a fraction of a labelled set, drawn from bins of it (Li et al. 2025, Zhou et al. 2023)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
