"""Measurements of speed and memory. `core` is shared; one module a method holds its ``run(quick) -> Measurement``."""
