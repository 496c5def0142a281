from .rules import herding_subset as herding_subset
from .rules import random_subset as random_subset
