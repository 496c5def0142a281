"""Noise on images on the device that is not there: the CPU's, and nothing of it waits."""

import torch
from mock_gpu import COUNTS, DEVICE, register

from leanlight.ops.corruptions import NOISES, Corruption

torch.set_num_threads(1)
register()
image, index = torch.rand(8, 3, 16, 16), torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])
there, numbers = image.to(DEVICE), index.to(DEVICE)
for corrupt in (Corruption(name, severity) for name in NOISES for severity in (1, 5)):
    corrupt(there, numbers)  # tables are copied once
    COUNTS.take()
    noisy = corrupt(there, numbers)
    counts = COUNTS.plain()
    assert not counts["waits"], (corrupt, counts)
    assert not counts["copies"], (corrupt, counts)
    torch.testing.assert_close(noisy.cpu(), corrupt(image, index), rtol=0, atol=1e-6)
