from .rounds import FederatedRounds as FederatedRounds
