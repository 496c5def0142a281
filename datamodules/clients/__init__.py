"""Clients of a simulated federation.

`partition`: pure functions that spread labelled items over clients. `module`: `FederatedDataModule`, which hands them
out.
"""
