from .credit import (
    CreditSelection as CreditSelection,
)
from .credit import (
    HighFiring as HighFiring,
)
from .credit import (
    firing_intensity as firing_intensity,
)
from .networks import ReLUCNN as ReLUCNN
from .networks import SpikingCNN as SpikingCNN
