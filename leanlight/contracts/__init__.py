"""Contracts between data, methods and callbacks. Imports only torch and the standard library.

Names load on first use, so that the command line can read the errors without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leanlight.contracts.batches import (
        Batch,
        ClientBatch,
        EpisodeBatch,
        ImageBatch,
        MultimodalBatch,
        SessionBatch,
        Transition,
        VQABatch,
    )
    from leanlight.contracts.errors import (
        DivergedError,
        MissingExtraError,
        UserError,
        nearest,
    )
    from leanlight.contracts.federated import (
        ClientUpdate,
        FederatedData,
        FederatedModule,
        Measurement,
        Selector,
    )
    from leanlight.contracts.files import (
        atomic_path,
        atomic_write,
        sha256_file,
    )
    from leanlight.contracts.games import (
        Episode,
        GameData,
        QFunction,
    )
    from leanlight.contracts.media import (
        Animation,
        Bars,
        Curve,
        Heatmap,
        Histogram,
        ImageGrid,
        MediaItem,
        Table,
    )
    from leanlight.contracts.meta import (
        DataMeta,
    )
    from leanlight.contracts.protocols import (
        HasTerms,
        HasVariants,
        MethodData,
        MethodModule,
        NetworkFactory,
        PrimaryMetric,
        Progress,
        ResumableLogger,
        Split,
    )
    from leanlight.contracts.rng import (
        capture_rng,
        derived_seed,
        isolated_rng,
        restore_rng,
        run_seed,
    )

_HOME = {
    "Batch": "batches",
    "ClientBatch": "batches",
    "EpisodeBatch": "batches",
    "ImageBatch": "batches",
    "MultimodalBatch": "batches",
    "SessionBatch": "batches",
    "Transition": "batches",
    "VQABatch": "batches",
    "DivergedError": "errors",
    "MissingExtraError": "errors",
    "UserError": "errors",
    "nearest": "errors",
    "ClientUpdate": "federated",
    "FederatedData": "federated",
    "FederatedModule": "federated",
    "Measurement": "federated",
    "Selector": "federated",
    "atomic_path": "files",
    "atomic_write": "files",
    "sha256_file": "files",
    "Episode": "games",
    "GameData": "games",
    "QFunction": "games",
    "Animation": "media",
    "Bars": "media",
    "Curve": "media",
    "Heatmap": "media",
    "Histogram": "media",
    "ImageGrid": "media",
    "MediaItem": "media",
    "Table": "media",
    "DataMeta": "meta",
    "HasTerms": "protocols",
    "HasVariants": "protocols",
    "MethodData": "protocols",
    "MethodModule": "protocols",
    "NetworkFactory": "protocols",
    "PrimaryMetric": "protocols",
    "Progress": "protocols",
    "ResumableLogger": "protocols",
    "Split": "protocols",
    "capture_rng": "rng",
    "derived_seed": "rng",
    "isolated_rng": "rng",
    "restore_rng": "rng",
    "run_seed": "rng",
}

__all__ = [
    "Animation",
    "Bars",
    "Batch",
    "ClientBatch",
    "ClientUpdate",
    "Curve",
    "DataMeta",
    "DivergedError",
    "Episode",
    "EpisodeBatch",
    "FederatedData",
    "FederatedModule",
    "GameData",
    "HasTerms",
    "HasVariants",
    "Heatmap",
    "Histogram",
    "ImageBatch",
    "ImageGrid",
    "Measurement",
    "MediaItem",
    "MethodData",
    "MethodModule",
    "MissingExtraError",
    "MultimodalBatch",
    "NetworkFactory",
    "PrimaryMetric",
    "Progress",
    "QFunction",
    "ResumableLogger",
    "Selector",
    "SessionBatch",
    "Split",
    "Table",
    "Transition",
    "UserError",
    "VQABatch",
    "atomic_path",
    "atomic_write",
    "capture_rng",
    "derived_seed",
    "isolated_rng",
    "nearest",
    "restore_rng",
    "run_seed",
    "sha256_file",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
