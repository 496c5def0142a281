"""Reusable LightningDataModules, by kind of data. Names load on first use: the catalogue alone needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.catalog import CATALOG, DatasetInfo
    from datamodules.distilled import DistilledDataModule
    from datamodules.federated import FederatedDataModule
    from datamodules.games import GameDataModule
    from datamodules.imagenet import ImageFolderStream
    from datamodules.images import ImageDataModule, ImageSplit
    from datamodules.partition import IID, ClassesPerClient, ClassImbalance, Dirichlet, QuantitySkew, Shards

_HOME = {
    "CATALOG": "catalog",
    "DatasetInfo": "catalog",
    "DistilledDataModule": "distilled",
    "GameDataModule": "games",
    "FederatedDataModule": "federated",
    "ImageDataModule": "images",
    "ImageSplit": "images",
    "ImageFolderStream": "imagenet",
    "IID": "partition",
    "ClassImbalance": "partition",
    "ClassesPerClient": "partition",
    "Dirichlet": "partition",
    "QuantitySkew": "partition",
    "Shards": "partition",
}

__all__ = [
    "CATALOG",
    "IID",
    "ClassImbalance",
    "ClassesPerClient",
    "DatasetInfo",
    "Dirichlet",
    "DistilledDataModule",
    "FederatedDataModule",
    "GameDataModule",
    "ImageDataModule",
    "ImageFolderStream",
    "ImageSplit",
    "QuantitySkew",
    "Shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
