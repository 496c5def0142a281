"""FalconEye: vision-language models that judge whether an instruction, a picture and an answer do harm."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
