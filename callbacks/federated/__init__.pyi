from .personal import PersonalisedEvaluation as PersonalisedEvaluation
from .rounds import FederatedRounds as FederatedRounds
