"""Readers: what is right is read as an independent reading gives it, what is wrong is named."""

import codecs
import gzip
import io
import os
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from datamodules.images import formats
from leanlight.contracts import UserError


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_is_read_back(tmp_path: Path, array: np.ndarray, zipped: bool) -> None:
    path = tmp_path / ("images.gz" if zipped else "images")
    path.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
    assert np.array_equal(formats.read_idx(path), array)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("keep", [0, 3, 9, 500])
def test_truncated_idx_is_named(tmp_path: Path, array: np.ndarray, zipped: bool, keep: int) -> None:
    path = tmp_path / ("images.gz" if zipped else "images")
    path.write_bytes((gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))[:keep])
    with pytest.raises(UserError, match=str(path)):
        formats.read_idx(path)


def test_idx_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "floats"
    path.write_bytes(b"\0\0\x0d\x01" + bytes(16))
    with pytest.raises(UserError, match="not an idx file of unsigned bytes"):
        formats.read_idx(path)


def test_npz_round_trip_keeps_parts_and_classes(tmp_path: Path, array: np.ndarray) -> None:
    part = formats.as_part(array, np.array([0, 1, 2, 1, 0]), "test", 3)
    formats.write_npz(tmp_path / "set.npz", {"train": part, "test": part, "val": part}, ["a", "b", "c"])
    parts, classes = formats.read_npz(tmp_path / "set.npz", 3)
    assert classes == ("a", "b", "c")
    assert sorted(parts) == ["test", "train", "val"]
    assert np.array_equal(parts["val"][0][:, 0], array)
    assert parts["train"][1].tolist() == [0, 1, 2, 1, 0]


def test_truncated_npz_is_named(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, x_train=array, y_train=np.zeros(5, int), x_test=array, y_test=np.zeros(5, int))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=str(path)):
        formats.read_npz(path, 10)


def test_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, x_train=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="plain arrays"):
        formats.read_npz(path, 10)


