"""Clients of a simulated federation: partitions of images and the DataModule that hands them out."""
