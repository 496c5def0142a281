from .allocation import ALLOCATIONS as ALLOCATIONS
from .allocation import bin_shares as bin_shares
from .bins import Binning as Binning
from .pictures import selection_pictures as selection_pictures
from .rules import ADQ as ADQ
from .rules import DQ as DQ
from .scores import random_views as random_views
from .scores import texture as texture
