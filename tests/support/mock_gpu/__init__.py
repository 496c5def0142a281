"""A GPU for tests that have none: see `mock_gpu.tensors`. Nothing is registered before `register` is called."""

from mock_gpu.counts import COUNTS, Counts
from mock_gpu.tensors import DEVICE, NAME, DeviceTensor, register, why_unavailable

__all__ = ["COUNTS", "DEVICE", "NAME", "Counts", "DeviceTensor", "register", "why_unavailable"]
