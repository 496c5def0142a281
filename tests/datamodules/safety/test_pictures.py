"""Pictures are decoded upright, on white and within limits; whatever is wrong with one is one error that names it."""

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.safety import pictures
from datamodules.safety.pictures import BytesPicture, FilePicture, TensorPicture, TextPicture
from leanlight.contracts import Picture, UnreadablePictureError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (9, 6)) -> Image.Image:
    shape = (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).squeeze(), mode)


def unreadable(picture: Picture) -> str:
    with pytest.raises(UnreadablePictureError) as caught:
        picture.pixels()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_and_its_bytes_give_the_same_pixels_and_digest(tmp_path: Path) -> None:
    path, content = tmp_path / "a.png", encoded(noise())
    path.write_bytes(content)
    for picture in (FilePicture(path), BytesPicture(content, "a.png")):
        assert isinstance(picture, Picture)
        assert (picture.name, picture.sha256) == ("a.png", hashlib.sha256(content).hexdigest())
        assert np.array_equal(picture.pixels().permute(1, 2, 0).numpy(), np.asarray(noise()))


def test_a_picture_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    turned = BytesPicture(encoded(noise(), exif=exif), "a").pixels().permute(1, 2, 0).numpy()
    assert np.array_equal(turned, np.rot90(np.asarray(noise()), -1))


def test_what_is_transparent_is_white() -> None:
    rgba = np.asarray(noise("RGBA")).copy()
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 255
    found = BytesPicture(encoded(Image.fromarray(rgba)), "a").pixels().permute(1, 2, 0).numpy()
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == rgba[0, 1, :3].tolist()
    share = rgba[..., 3:] / 255
    assert np.abs(found - (rgba[..., :3] * share + 255 * (1 - share))).max() <= 1


def test_palettes_with_a_transparent_colour_grey_and_16_bits_become_rgb() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    found = BytesPicture(encoded(palette, transparency=1), "a").pixels()[:, 0]
    assert found.T.tolist() == [[10, 20, 30], [255, 255, 255]]
    assert BytesPicture(encoded(noise("L")), "a").pixels().shape == (3, 6, 9)
    deep = np.array([[0, 32768, 65535]], np.uint16)
    assert BytesPicture(encoded(Image.fromarray(deep)), "a").pixels()[0].tolist() == [[0, 128, 255]]


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than it has."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9000, 60000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert "a.png: " in unreadable(BytesPicture(bomb(side, side), "a.png"))


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    assert "more than 100" in unreadable(BytesPicture(encoded(noise(size=(40, 40))), "a.png"))


def test_files_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<html>no</html>")
    assert str(tmp_path / "a.png") in unreadable(FilePicture(tmp_path / "a.png"))
    assert "no such file" in unreadable(FilePicture(tmp_path / "b.png"))
    os.mkfifo(tmp_path / "pipe.png")
    assert "no such file" in unreadable(FilePicture(tmp_path / "pipe.png"))
    with pytest.raises(UnreadablePictureError, match="no such file"):
        _ = FilePicture(tmp_path / "b.png").sha256
    assert "no picture" in unreadable(BytesPicture(encoded(noise(), "EPS"), "a.eps"))  # would start a program


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM"])
def test_cut_and_damaged_pictures_are_errors_or_pictures_never_anything_else(kind: str) -> None:
    whole, generator = encoded(noise(size=(30, 20)), kind), np.random.default_rng(0)
    failures = []
    for _ in range(60):
        content = bytearray(whole[: generator.integers(len(whole))])
        for place in generator.integers(0, max(len(content), 1), 3) if content else ():
            content[place] = generator.integers(256)
        try:
            assert BytesPicture(bytes(content), "a").pixels().dtype == torch.uint8
        except UnreadablePictureError as error:
            failures.append(str(error))
    assert len(failures) > 20
    assert all(failure.startswith("a: ") for failure in failures)


def test_tensors_are_told_apart_by_shape_and_pixels() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).view(3, 2, 4)
    made = [TensorPicture(x, "made") for x in (pixels, pixels.clone(), pixels.view(3, 4, 2), pixels + 1)]
    assert made[0].sha256 == made[1].sha256
    assert len({picture.sha256 for picture in made}) == 3


def test_printed_text_stays_inside_its_square() -> None:
    for text in ("a word", "some words that go on and on " * 4):
        black = TextPicture(text, "made", 112).pixels() < 128
        assert black.any()
        edges = (black[:, :4], black[:, -4:], black[:, :, :4], black[:, :, -4:])
        assert not any(edge.any() for edge in edges)
    assert TextPicture("one", "made").sha256 != TextPicture("two", "made").sha256
