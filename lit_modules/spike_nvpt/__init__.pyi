from .module import TunedClassifier as TunedClassifier
from .prompts import (
    DensePrompts as DensePrompts,
)
from .prompts import (
    Prompts as Prompts,
)
from .prompts import (
    RandomBits as RandomBits,
)
from .prompts import (
    SpikingPrompts as SpikingPrompts,
)
from .tuning import (
    SSF as SSF,
)
from .tuning import (
    Adapter as Adapter,
)
from .tuning import (
    BitFit as BitFit,
)
from .tuning import (
    FullTuning as FullTuning,
)
from .tuning import (
    LinearProbe as LinearProbe,
)
from .tuning import (
    LoRA as LoRA,
)
from .tuning import (
    PartialTuning as PartialTuning,
)
from .tuning import (
    PromptTuning as PromptTuning,
)
from .tuning import (
    Tuning as Tuning,
)
from .vit import TunedNetwork as TunedNetwork
