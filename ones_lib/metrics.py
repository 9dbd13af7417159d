"""Benefit retention with its uncertainty, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.stats import rankdata

#: Metrics for which lower is better, in nats. All others are fractions, shown in per cent.
LOWER_IS_BETTER = ("loss", "kl")
DRAWS = 2000  # of the bootstrap intervals
TAIL = (1 - 0.95) / 2  # on each side of an interval of 95%


def main_metric(table: pd.DataFrame) -> str:
    """The metric to judge students by, for a table with columns ``accuracy`` and ``loss``: the loss where there is one, which is
    finer than a language model's accuracy."""
    return "loss" if table["loss"].notna().any() else "accuracy"


def benefit_retention(student: float, dense: float, moe: float) -> float:
    """The fraction of the MoE's benefit that a student keeps: ``(student - dense) / (moe - dense)`` (arXiv 2201.10890).

    All three are values of one metric for which higher is better. 1 is the MoE's level, 0 the dense baseline's; values are
    not clipped. NaN if ``moe <= dense``: there is no benefit to keep.
    """
    return (student - dense) / (moe - dense) if moe > dense else math.nan


def retention_interval(
    student: Sequence[np.ndarray],
    dense: Sequence[np.ndarray],
    moe: Sequence[np.ndarray],
    draws: int = DRAWS,
) -> tuple[float, float, float]:
    """Retention of the mean score over tasks, with an interval by a bootstrap over seeds and test examples.

    Each draw takes seeds with replacement, the same for all three models, because student, baseline and MoE of one seed
    belong together. It also takes every task's test examples with replacement, the same for all models.

    Args:
        student, dense, moe: by task, the scores [seeds, examples]; higher is better (1 for correct, 0 for wrong).

    Returns:
        Estimate, low, high. If the MoE's mean is not above the dense one's, they are NaN, -inf, inf. If that holds in more of
        the draws than one tail of the interval, low and high are -inf, inf.
    """
    estimate = benefit_retention(*(np.mean([scores.mean() for scores in m]) for m in (student, dense, moe)))
    if math.isnan(estimate):
        return estimate, -math.inf, math.inf
    seeds, means = len(student[0]), 0
    for task, parts in enumerate(zip(student, dense, moe, strict=True)):
        stacked = np.concatenate(parts).astype(np.float64)  # [3 * seeds, examples]
        weights = _resampling(stacked.shape[1], draws, task)
        drawn = [_weighted_means(stacked, weights[first : first + 100]) for first in range(0, draws, 100)]
        means = means + np.concatenate(drawn).reshape(draws, 3, seeds) / len(student)
    drawn = np.random.default_rng(0).integers(seeds, size=(draws, 1, seeds))
    s, d, m = np.take_along_axis(means, drawn, axis=2).mean(axis=2).T
    benefit = m - d
    if (benefit <= 0).mean() > TAIL:
        return estimate, -math.inf, math.inf
    defined = benefit > 0
    low, high = np.quantile((s - d)[defined] / benefit[defined], [TAIL, 1 - TAIL])
    return estimate, float(low), float(high)


# Drawing takes ten times as long as using the draws, and the rows of a table use the same draws.
@lru_cache(maxsize=4)
def _resampling(examples: int, draws: int, task: int) -> np.ndarray:
    """How often each draw takes each example, uint8 [draws, examples].

    Counts are Poisson(1), independent: their total varies, which does not matter for a ratio of means.
    """
    rng, counts = np.random.default_rng([0, task]), np.empty((draws, examples), np.uint8)
    for first in range(0, draws, 100):
        part = counts[first : first + 100]
        part[...] = rng.poisson(1.0, part.shape)
    return counts


def _weighted_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of ``values`` [m, n] under ``weights`` [b, n], as [b, m]."""
    # In float64, so that tables do not depend on the number of threads.
    weights = weights.astype(np.float64)
    return weights @ values.T / weights.sum(axis=1, keepdims=True)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rank correlation of two quantities [variants, seeds], each averaged over seeds.

    Returns:
        Estimate, and the bounds of its interval by a bootstrap over variants and seeds. NaN if one of the quantities is the
        same for all variants.
    """
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"x, y: expected two arrays [variants, seeds], found {list(x.shape)} and {list(y.shape)}")
    generator, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        rows, columns = (generator.integers(n, size=n) for n in x.shape)
        drawn = (values[rows][:, columns].mean(axis=1) for values in (x, y))
        found.append(_spearman(*drawn))
    estimate = _spearman(x.mean(axis=1), y.mean(axis=1))
    if math.isnan(estimate):
        return estimate, math.nan, math.nan
    low, high = np.nanquantile(found, [TAIL, 1 - TAIL])
    return estimate, float(low), float(high)


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [rankdata(values) for values in (x, y)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])
