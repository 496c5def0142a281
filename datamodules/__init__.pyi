from .clients.module import FederatedDataModule as FederatedDataModule
from .clients.partition import (
    IID as IID,
)
from .clients.partition import (
    ClassesPerClient as ClassesPerClient,
)
from .clients.partition import (
    ClassImbalance as ClassImbalance,
)
from .clients.partition import (
    Dirichlet as Dirichlet,
)
from .clients.partition import (
    QuantitySkew as QuantitySkew,
)
from .clients.partition import (
    Shards as Shards,
)
from .emotion.catalog import EMOTIONS as EMOTIONS
from .emotion.catalog import EmotionSetInfo as EmotionSetInfo
from .emotion.module import EmotionDataModule as EmotionDataModule
from .emotion.planted import PlantedConflicts as PlantedConflicts
from .games.module import GameDataModule as GameDataModule
from .images.bank import BankDataModule as BankDataModule
from .images.catalog import CATALOG as CATALOG
from .images.catalog import DatasetInfo as DatasetInfo
from .images.module import ImageDataModule as ImageDataModule
from .images.stream import ImageFolderStream as ImageFolderStream
from .images.subset import SubsetDataModule as SubsetDataModule
from .images.subset import SubsetStream as SubsetStream
from .images.substitute import DistilledDataModule as DistilledDataModule
from .noise import NoiseDataModule as NoiseDataModule
from .safety.catalog import SAFETY_SETS as SAFETY_SETS
from .safety.catalog import SafetySetInfo as SafetySetInfo
from .safety.module import SafetyDataModule as SafetyDataModule
from .safety.readers import read_samples as read_samples
from .safety.shapes import Shapes as Shapes
from .safety.xstest import XSTest as XSTest
from .sessions.catalog import SESSIONS as SESSIONS
from .sessions.catalog import SessionSetInfo as SessionSetInfo
from .sessions.module import SessionDataModule as SessionDataModule
from .sessions.planted import Planted as Planted
