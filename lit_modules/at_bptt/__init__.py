"""AT-BPTT and its family: dataset distillation through truncated unrolled training (Li et al., arXiv:2510.04838)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_modules.at_bptt.distillers import DistributionMatching, FixedSet, TruncatedBPTT
    from lit_modules.at_bptt.engines import Adjoint, Unrolled
    from lit_modules.at_bptt.evaluation import Evaluation
    from lit_modules.at_bptt.inner import InnerOptimizer
    from lit_modules.at_bptt.lowrank import LowRankHessian
    from lit_modules.at_bptt.module import DatasetDistillation
    from lit_modules.at_bptt.windows import AdaptiveWindow, FullWindow, HalfWindow, LastWindow, RandomWindow

_HOME = {
    "AdaptiveWindow": "windows",
    "Adjoint": "engines",
    "DatasetDistillation": "module",
    "DistributionMatching": "distillers",
    "Evaluation": "evaluation",
    "FixedSet": "distillers",
    "FullWindow": "windows",
    "HalfWindow": "windows",
    "InnerOptimizer": "inner",
    "LastWindow": "windows",
    "LowRankHessian": "lowrank",
    "RandomWindow": "windows",
    "TruncatedBPTT": "distillers",
    "Unrolled": "engines",
}

__all__ = [
    "AdaptiveWindow",
    "Adjoint",
    "DatasetDistillation",
    "DistributionMatching",
    "Evaluation",
    "FixedSet",
    "FullWindow",
    "HalfWindow",
    "InnerOptimizer",
    "LastWindow",
    "LowRankHessian",
    "RandomWindow",
    "TruncatedBPTT",
    "Unrolled",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
