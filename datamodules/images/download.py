"""Files that the suite fetches: over https alone, kept only when their digest is the one that stands here.

The digests are of the publishers' own files. Where a publisher's address knows no https, another one of the same files
stands here: the digest says that they are the same.
"""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import wrap_file

from leanlight.contracts import UserError, atomic_path

TIMEOUT = 20.0  # seconds without an answer
_SCHEMES = ("https",)
_BLOCK = 1 << 20


class Source(NamedTuple):
    """Where files come from.

    Args:
        url: address before the files' names.
        digests: name of a file → its digest.
        kind: of the digests; of SVHN nothing but MD5 is published.
    """

    url: str
    digests: Mapping[str, str]
    kind: str = "sha256"


SOURCES = {
    "mnist": Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion_mnist": Source(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "cifar10": Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"},
    ),
    "cifar100": Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-python.tar.gz": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"},
    ),
    "svhn": Source(
        "https://ufldl.stanford.edu/housenumbers/",
        {
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
        "md5",
    ),
    "tiny_imagenet": Source(
        "https://cs231n.stanford.edu/",
        {"tiny-imagenet-200.zip": "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"},
    ),
}


class _OnlySafe(urllib.request.HTTPRedirectHandler):
    """Follows no redirection to an address without https."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    if url.partition(":")[0] not in _SCHEMES:
        raise urllib.error.URLError(f"{url} is no address with https")


def download(name: str, folder: Path) -> list[Path]:
    """The files of a set of `SOURCES` in `folder`, fetched unless they are there.

    Raises:
        UserError: a file has another digest; it is not kept.
        OSError: the network or the disk fails.
    """
    source = SOURCES[name]
    return [_fetch(source.url + file, folder / file, source.kind, digest) for file, digest in source.digests.items()]


def _fetch(url: str, target: Path, kind: str, expected: str) -> Path:
    if target.is_file():
        with open(target, "rb") as there:
            if hashlib.file_digest(there, kind).hexdigest() == expected:
                return target
    _check_scheme(url)
    # Proxies of the environment stay in use.
    opener, digest = urllib.request.build_opener(_OnlySafe), hashlib.new(kind)
    with opener.open(url, timeout=TIMEOUT) as answer, atomic_path(target) as part:
        total = int(answer.headers.get("Content-Length") or 0)
        console = Console(stderr=True)
        bar = wrap_file(
            answer, total, description=target.name, console=console, transient=True, disable=not console.is_terminal
        )
        with open(part, "wb") as file, bar as content:
            while block := content.read(_BLOCK):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != expected:
            raise UserError(f"{url} is not the published file: {kind} {digest.hexdigest()}, expected {expected}")
    return target
