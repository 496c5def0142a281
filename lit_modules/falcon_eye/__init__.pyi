from .backbone import Backbone as Backbone
from .backbone import PretrainedVLM as PretrainedVLM
from .backbone import TinyVLM as TinyVLM
from .backbone import VLMSource as VLMSource
from .encoding import SafetyEncoder as SafetyEncoder
from .encoding import harm_scores as harm_scores
from .guards import OutputsJudge as OutputsJudge
from .http_judge import HttpJudge as HttpJudge
from .judges import FeatureJudge as FeatureJudge
from .judges import KeywordJudge as KeywordJudge
from .judges import MajorityJudge as MajorityJudge
from .judges import SentenceFeatures as SentenceFeatures
from .judges import refused as refused
from .metrics import Agreement as Agreement
from .metrics import Figure as Figure
from .metrics import Judgements as Judgements
from .metrics import SafetyMetrics as SafetyMetrics
from .metrics import choose_threshold as choose_threshold
from .metrics import decided as decided
from .metrics import fleiss_kappa as fleiss_kappa
from .metrics import summary as summary
from .parsing import answer_values as answer_values
from .parsing import parse as parse
from .prompt import (
    CATEGORY_KEY as CATEGORY_KEY,
)
from .prompt import (
    EXPLANATION_KEY as EXPLANATION_KEY,
)
from .prompt import (
    JUDGMENT_KEYS as JUDGMENT_KEYS,
)
from .prompt import Prompt as Prompt
from .taxonomy import category as category
from .taxonomy import mentioned as mentioned
from .taxonomy import translated as translated
