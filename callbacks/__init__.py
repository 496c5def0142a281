"""What happens around training: exact resume, guards, media, spikes, energy, throughput, export, federations.

Names load on first use, so that importing one callback does not import the libraries of the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from callbacks.checkpoint import AtomicCheckpointIO, ExactResume, ProgressCheckpoint
    from callbacks.energy import EnergyMeter
    from callbacks.export import ExportArtifact
    from callbacks.federated import FederatedRounds
    from callbacks.guards import DiskGuard, NaNGuard
    from callbacks.media import MediaLogger
    from callbacks.prediction import PredictionWriter
    from callbacks.spikes import SpikeStatistics
    from callbacks.throughput import ThroughputMonitor

__all__ = [
    "AtomicCheckpointIO",
    "DiskGuard",
    "EnergyMeter",
    "ExactResume",
    "ExportArtifact",
    "FederatedRounds",
    "MediaLogger",
    "NaNGuard",
    "PredictionWriter",
    "ProgressCheckpoint",
    "SpikeStatistics",
    "ThroughputMonitor",
]

_FILES = {
    "AtomicCheckpointIO": "checkpoint",
    "DiskGuard": "guards",
    "EnergyMeter": "energy",
    "ExactResume": "checkpoint",
    "ExportArtifact": "export",
    "FederatedRounds": "federated",
    "MediaLogger": "media",
    "NaNGuard": "guards",
    "PredictionWriter": "prediction",
    "ProgressCheckpoint": "checkpoint",
    "SpikeStatistics": "spikes",
    "ThroughputMonitor": "throughput",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
