"""Files that lie about their size, hold objects or are no files of their kind: one line that names them, at once."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from one_step import one_step_run

import leanlight as suite
from datamodules import SubsetDataModule
from leanlight.__main__ import main
from leanlight.contracts import UserError


class Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return Path.write_text, (Path("executed"), "")


def header(shape, descr="<f8", fortran=False):
    """An array's header as numpy writes it, of an array that is not there."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def pickled():
    file = io.BytesIO()
    np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)
    return file.getvalue()


ARRAYS = {
    "claims 10^15 numbers": lambda: header((10**15,)) + bytes(64),
    "claims more than 64 bits": lambda: header((10**30,)) + bytes(64),
    "claims a negative length": lambda: header((-1, 3)) + bytes(64),
    "holds objects": pickled,
    "is cut": lambda: header((10,), "<i8")[:-9],
    "has no header": lambda: b"not an array",
    "has code in its header": lambda: header("__import__('os').getcwd()") + bytes(64),
}
SAFETENSORS = {
    "claims 10^15 bytes of header": struct.pack("<Q", 10**15) + b"{}",
    "claims 10^15 numbers": (lambda text: struct.pack("<Q", len(text)) + text)(
        json.dumps({"index": {"dtype": "I64", "shape": [10**15], "data_offsets": [0, 8 * 10**15]}}).encode()
    ),
    "is empty": b"",
}
# The commands that read an npz, a safetensors file and a CSV before all else.
NPZ = [
    ["data", "check", "mnist"],
    ["data", "check", "npz", "--path=FILE"],
    ["data", "check", "emotion_npz", "--path=FILE"],
]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Call a command; assert exit code 2, one line that names the file, nothing executed and nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEANLIGHT_DATA", str(tmp_path))

    def call(words, name):
        before = sorted(tmp_path.rglob("*"))
        assert main(words) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert error[0].startswith("leanlight: error:")
        assert name in error[0]
        assert len(error[0]) < 500
        assert not Path("executed").exists()
        assert sorted(tmp_path.rglob("*")) == before

    return call


@pytest.mark.parametrize("what", ARRAYS)
@pytest.mark.parametrize("words", NPZ, ids=lambda words: words[2])
def test_an_npz_whose_array(refused, words, what):
    with zipfile.ZipFile("mnist.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test", "id", "items", "offsets"):
            archive.writestr(f"{name}.npy", ARRAYS[what]())
    refused([word.replace("FILE", "mnist.npz") for word in words], "mnist.npz")


@pytest.mark.parametrize("what", ARRAYS)
def test_an_npy_of_positions_that(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    Path("kept.npy").write_bytes(ARRAYS[what]())
    with pytest.raises(UserError, match=r"kept\.npy"):
        SubsetDataModule("kept.npy", dataset="digits").setup()
    assert not Path("executed").exists()


def test_an_array_in_fortran_order_is_read_as_any_other(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    labels = np.arange(20) % 10
    parts = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    from datamodules.images.formats import read_npz

    np.savez(tmp_path / "c.npz", **parts)
    np.savez(tmp_path / "f.npz", **parts | {"x_train": np.asfortranarray(images)})
    (first, _), (second, _) = (read_npz(tmp_path / name, 10) for name in ("c.npz", "f.npz"))
    assert second["train"][0].flags.c_contiguous
    assert np.array_equal(first["train"][0], second["train"][0])
    assert np.array_equal(second["train"][0][:, 0], images)


@pytest.mark.parametrize("what", SAFETENSORS)
@pytest.mark.parametrize(
    "words", [["select", "FILE", "--rule=random", "--keep=1"], ["data", "check", "emotion_npz", "--path=FILE"]], ids=str
)
def test_a_safetensors_file_that(refused, words, what):
    Path("made.safetensors").write_bytes(SAFETENSORS[what])
    refused([word.replace("FILE", "made.safetensors") for word in words], "made.safetensors")


@pytest.mark.parametrize(
    "content",
    [b"session,item\n1,\xff\xfe\n", b"\x00" * 100, b'session,item\n1,"' + b"x" * 200_000],
)
@pytest.mark.parametrize(
    "words",
    [["recommend", "nowhere", "--input=made.csv", "--output=out.csv"], ["audit", "--data=made.csv", "--judge=keyword"]],
    ids=lambda words: words[0],
)
def test_a_csv_with_bytes_that_are_no_text(refused, words, content):
    Path("made.csv").write_bytes(content)
    refused(words, "made.csv")


# -- checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step."""
    return one_step_run(tmp_path_factory.mktemp("run"))


CHANGES = {
    "has weights of other shapes": lambda saved: saved.update(
        state_dict={key: value[None] for key, value in saved["state_dict"].items()}
    ),
    "has texts for weights": lambda saved: saved.update(state_dict=dict.fromkeys(saved["state_dict"], "text")),
    "has no weights": lambda saved: saved.pop("state_dict"),
    "has another optimiser's state": lambda saved: saved["optimizer_states"][0]["param_groups"].clear(),
    "has a number for loops": lambda saved: saved["loops"].update(fit_loop=3),
    "has texts for callbacks": lambda saved: saved.update(callbacks=dict.fromkeys(saved["callbacks"], "text")),
    "has a list for arguments": lambda saved: saved.update(hyper_parameters=[1]),
    "has a number for a class": lambda saved: saved["hyper_parameters"].update(_class_path=7),
    "is of another program": lambda saved: [saved.pop(key) for key in list(saved) if key != "state_dict"],
}
CONTENTS = {
    "is empty": lambda whole: b"",
    "is cut": lambda whole: whole[: len(whole) // 2],
    "would execute code": lambda whole: pickle.dumps(Payload()),
    "is another zip": lambda whole: b"PK\x05\x06" + bytes(18),
}
# What only training looks at.
OF_TRAINING = ("optimiser", "loops", "callbacks")


@pytest.mark.parametrize("what", [*CHANGES, *CONTENTS])
def test_a_checkpoint_that(run, refused, what):
    shutil.copytree(run, "run")
    path = Path("run/checkpoints/last.ckpt")
    saved = torch.load(path, weights_only=True)
    if what in CHANGES:
        CHANGES[what](saved)
        torch.save(saved, path)
    else:
        path.write_bytes(CONTENTS[what](path.read_bytes()))
    # Whoever changes a checkpoint can change what is noted of it.
    (path.parent / "sha256.json").unlink()
    quick = ["--trainer.enable_progress_bar=false", "--run.wandb=disabled"]
    refused(["fit", "--resume", "run", "--trainer.max_epochs=2", "--allow-changes", *quick], "last.ckpt")
    if not any(word in what for word in OF_TRAINING):
        refused(["export", "run/checkpoints/last.ckpt"], "last.ckpt")
        with pytest.raises(UserError, match=r"last\.ckpt"):
            suite.load("run")
        if what in ("has weights of other shapes", "is cut"):
            refused(["test", "--from", "run", *quick], "last.ckpt")
