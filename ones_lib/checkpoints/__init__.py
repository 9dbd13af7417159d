"""Makes published MoE checkpoints dense, and reads the experts of models and checkpoints.

May import the core, models and data.
"""

from ones_lib.checkpoints.convert import convert
from ones_lib.checkpoints.experts import open_experts

__all__ = ["convert", "open_experts"]
