"""`leanlight fit|validate|test|predict`."""

from leanlight.experiment import main

__all__ = ["main"]
