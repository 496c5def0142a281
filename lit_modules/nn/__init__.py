"""Networks that several methods share: pure torch, float images in [0, 1] in, logits out.

Names load lazily, so that a method that needs a ConvNet does not pay for torchvision or spikingjelly.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
