"""Tensor operations that data and methods share: augmentation, corruption, whitening."""
