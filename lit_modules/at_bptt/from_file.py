"""Sets that were exported or published, read as the first images and labels of a run; nothing in them is executed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import UserError, nearest
from leanlight.contracts.ranges import FiniteFloat, PositiveFloat
from lit_modules.at_bptt.preprocessing import Preprocessing

Space = Literal["pixels", "standardized", "preprocessed"]
LabelKind = Literal["probabilities", "logits"]

# In a folder, the first that is there: this suite's export, MTT and DATM, DD-Ranking.
_IN_FOLDERS = ("distilled.safetensors", "images_best.pt", "images.pt")
# Names of tensors: this suite's; RaT-BPTT's h5; RaT-BPTT's state dict, which AT-BPTT's code writes too.
_IMAGES = ("images", "data", "module.data.weight", "data.weight")
_LABELS = ("labels", "label", "module.label.weight", "label.weight")
_OWN_SPACE = ("whitening", "mean", "std")


@dataclass(frozen=True)
class FirstSet:
    """A set as a run takes it over, class by class where it can be.

    Args:
        images: (n, C, H, W) float.
        labels: (n, K) float, non-negative.
        space: of the images.
        mean: of ``standardized``, (C, 1, 1).
        std: of ``standardized``, (C, 1, 1).
        own_space: whitening (D, D), or mean and std (C, 1, 1), where the file brings the space of its images.
    """

    images: Tensor
    labels: Tensor
    space: Space
    mean: Tensor
    std: Tensor
    own_space: Mapping[str, Tensor] = field(default_factory=dict)

    def preprocessed(self, preprocessing: Preprocessing) -> Tensor:
        """The images in the space of `preprocessing`."""
        if self.space == "preprocessed":
            return self.images
        pixels = self.images if self.space == "pixels" else self.images * self.std + self.mean
        device = preprocessing.whitening.device
        return preprocessing(pixels.to(device))


@dataclass(frozen=True)
class FromFile:
    """First images and labels from a file: an export of this suite, or a set that others published.

    ``.safetensors`` of ``leanlight export``; ``.h5`` and ``.pth`` of RaT-BPTT and AT-BPTT; ``.pt`` of MTT, DATM and
    DD-Ranking, whose labels lie in a file of their own. See docs/methods/at_bptt.md.

    Args:
        file: the file of the images, or a folder that holds distilled.safetensors, images_best.pt or images.pt.
        labels: the file of the labels; by default in or beside the file of the images, else one-hot, class by class.
        space: of the images: ``pixels`` in [0, 1], ``standardized`` by `mean` and `std`, or ``preprocessed``, which is
            that of the run's `preprocess`; needed where neither the file nor its bytes say it.
        mean: of ``standardized``, one number or one a channel.
        std: of ``standardized``, one number or one a channel.
        label_kind: what rows of K numbers are: ``probabilities``, or ``logits``, which DATM stores.
    """

    file: str | None = None
    labels: str | None = None
    space: Space | None = None
    mean: FiniteFloat | list[FiniteFloat] = 0.0
    std: PositiveFloat | list[PositiveFloat] = 1.0
    label_kind: LabelKind = "probabilities"

    def __post_init__(self) -> None:
        for name, kind, value in (("space", Space, self.space), ("label_kind", LabelKind, self.label_kind)):
            if value is not None and value not in (known := get_args(kind)):
                raise UserError(f"{name}: expected one of {', '.join(known)}; got {value!r}{nearest(value, known)}")

    def read(self, num_classes: int, ipc: int, shape: tuple[int, ...]) -> FirstSet:
        """Read and check the set.

        Args:
            num_classes: K.
            ipc: images per class.
            shape: (C, H, W) of an image.

        Raises:
            UserError: there is no such file, it is damaged or refused, or what it holds does not fit.
        """
        path = self._path()
        tensors = _tensors(path, "file")
        found, given = _first(tensors, _IMAGES), _first(tensors, _LABELS)
        if found is None:
            raise UserError(f"file: expected images under one of {', '.join(_IMAGES)}; {path} holds {_named(tensors)}")
        images, space = self._images(path, found, num_classes * ipc, shape)
        own = {name: tensors[name].float() for name in _OWN_SPACE if name in tensors and path.suffix == ".safetensors"}
        if own:
            space = "preprocessed"
        if space is None:
            raise UserError(f"space: expected one of {', '.join(get_args(Space))}, since {path} does not say; got null")
        if space == "pixels" and not -1 <= float(images.min()) <= float(images.max()) <= 2:
            raise UserError(
                f"space: expected pixels in [0, 1] or near; {path} has {float(images.min()):.3g} to "
                f"{float(images.max()):.3g}; other spaces are standardized and preprocessed"
            )
        if (beside := self._labels_file(path)) is not None:
            given = _first(_tensors(beside, "labels"), (*_LABELS, *_IMAGES))
            path = beside
        soft, hard = self._labels(path, given, num_classes, ipc)
        order = _by_class(soft, ipc, hard, path)
        mean, std = (torch.as_tensor(value).float().reshape(-1, 1, 1) for value in (self.mean, self.std))
        return FirstSet(images[order], soft[order], space, mean, std, own)

    def _path(self) -> Path:
        if self.file is None:
            raise UserError("file: expected the file of a set; give --model.init_args.init.file=PATH")
        path = Path(self.file)
        if path.is_dir():
            inside = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
            if not inside:
                raise UserError(f"file: expected one of {', '.join(_IN_FOLDERS)} in the folder {path}, got none")
            return inside[0]
        if not path.is_file():
            raise UserError(f"file: expected the file of a set, or a folder with one, got {path}")
        return path

    def _images(self, path: Path, images: Tensor, count: int, shape: tuple[int, ...]) -> tuple[Tensor, Space | None]:
        """Images (n, C, H, W) float, and their space as far as they or the user say it."""
        if images.dim() == 2 and images.shape[1] == math.prod(shape):  # RaT-BPTT's rows
            images = images.unflatten(1, shape)
        if tuple(images.shape) != (count, *shape):
            raise UserError(
                f"file: expected images of shape {(count, *shape)}, num_classes * ipc of image_shape; {path} has "
                f"{tuple(images.shape)}"
            )
        if images.dtype == torch.uint8:
            if self.space not in (None, "pixels"):
                raise UserError(f"space: expected pixels, since {path} holds bytes; got {self.space}")
            return images.float() / 255, "pixels"
        images = images.float()
        if not images.isfinite().all():
            raise UserError(f"file: expected finite images; {path} holds NaN or infinity")
        return images, self.space

    def _labels_file(self, path: Path) -> Path | None:
        """The file of labels that the user names, or that lies beside images: images_best.pt and labels_best.pt."""
        if self.labels is not None:
            if not Path(self.labels).is_file():
                raise UserError(f"labels: expected a file, got {self.labels}")
            return Path(self.labels)
        beside = path.with_name(path.name.replace("images_zca", "images").replace("images", "labels"))
        return beside if beside != path and beside.is_file() else None

    def _labels(self, path: Path, labels: Tensor | None, num_classes: int, ipc: int) -> tuple[Tensor, bool]:
        """(n, K) float, and whether they were class numbers."""
        count = num_classes * ipc
        if labels is None:
            labels = torch.arange(num_classes).repeat_interleave(ipc)
        if labels.numel() == count and not labels.is_floating_point():
            labels = labels.flatten().long()
            if labels.min() < 0 or labels.max() >= num_classes:
                raise UserError(
                    f"labels: expected classes 0 to {num_classes - 1}; {path} has {int(labels.min())} to "
                    f"{int(labels.max())}"
                )
            return F.one_hot(labels, num_classes).float(), True
        if tuple(labels.shape) != (count, num_classes):
            raise UserError(
                f"labels: expected {count} class numbers or {(count, num_classes)} numbers; {path} has "
                f"{labels.dtype} {tuple(labels.shape)}"
            )
        labels = labels.float()
        if not labels.isfinite().all():
            raise UserError(f"labels: expected finite numbers; {path} holds NaN or infinity")
        if self.label_kind == "logits":
            return labels.softmax(1), False
        if labels.min() < 0:
            raise UserError(f"label_kind: expected logits, since labels in {path} fall to {float(labels.min()):.3g}")
        return labels, False


def _by_class(labels: Tensor, ipc: int, hard: bool, path: Path) -> Tensor:
    """The order (n,) that puts images class by class; as they are where soft labels have no such order."""
    classes = labels.argmax(1)
    if (classes.bincount(minlength=labels.shape[1]) == ipc).all():
        return classes.argsort(stable=True)
    if hard:
        raise UserError(f"labels: expected {ipc} of each class, as ipc says; {path} has other numbers")
    return torch.arange(len(labels))


def _first(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor | None:
    return next((tensors[name] for name in names if name in tensors), None)


def _named(tensors: Mapping[str, Tensor]) -> str:
    return shorten(", ".join(sorted(tensors)), 120, placeholder=" …") or "no tensor"


def _tensors(path: Path, argument: str) -> dict[str, Tensor]:
    """Tensors of a file by name; one without a name is ``images``, two of them are ``images`` and ``labels``."""
    readers = {".safetensors": _safetensors, ".h5": _hdf5, ".hdf5": _hdf5, ".pt": _torch, ".pth": _torch}
    if path.suffix not in readers:
        raise UserError(f"{argument}: expected a file {', '.join(readers)}; got {path}")
    try:
        return readers[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # of a file of any content
        reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise UserError(f"{argument}: {path} is damaged or was refused: {reason}") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _hdf5(path: Path) -> dict[str, Tensor]:
    import h5py

    with h5py.File(path, "r") as file:
        found = {name: file[name] for name in (*_IMAGES, *_LABELS) if _is_plain(file, name)}
        return {name: torch.from_numpy(held[()]) for name, held in found.items()}


def _is_plain(file: Any, name: str) -> bool:
    """Whether HDF5 holds an array of numbers under a name, in this very file: it can refer to any other."""
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        return False
    held = file[name]
    stored = held.id.get_storage_size()
    # A chunk that was never written is filled when read: a small file could ask for any amount of memory.
    return held.dtype.kind in "fiu" and held.external is None and not held.is_virtual and held.nbytes <= 1000 * stored


def _torch(path: Path) -> dict[str, Tensor]:
    unnamed = iter(("images", "labels"))
    named: dict[str, Tensor] = {}
    for name, value in _leaves(torch.load(path, map_location="cpu", weights_only=True)):
        if (key := name or next(unnamed, None)) is not None:
            named.setdefault(key, value.detach())
    return named


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers with its key, which is empty outside of dictionaries."""
    if isinstance(value, Tensor):
        # Others (sparse, complex, without data) are no images, and most of what is asked of images fails on them.
        if value.layout == torch.strided and value.device.type == "cpu" and not value.is_complex():
            yield name, value
    elif isinstance(value, Mapping):
        for key, held in value.items():
            yield from _leaves(held, str(key))
    elif isinstance(value, (list, tuple)):
        for held in value:
            yield from _leaves(held, name)
