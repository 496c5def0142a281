"""Leanlight: lean learning on PyTorch Lightning."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`build` and `load` on first use: the command line must start without torch."""
    if name == "build":
        from leanlight.experiment import build

        return build
    if name == "load":
        from leanlight.sharing.reading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
