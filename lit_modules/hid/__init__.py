"""HID and its family: the next click of a session, popular items and the long tail seen side by side."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
