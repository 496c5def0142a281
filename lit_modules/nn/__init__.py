"""Networks that several methods share: pure torch, float images in [0, 1] in, logits out.

Names load lazily, so that a method that needs a ConvNet does not pay for torchvision or spikingjelly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_modules.nn.convnets import VGG11, AlexNet, ConvNet
    from lit_modules.nn.mlp import MLP, LinearClassifier
    from lit_modules.nn.neurons import integrate_and_fire, lif
    from lit_modules.nn.normalize import Normalize
    from lit_modules.nn.resnets import CifarResNet, ResNet18, ResNet50, WideResNet
    from lit_modules.nn.spiking import (
        LeakyReadout,
        SpikingConvNet,
        ThresholdBatchNorm,
        fold_time,
        repeat_time,
        reset,
        unfold_time,
    )
    from lit_modules.nn.timm_net import TimmNet

_HOME = {
    "AlexNet": "convnets",
    "CifarResNet": "resnets",
    "ConvNet": "convnets",
    "LeakyReadout": "spiking",
    "LinearClassifier": "mlp",
    "MLP": "mlp",
    "Normalize": "normalize",
    "ResNet18": "resnets",
    "ResNet50": "resnets",
    "SpikingConvNet": "spiking",
    "ThresholdBatchNorm": "spiking",
    "TimmNet": "timm_net",
    "VGG11": "convnets",
    "WideResNet": "resnets",
    "fold_time": "spiking",
    "integrate_and_fire": "neurons",
    "lif": "neurons",
    "repeat_time": "spiking",
    "reset": "spiking",
    "unfold_time": "spiking",
}

__all__ = [
    "MLP",
    "VGG11",
    "AlexNet",
    "CifarResNet",
    "ConvNet",
    "LeakyReadout",
    "LinearClassifier",
    "Normalize",
    "ResNet18",
    "ResNet50",
    "SpikingConvNet",
    "ThresholdBatchNorm",
    "TimmNet",
    "WideResNet",
    "fold_time",
    "integrate_and_fire",
    "lif",
    "repeat_time",
    "reset",
    "unfold_time",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
