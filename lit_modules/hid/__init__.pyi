from .backbones import STAMP as STAMP
from .backbones import Backbone as Backbone
from .backbones import GRU4Rec as GRU4Rec
from .intents import HybridIntents as HybridIntents
from .intents import Intents as Intents
from .losses import ICLoss as ICLoss
from .scoring import Scoring as Scoring
from .scoring import top_k as top_k
