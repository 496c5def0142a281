"""Leanlight: lean learning on PyTorch Lightning."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`build` and `load` on first use: the command line must start without torch."""
    if name in ("build", "load"):
        from leanlight import experiment

        return getattr(experiment, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
