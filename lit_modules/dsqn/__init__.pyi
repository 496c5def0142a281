from .conversion import ConvertedDQN as ConvertedDQN
from .conversion import convert as convert
from .module import Conversion as Conversion
from .module import DeepQLearning as DeepQLearning
from .module import FixedPolicy as FixedPolicy
from .networks import DQN as DQN
from .networks import DSQN as DSQN
