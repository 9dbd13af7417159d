"""From a sparse mixture of experts (MoE) to one dense student: "One Student Knows All Experts Know" (arXiv 2201.10890).

The modules of this package are the paper. Read them in this order, from the equation to the student:

1. :mod:`.ffn` expert weights; :mod:`.moe` router, balance loss, the MoE layer (:mod:`.dispatch` only makes it fast)
2. :mod:`.calibration` activations of MoE layers on data
3. :mod:`.gathering` experts into one FFN: registry, scale, paper, truncation, calibrated, regression
4. :mod:`.integration` teacher into student
5. :mod:`.distillation` losses of the student's training (:mod:`.joint_fit` fits all of its FFNs by one of them)
6. :mod:`.metrics` benefit retention; :mod:`.spectra` what the experts share and what a gathering keeps

They import only each other (this file also re-exports :func:`upcycle`). The packages :mod:`.models`, :mod:`.data`,
:mod:`.checkpoints`, :mod:`.study` and :mod:`.views` build on them.

Importing ``ones_lib`` registers the ``widenet_*`` and ``ones_*`` models with timm, and the text models with transformers'
Auto classes.
"""

import gc
from importlib.metadata import PackageNotFoundError, version

_collecting = gc.isenabled()
gc.disable()  # what is imported stays: to look through it again and again takes a fifth of an import's time

from ones_lib.calibration import Calibration, LayerActivations, collect_activations
from ones_lib.distillation import Distillation
from ones_lib.ffn import FeedForwardWeights
from ones_lib.gathering import gather, gathering_methods, register
from ones_lib.integration import integrate
from ones_lib.metrics import benefit_retention
from ones_lib.models import upcycle

if _collecting:
    gc.enable()

try:
    __version__ = version("ones-lib")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+checkout"

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
