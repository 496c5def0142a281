"""What is downloaded comes over https, and is kept only when it is what was published."""

import gzip
import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from datamodules.images import download, sources
from leanlight.__main__ import main
from leanlight.contracts import UserError


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and sends who asks for `moved` to an address of another kind."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if "moved" in self.path:
            self.send_response(302)
            self.send_header("Location", f"ftp://127.0.0.1{self.path}")
            self.end_headers()
        else:
            super().do_GET()


def idx(array):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A stand-in that serves four small files of MNIST over http, which is admitted here alone."""
    folder = tmp_path / "served"
    folder.mkdir()
    images = np.arange(20 * 28 * 28).reshape(20, 28, 28) % 251
    parts = {"train": (images, np.arange(20) % 10), "t10k": (images[:5], np.arange(5))}
    for part, (pictures, labels) in parts.items():
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(pictures))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        monkeypatch.setattr(download, "_SCHEMES", ("http",))
        url = f"http://127.0.0.1:{served.server_port}/"
        monkeypatch.setitem(download.SOURCES, "mnist", download.Source(url, digests))
        yield folder
        served.shutdown()
        thread.join()


def test_every_address_is_https_and_every_file_has_a_digest():
    for source in download.SOURCES.values():
        assert source.url.startswith("https://")
        assert source.url.endswith("/")
        length = 2 * hashlib.new(source.kind).digest_size
        assert source.digests
        assert all(len(digest) == length for digest in source.digests.values())
    assert [name for name, source in download.SOURCES.items() if source.kind != "sha256"] == ["svhn"]


def test_what_torchvision_knows_of_the_files_agrees_in_their_names():
    from torchvision import datasets

    for name, kind in (("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)):
        assert list(download.SOURCES[name].digests) == [file for file, _ in kind.resources]
    for name, kind in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        assert "".join(download.SOURCES[name].url + file for file in download.SOURCES[name].digests) == kind.url
    known = {file: md5 for _, file, md5 in (datasets.SVHN.split_list[part] for part in ("train", "test"))}
    assert download.SOURCES["svhn"].digests == known


def test_files_are_downloaded_once_and_read(server, tmp_path, capsys):
    root = tmp_path / "root"
    assert main(["data", "prepare", "mnist", "--root", str(root)]) == 0
    assert "20 train and 5 test items" in capsys.readouterr().out
    for path in server.iterdir():
        path.unlink()
    assert sources.load("mnist", root).train[0].shape == (20, 1, 28, 28)
    assert download.download("mnist", root / "MNIST" / "raw")  # those that are there are not asked for


def test_another_file_than_the_published_one_is_refused_and_not_kept(server, tmp_path, capsys):
    (server / "t10k-labels-idx1-ubyte.gz").write_bytes(b"something else")
    root = tmp_path / "root"
    assert main(["data", "prepare", "mnist", "--root", str(root)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "t10k-labels-idx1-ubyte.gz is not the published file: sha256" in error
    assert [path.name for path in root.rglob("*") if path.is_file() and "t10k-labels" in path.name] == []


def test_a_damaged_file_that_is_there_is_fetched_again(server, tmp_path):
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"cut")
    download.download("mnist", tmp_path)
    assert (tmp_path / "train-labels-idx1-ubyte.gz").read_bytes() == (
        server / "train-labels-idx1-ubyte.gz"
    ).read_bytes()


def test_an_address_without_https_is_not_asked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_SCHEMES", ("https",))
    with pytest.raises(UserError, match="is no address with https"):
        sources.load("mnist", tmp_path / "root")
    assert not list((tmp_path / "root").rglob("*.gz"))


def test_a_redirection_to_an_address_without_https_is_not_followed(server, tmp_path, monkeypatch):
    source = download.SOURCES["mnist"]
    monkeypatch.setitem(download.SOURCES, "mnist", source._replace(url=f"{source.url}moved/"))
    with pytest.raises(UserError, match=r"ftp://.* is no address with https"):
        sources.load("mnist", tmp_path / "root")
