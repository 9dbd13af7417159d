"""From a sparse mixture of experts to one dense student: gathering, distillation, and the study of both.

Importing this package registers the ``widenet_*`` and ``ones_*`` models with timm, and the text models with transformers'
Auto classes.
"""

from ones_lib.calibration import Calibration, LayerActivations, collect_activations
from ones_lib.distillation import Distillation
from ones_lib.ffn import FeedForwardWeights
from ones_lib.gathering import gather, gathering_methods, register
from ones_lib.integration import integrate
from ones_lib.metrics import benefit_retention
from ones_lib.models import upcycle

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Distillation",
    "FeedForwardWeights",
    "LayerActivations",
    "benefit_retention",
    "collect_activations",
    "gather",
    "gathering_methods",
    "integrate",
    "register",
    "upcycle",
]
