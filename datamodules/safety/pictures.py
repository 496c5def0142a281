"""Pictures of samples: found at once, decoded when they are asked for, and never more than their limits allow.

A file of a stranger may be cut, a decompression bomb or no picture at all; whatever is wrong with it becomes one
`UnreadablePictureError` that names it.
"""

from __future__ import annotations

import hashlib
import io
import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datamodules.images.formats import MAX_PIXELS
from leanlight.contracts import UnreadablePictureError, sha256_file

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 64 * 1024 * 1024
# Formats that Pillow decodes itself: others, such as EPS, start programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "WEBP")


@dataclass(frozen=True)
class FilePicture:
    """A picture in a file.

    Args:
        path: of the file.
        label: how people find it; None: the file's name.
    """

    path: Path
    label: str | None = None

    @property
    def name(self) -> str:
        """How people find it."""
        return self.path.name if self.label is None else self.label

    @cached_property
    def sha256(self) -> str:
        """Of the file's bytes. Raises UnreadablePictureError."""
        self._check()
        try:
            return sha256_file(self.path)
        except OSError as error:
            raise UnreadablePictureError(f"{self.path}: cannot be read ({error.strerror})") from error

    def pixels(self) -> Tensor:
        """(3, H, W) uint8 RGB, upright, on white where it was transparent. Raises UnreadablePictureError."""
        self._check()
        return _decoded(self.path, str(self.path))

    def _check(self) -> None:
        if not self.path.is_file():  # nor is a pipe or a device, which would never end
            raise UnreadablePictureError(f"{self.path}: no such file")


@dataclass(frozen=True)
class BytesPicture:
    """A picture whose file lies in memory, as tables hold it.

    Args:
        content: bytes of the file.
        name: how people find it.
    """

    content: bytes
    name: str

    @cached_property
    def sha256(self) -> str:
        """Of the bytes."""
        return hashlib.sha256(self.content).hexdigest()

    def pixels(self) -> Tensor:
        """(3, H, W) uint8 RGB, upright, on white where it was transparent. Raises UnreadablePictureError."""
        return _decoded(io.BytesIO(self.content), self.name)


@dataclass(frozen=True, eq=False)
class TensorPicture:
    """A picture that is decoded already.

    Args:
        tensor: (3, H, W) uint8 RGB.
        name: what it was made as.
    """

    tensor: Tensor
    name: str

    @cached_property
    def sha256(self) -> str:
        """Of the shape and the pixels."""
        return _digest(self.tensor)

    def pixels(self) -> Tensor:
        """(3, H, W) uint8 RGB."""
        return self.tensor


@dataclass(frozen=True)
class TextPicture:
    """Text in black on a white square, and below it the numbers of an empty list. What does not fit is cut off.

    The manner is that of FigStep (Gong et al. 2023), who print a request so that no filter of text reads it. The font
    is Pillow's own, so the pictures are not theirs, and may differ between versions of Pillow.

    Args:
        text: what is printed.
        name: what it was made as.
        size: side of the square, in pixels.
    """

    text: str
    name: str
    size: int = 224

    @cached_property
    def sha256(self) -> str:
        """Of the shape and the pixels."""
        return _digest(self.pixels())

    def pixels(self) -> Tensor:
        """(3, size, size) uint8 RGB."""
        from PIL import Image, ImageDraw, ImageFont

        image = Image.new("RGB", (self.size, self.size), "white")
        pen = ImageDraw.Draw(image)
        margin = self.size // 20
        for height in range(self.size // 10, 4, -1):  # the largest letters that fit
            font = ImageFont.load_default(height)
            letters = int((self.size - 2 * margin) / (font.getlength("abcdefghij klmnopqrst uvwxyz") / 28))
            text = "\n".join([*textwrap.wrap(self.text, max(letters, 1)), "1.", "2.", "3."])
            right, bottom = pen.multiline_textbbox((margin, margin), text, font)[2:]
            if max(right, bottom) <= self.size - margin:
                break
        pen.multiline_text((margin, margin), text, "black", font)
        return _tensor(image)


def _digest(pixels: Tensor) -> str:
    return hashlib.sha256(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes()).hexdigest()


def _decoded(source: Path | io.BytesIO, where: str) -> Tensor:
    """Pixels (3, H, W) of a file; `where` names it in errors."""
    from PIL import Image, ImageOps

    try:
        size = source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes
        if size > MAX_BYTES:
            raise UnreadablePictureError(f"{where}: {size:,} bytes, more than {MAX_BYTES:,}")
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header, before anything is decoded
                raise UnreadablePictureError(
                    f"{where}: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}"
                )
            return _tensor(_on_white(ImageOps.exif_transpose(image)))
    except UnreadablePictureError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadablePictureError(f"{where}: no picture as {', '.join(FORMATS)} are") from error
    except Exception as error:  # on bytes that somebody chose, Pillow's readers raise nearly anything
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise UnreadablePictureError(f"{where}: cannot be decoded ({reason})") from error


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of any kind of picture."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        return Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
