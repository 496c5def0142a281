"""Labelled images: in memory, streamed from folders, or substituted by a synthetic training set."""
