"""Benefit retention with its uncertainty."""

from __future__ import annotations

import math

import numpy as np


def benefit_retention(student: float, dense: float, moe: float) -> float:
    """Part of the MoE's benefit that a student keeps, ``(student - dense) / (moe - dense)`` (arXiv 2201.10890).

    All three in the same metric, higher is better. 1 is the MoE's level, 0 the dense baseline's; never clipped.
    NaN where ``moe <= dense``: there is no benefit to keep and retention is undefined.
    """
    return (student - dense) / (moe - dense) if moe > dense else math.nan


def retention_interval(
    student: np.ndarray, dense: np.ndarray, moe: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Retention of the mean accuracies, and its interval by a bootstrap over seeds and over test examples.

    Each draw takes seeds with replacement (the same for all three models, which belong together by seed) and test
    examples with replacement (the same for all models, which were tested on the same ones).

    Args:
        student, dense, moe: correct or not, [seeds, examples].

    Returns:
        Estimate, low, high. NaN, -inf, inf where the MoE's mean is not above the dense one's; low and high are -inf, inf
        also where that holds in more than the interval's tail of the draws.
    """
    means, tail = [m.mean() for m in (student, dense, moe)], (1 - level) / 2
    estimate = benefit_retention(*means)
    if math.isnan(estimate):
        return estimate, -math.inf, math.inf
    rng = np.random.default_rng(seed)
    seeds, examples = student.shape
    stacked = np.concatenate([student, dense, moe]).astype(np.float32)  # [3 * seeds, examples]
    # How often each example is drawn is Poisson(1) up to the fixed total, which the ratio does not need.
    accuracy = np.concatenate(
        [
            _weighted_means(stacked, rng.poisson(1.0, (min(100, draws - done), examples)))
            for done in range(0, draws, 100)
        ]
    ).reshape(draws, 3, seeds)
    drawn = rng.integers(seeds, size=(draws, 1, seeds))
    s, d, m = np.take_along_axis(accuracy, drawn, axis=2).mean(axis=2).T
    benefit = m - d
    if (benefit <= 0).mean() > tail:
        return estimate, -math.inf, math.inf
    defined = benefit > 0
    low, high = np.quantile((s - d)[defined] / benefit[defined], [tail, 1 - tail])
    return estimate, float(low), float(high)


def _weighted_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[m, n] values under [b, n] weights -> [b, m]."""
    weights = weights.astype(np.float32)
    return weights @ values.T / weights.sum(axis=1, keepdims=True)
