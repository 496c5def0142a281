from .convnets import (
    VGG11 as VGG11,
)
from .convnets import (
    AlexNet as AlexNet,
)
from .convnets import (
    ConvNet as ConvNet,
)
from .features import FeatureClassifier as FeatureClassifier
from .features import logits_and_features as logits_and_features
from .features import pooled_features as pooled_features
from .mlp import MLP as MLP
from .mlp import LinearClassifier as LinearClassifier
from .neurons import integrate_and_fire as integrate_and_fire
from .neurons import lif as lif
from .normalize import Normalize as Normalize
from .resnets import (
    CifarResNet as CifarResNet,
)
from .resnets import (
    ResNet18 as ResNet18,
)
from .resnets import (
    ResNet34 as ResNet34,
)
from .resnets import (
    ResNet50 as ResNet50,
)
from .resnets import (
    WideResNet as WideResNet,
)
from .spiking import (
    LeakyReadout as LeakyReadout,
)
from .spiking import (
    SpikingConvNet as SpikingConvNet,
)
from .spiking import (
    ThresholdBatchNorm as ThresholdBatchNorm,
)
from .spiking import (
    fold_time as fold_time,
)
from .spiking import (
    repeat_time as repeat_time,
)
from .spiking import (
    reset as reset,
)
from .spiking import (
    unfold_time as unfold_time,
)
from .timm_net import TimmNet as TimmNet
