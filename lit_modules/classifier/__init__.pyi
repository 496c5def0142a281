from .evaluation import ClassifierEvaluation as ClassifierEvaluation
from .hooks import (
    ClassifierHooks as ClassifierHooks,
)
from .hooks import (
    EvaluatedClassifier as EvaluatedClassifier,
)
from .losses import class_index as class_index
from .losses import cross_entropy as cross_entropy
from .losses import distillation_loss as distillation_loss
from .module import (
    ImageClassifier as ImageClassifier,
)
from .module import (
    frozen_teacher as frozen_teacher,
)
from .training import (
    Recipe as Recipe,
)
from .training import (
    accuracy as accuracy,
)
from .training import (
    train as train,
)
from .training import (
    train_and_score as train_and_score,
)
