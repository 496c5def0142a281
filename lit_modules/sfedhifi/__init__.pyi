from .decomposition import DecomConv as DecomConv
from .fusion import HIFI as HIFI
from .module import WidthFederation as WidthFederation
from .networks import (
    FactorisedCNN as FactorisedCNN,
)
from .networks import (
    FactorisedResNet18 as FactorisedResNet18,
)
from .networks import (
    FactorisedSpikingCNN as FactorisedSpikingCNN,
)
from .networks import (
    FactorisedSpikingResNet18 as FactorisedSpikingResNet18,
)
from .widths import (
    DynamicWidths as DynamicWidths,
)
from .widths import (
    FixedWidths as FixedWidths,
)
from .widths import (
    InformativeLayer as InformativeLayer,
)
