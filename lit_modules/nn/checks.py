"""One-line errors for sizes that make no sense."""

from __future__ import annotations

from leanlight.contracts import UserError


def require_positive(**sizes: int) -> None:
    """Raise UserError naming the first of `sizes` that is not at least 1."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name}: expected an integer of at least 1, got {value}")


def pooled_size(image_size: int, halvings: int) -> int:
    """Side length of an `image_size` map after `halvings` poolings by 2; UserError when nothing is left."""
    size = image_size >> halvings
    if size < 1:
        raise UserError(f"image_size: expected at least {1 << halvings} for {halvings} poolings by 2, got {image_size}")
    return size
