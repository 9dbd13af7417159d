"""Gathering: pure functions from a bank of experts to one feed-forward network. Imports: ``ffn``, ``calibration``."""

from ones_lib.gathering import calibrated, paper, regression  # noqa: F401  registers the methods
from ones_lib.gathering.registry import gather, gathering_methods, register

__all__ = ["gather", "gathering_methods", "register"]
