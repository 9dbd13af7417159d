"""Checkpoints: a published MoE becomes a dense model that plain transformers loads.

Imports the core, models and data.
"""

from ones_lib.checkpoints.convert import convert

__all__ = ["convert"]
