from .checkpoint import (
    AtomicCheckpointIO as AtomicCheckpointIO,
)
from .checkpoint import (
    BestCheckpoint as BestCheckpoint,
)
from .checkpoint import (
    ExactResume as ExactResume,
)
from .compiling import CompileNetworks as CompileNetworks
from .energy import EnergyMeter as EnergyMeter
from .export import ExportArtifact as ExportArtifact
from .federated import FederatedRounds as FederatedRounds
from .federated import PersonalisedEvaluation as PersonalisedEvaluation
from .guards import DiskGuard as DiskGuard
from .guards import NaNGuard as NaNGuard
from .media import MediaLogger as MediaLogger
from .prediction import PredictionWriter as PredictionWriter
from .robustness import Robustness as Robustness
from .spikes import SpikeStatistics as SpikeStatistics
from .throughput import ThroughputMonitor as ThroughputMonitor
