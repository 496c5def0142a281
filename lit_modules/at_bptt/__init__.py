"""AT-BPTT and its family: dataset distillation through truncated unrolled training (Li et al., arXiv:2510.04838)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
