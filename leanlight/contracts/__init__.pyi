from .allows import Allows as Allows
from .bank import BANK_COLUMNS as BANK_COLUMNS
from .bank import BANK_IMAGES as BANK_IMAGES
from .bank import BANK_MANIFEST as BANK_MANIFEST
from .bank import BANK_RECORD as BANK_RECORD
from .batch import Batch as Batch
from .batch import on_host as on_host
from .batch import to_device as to_device
from .compiled import uncompiled as uncompiled
from .emotion import (
    EmotionData as EmotionData,
)
from .emotion import (
    EmotionMeta as EmotionMeta,
)
from .emotion import (
    Modality as Modality,
)
from .emotion import (
    MultimodalBatch as MultimodalBatch,
)
from .errors import DivergedError as DivergedError
from .errors import MissingExtraError as MissingExtraError
from .errors import UserError as UserError
from .errors import nearest as nearest
from .federated import (
    ClientBatch as ClientBatch,
)
from .federated import (
    ClientEngine as ClientEngine,
)
from .federated import (
    ClientUpdate as ClientUpdate,
)
from .federated import (
    FederatedData as FederatedData,
)
from .federated import (
    FederatedModule as FederatedModule,
)
from .federated import (
    Measurement as Measurement,
)
from .federated import (
    Selector as Selector,
)
from .files import atomic_path as atomic_path
from .files import atomic_write as atomic_write
from .files import is_damaged as is_damaged
from .files import note_digest as note_digest
from .files import sha256_file as sha256_file
from .files import sweep_parts as sweep_parts
from .games import (
    Episode as Episode,
)
from .games import (
    EpisodeBatch as EpisodeBatch,
)
from .games import (
    GameData as GameData,
)
from .games import (
    GameMeta as GameMeta,
)
from .games import (
    QFunction as QFunction,
)
from .games import (
    Transition as Transition,
)
from .images import (
    ImageBatch as ImageBatch,
)
from .images import (
    ImageData as ImageData,
)
from .images import (
    ImageMeta as ImageMeta,
)
from .images import (
    ImageSplit as ImageSplit,
)
from .images import (
    InMemoryImages as InMemoryImages,
)
from .images import (
    NoiseBatch as NoiseBatch,
)
from .images import (
    TracedImages as TracedImages,
)
from .images import (
    predicted_origin as predicted_origin,
)
from .images import (
    same_classes as same_classes,
)
from .media import (
    Animation as Animation,
)
from .media import (
    Bars as Bars,
)
from .media import (
    Curve as Curve,
)
from .media import (
    Heatmap as Heatmap,
)
from .media import (
    Histogram as Histogram,
)
from .media import (
    ImageGrid as ImageGrid,
)
from .media import (
    MediaItem as MediaItem,
)
from .media import (
    Scatter as Scatter,
)
from .media import (
    Table as Table,
)
from .meta import DataMeta as DataMeta
from .prediction import ResumablePrediction as ResumablePrediction
from .prediction import SeenItems as SeenItems
from .protocols import (
    CollectsPredictions as CollectsPredictions,
)
from .protocols import (
    CompilesNetworks as CompilesNetworks,
)
from .protocols import (
    HasReplicas as HasReplicas,
)
from .protocols import (
    HasStep as HasStep,
)
from .protocols import (
    HasStepShape as HasStepShape,
)
from .protocols import (
    HasTerms as HasTerms,
)
from .protocols import (
    HasVariants as HasVariants,
)
from .protocols import (
    MethodData as MethodData,
)
from .protocols import (
    MethodModule as MethodModule,
)
from .protocols import (
    NetworkFactory as NetworkFactory,
)
from .protocols import (
    PrimaryMetric as PrimaryMetric,
)
from .protocols import (
    Progress as Progress,
)
from .protocols import (
    ResumableLogger as ResumableLogger,
)
from .protocols import (
    Split as Split,
)
from .protocols import (
    TrainingStep as TrainingStep,
)
from .protocols import (
    data_of as data_of,
)
from .protocols import (
    progress_of as progress_of,
)
from .rng import (
    capture_rng as capture_rng,
)
from .rng import (
    derived_seed as derived_seed,
)
from .rng import (
    isolated_rng as isolated_rng,
)
from .rng import (
    restore_rng as restore_rng,
)
from .rng import (
    run_seed as run_seed,
)
from .robustness import UnderNoise as UnderNoise
from .safety import (
    HARM_CATEGORIES as HARM_CATEGORIES,
)
from .safety import (
    IGNORED as IGNORED,
)
from .safety import (
    SAFETY_FIELDS as SAFETY_FIELDS,
)
from .safety import (
    Judge as Judge,
)
from .safety import (
    Picture as Picture,
)
from .safety import (
    SafetyData as SafetyData,
)
from .safety import (
    SafetyMeta as SafetyMeta,
)
from .safety import (
    SafetySample as SafetySample,
)
from .safety import (
    SampleEncoder as SampleEncoder,
)
from .safety import (
    TokenBatch as TokenBatch,
)
from .safety import (
    UnreadablePictureError as UnreadablePictureError,
)
from .safety import (
    Verdict as Verdict,
)
from .safety import (
    learned_positions as learned_positions,
)
from .sessions import (
    Catalogue as Catalogue,
)
from .sessions import (
    SessionBatch as SessionBatch,
)
from .sessions import (
    SessionData as SessionData,
)
from .sessions import (
    SessionMeta as SessionMeta,
)
from .sessions import (
    Sessions as Sessions,
)
