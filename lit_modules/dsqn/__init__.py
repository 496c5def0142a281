"""DSQN: deep spiking Q-networks, DQN and its converted copy (Liu et al., arXiv:2201.07211)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
