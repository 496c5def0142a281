from .aggregation import FedAvg as FedAvg
from .aggregation import FedNova as FedNova
from .local import (
    FedProx as FedProx,
)
from .local import (
    LocalObjective as LocalObjective,
)
from .local import (
    LocalTraining as LocalTraining,
)
from .local import (
    Scaffold as Scaffold,
)
from .module import FederatedClassifier as FederatedClassifier
from .privacy import DPSGD as DPSGD
from .selection import (
    LargestClients as LargestClients,
)
from .selection import (
    LargestUpdate as LargestUpdate,
)
from .selection import (
    PowerOfChoice as PowerOfChoice,
)
from .selection import (
    RandomClients as RandomClients,
)
