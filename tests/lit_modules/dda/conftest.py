"""A small teacher with batch norm, trained on scikit-learn's digits in two seconds."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from lit_modules.nn import ConvNet


@pytest.fixture(scope="session")
def digits():
    """Images (1797, 1, 8, 8) in [0, 1] and labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16).float().view(-1, 1, 8, 8), torch.tensor(labels)


@pytest.fixture(scope="session")
def trained_teacher(digits):
    """A ConvNet that knows digits; a test that could change it copies it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ConvNet(in_channels=1, width=16, depth=3, norm="batch", image_size=8)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        image, label = digits
        for _ in range(8):
            for part in torch.randperm(1500).split(100):
                optimizer.zero_grad()
                F.cross_entropy(network(image[part]), label[part]).backward()
                optimizer.step()
    network.eval()
    with torch.no_grad():
        assert (network(image[1500:]).argmax(1) == label[1500:]).float().mean() > 0.9
    return network
