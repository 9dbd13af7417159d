"""Gathering: one feed-forward network (FFN) from a bank of E experts.

A gathering method is a pure function of the experts' weights, and for some methods of the layer's activations on data. The
four methods of "One Student Knows All Experts Know" (Xue et al., arXiv 2201.10890) are in :mod:`.paper`: ``sum``,
``average``, ``topk`` (Top-KG) and ``svd`` (SVD-KG), in the paper's form by default. Methods that use data are in
:mod:`.calibrated`, :mod:`.regression` and :mod:`.selection`. :mod:`.registry` has :func:`gather`, which checks its arguments
and calls a method; :mod:`.scale` explains the option ``scale``; :mod:`.truncation` is SVD-KG's fast low-rank approximation.

Notation: E experts, h = d_ff hidden neurons, model width d. ``g_i(x)`` is expert i's gate for token x, zero if the expert is
not chosen; ``p_i`` is its mean over tokens; ``s = sum_i p_i`` is the mean sum of a token's gates.

A new method is a function under :func:`register`. Then ``gather(bank, "first")`` works, and so does every table and figure::

    @register("first")
    def first_expert(bank, *, scale=1.0):
        return bank.expert(0).map(lambda tensor: scale * tensor)

Imports :mod:`ones_lib.ffn` and :mod:`ones_lib.calibration`.
"""

from ones_lib.gathering import calibrated, paper, regression, selection  # noqa: F401  registers the methods
from ones_lib.gathering.registry import gather, gathering_methods, register

__all__ = ["gather", "gathering_methods", "register"]