def test_npz_without_an_array_names_it(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "set.npz", x_train=array, y_train=np.zeros(5, int), x_test=array)
    with pytest.raises(UserError, match="'y_test'"):
        formats.read_npz(tmp_path / "set.npz", 10)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4), np.float32), np.zeros(2, int), "uint8"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(3, int), "2 integer labels"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2), "integer labels"),
        (np.zeros((2, 4, 4), np.uint8), np.array([0, 7]), "0..2"),
        (np.zeros((2, 4, 4), np.uint8), np.array([0, -1]), "0..2"),
        (np.zeros((0, 4, 4), np.uint8), np.zeros(0, int), "uint8"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        formats.as_part(images, labels, "here", 3)


def test_channels_last_becomes_channels_first() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    assert np.array_equal(formats.as_part(images, np.zeros(2, int), "here", 1)[0][1, 2], images[1, :, :, 2])


class Python2Pickler(pickle._Pickler):
    """Writes strings and bytes as Python 2 did, which made the official files."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def save_bytes(self, content: bytes | str) -> None:
        raw = content.encode("latin1") if isinstance(content, str) else content
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)

    dispatch[bytes] = dispatch[str] = save_bytes


def cifar_batch(rows: np.ndarray, labels: list[int], protocol: int = 2) -> bytes:
    content, buffer = {"data": rows, "labels": labels, "batch_label": "b", "filenames": ["x"]}, io.BytesIO()
    (Python2Pickler if protocol == 2 else pickle.Pickler)(buffer, protocol).dump(content)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_batch_is_read_as_pickle_reads_it(tmp_path: Path, protocol: int) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    path = tmp_path / "data_batch_1"
    path.write_bytes(cifar_batch(rows, [3, 1, 2, 9], protocol))
    images, labels = formats.read_cifar_batches([path, path], "labels", 10)
    oracle = pickle.loads(path.read_bytes(), encoding="latin1")["data"].reshape(-1, 3, 32, 32)
    assert np.array_equal(oracle.reshape(4, -1), rows)
    assert np.array_equal(images, np.concatenate([oracle, oracle]))
    assert labels.tolist() == [3, 1, 2, 9] * 2


class Malicious:
    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    "payload",
    [
        Malicious(os.system, "touch {marker}"),
        Malicious(eval, "open({marker!r}, 'w')"),
        Malicious(getattr, "", "format"),
        np.array([object], dtype=object),
        Malicious(codecs.encode, "x", "rot13"),
        np.zeros(3, [("a", "i4")]),
        np.zeros(3, np.complex64),
        np.array(["2026-11-27"], "M8[D]"),
    ],
    ids=["os.system", "eval", "getattr", "object array", "codec", "compound array", "complex array", "date array"],
)
def test_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path, payload: object) -> None:
    marker, path = tmp_path / "marker", tmp_path / "data_batch_1"
    if isinstance(payload, Malicious):
        payload.arguments = tuple(a.replace("{marker}", str(marker)) for a in payload.arguments)
    path.write_bytes(pickle.dumps({"data": payload, "labels": [0]}, 4))
    with pytest.raises(UserError, match=str(path)):
        formats.unpickle(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_arrays_of_a_pickle_are_those_of_pickle_itself(tmp_path: Path, protocol: int) -> None:
    generator = np.random.default_rng(0)
    part = {
        "broken": generator.normal(size=(3, 4, 2)).astype(np.float32),
        "by columns": np.asfortranarray(generator.normal(size=(3, 5))),
        "big-endian": np.arange(6, dtype=">i2"),
        "strings": np.array(["a$_$1", "ümlaut"]),
        "bytes": np.array([b"ab", b"c"]),
        "objects": np.array(["a", "longer", 3], object),
        "flags": np.array([True, False]),
        "number": np.float32(0.1),
        "list": [np.int64(3), np.str_("b"), b"raw"],
        "none": np.zeros((0, 7), np.float16),
    }
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps({"train": {"deep": part}}, protocol))
    found, expected = formats.unpickle(path)["train"]["deep"], pickle.loads(path.read_bytes())["train"]["deep"]
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name
        if isinstance(value, np.ndarray):
            assert found[name].dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
    assert [type(one) for one in found["list"]] == [int, str, bytes]


def test_a_pickle_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict = {}
    content["self"] = content
    path = tmp_path / "round.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="RecursionError"):
        formats.unpickle(path)


def test_damaged_pickles_are_refused_without_another_error(tmp_path: Path) -> None:
    whole = cifar_batch(np.zeros((1, 3072), np.uint8), [1])
    generator = np.random.default_rng(0)
    path = tmp_path / "data_batch_1"
    for _ in range(300):
        damaged = bytearray(whole[: generator.integers(1, len(whole) + 1)])
        for position in generator.integers(0, min(len(damaged), 150), 3):
            damaged[position] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            content = formats.unpickle(path)
        except UserError:
            continue
        assert isinstance(content, dict)


def test_wrong_checksum_names_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    formats.check_md5(tmp_path / "file", "9a0364b9e99bb480dd25e1f0284c8555")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        formats.check_md5(tmp_path / "file", "0" * 32)


def test_pictures_of_any_mode_become_rgb_squares(tmp_path: Path) -> None:
    Image.new("L", (20, 10), 200).save(tmp_path / "grey.png")
    Image.new("P", (10, 30)).save(tmp_path / "palette.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "rgba.png")
    images = formats.decode_pictures(sorted(tmp_path.iterdir()), 8)
    assert images.shape == (3, 3, 8, 8)
    assert (images[0] == 200).all()
    assert images[2, :, 4, 4].tolist() == [255, 0, 0]


def test_square_picture_of_right_size_is_unchanged(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(formats.decode_picture(tmp_path / "a.png", 16), pixels.transpose(2, 0, 1))


def test_centre_is_kept_when_a_picture_is_cropped(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (formats.decode_picture(tmp_path / "a.png", 10) == 255).all()


def test_decompression_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    (tmp_path / "bomb.png").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"bomb\.png"):
        formats.decode_picture(tmp_path / "bomb.png", 32)


def test_truncated_picture_is_named(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:500])
    with pytest.raises(UserError, match=r"a\.jpg"):
        formats.decode_pictures([tmp_path / "a.jpg"], 32)
