from .anchors import AnchorLists as AnchorLists
from .assessment import Assessment as Assessment
from .assessment import ConsistencyAssessment as ConsistencyAssessment
from .hyperbolic import Geometry as Geometry
