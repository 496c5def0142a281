from .distillers import (
    DistributionMatching as DistributionMatching,
)
from .distillers import (
    FixedSet as FixedSet,
)
from .distillers import (
    TruncatedBPTT as TruncatedBPTT,
)
from .engines import Adjoint as Adjoint
from .engines import Unrolled as Unrolled
from .evaluation import Evaluation as Evaluation
from .from_file import FromFile as FromFile
from .gradient_matching import GradientMatching as GradientMatching
from .inner import InnerOptimizer as InnerOptimizer
from .lowrank import LowRankHessian as LowRankHessian
from .module import DatasetDistillation as DatasetDistillation
from .recovery import SqueezeRecoverRelabel as SqueezeRecoverRelabel
from .trajectory_matching import TrajectoryMatching as TrajectoryMatching
from .windows import (
    AdaptiveWindow as AdaptiveWindow,
)
from .windows import (
    FullWindow as FullWindow,
)
from .windows import (
    HalfWindow as HalfWindow,
)
from .windows import (
    LastWindow as LastWindow,
)
from .windows import (
    RandomWindow as RandomWindow,
)
