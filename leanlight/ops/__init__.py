"""Tensor operations that data and methods share: augmentation, whitening."""
