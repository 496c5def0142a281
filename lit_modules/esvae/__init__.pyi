from .ann import (
    VAE as VAE,
)
from .ann import (
    FeatureAutoencoder as FeatureAutoencoder,
)
from .ann import (
    MeanImage as MeanImage,
)
from .module import ImageAutoencoder as ImageAutoencoder
from .networks import (
    ESVAE as ESVAE,
)
from .networks import (
    FSVAE as FSVAE,
)
from .networks import (
    SAE as SAE,
)
