"""Benefit retention with its uncertainty; SQuAD's scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.stats import rankdata

#: Metrics of which less is better, in nats; all others are parts of one, shown in per cent.
LOWER_IS_BETTER = ("loss",)


def main_metric(table: pd.DataFrame) -> str:
    """By which students are judged whose ``accuracy`` and ``loss`` a table has: the loss where there is one."""
    return "loss" if table["loss"].notna().any() else "accuracy"


def benefit_retention(student: float, dense: float, moe: float) -> float:
    """Part of the MoE's benefit that a student keeps, ``(student - dense) / (moe - dense)`` (arXiv 2201.10890).

    All three in the same metric, higher is better. 1 is the MoE's level, 0 the dense baseline's; never clipped.
    NaN where ``moe <= dense``: there is no benefit to keep and retention is undefined.
    """
    return (student - dense) / (moe - dense) if moe > dense else math.nan


def rank_correlation(
    x: np.ndarray, y: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's rank correlation of the means over seeds of two quantities [variants, seeds], with its interval by a bootstrap
    over variants and seeds: estimate, low, high. NaN where one of them is the same for all variants."""
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"x, y: expected two arrays [variants, seeds], found {list(x.shape)} and {list(y.shape)}")
    generator, found = np.random.default_rng(seed), []
    for _ in range(draws):
        rows, columns = (generator.integers(n, size=n) for n in x.shape)
        drawn = (values[rows][:, columns].mean(axis=1) for values in (x, y))
        found.append(_spearman(*drawn))
    estimate = _spearman(x.mean(axis=1), y.mean(axis=1))
    if math.isnan(estimate):
        return estimate, math.nan, math.nan
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return estimate, float(low), float(high)


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [rankdata(values) for values in (x, y)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def retention_interval(
    student: Sequence[np.ndarray],
    dense: Sequence[np.ndarray],
    moe: Sequence[np.ndarray],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Retention of the score averaged over tasks, and its interval by a bootstrap over seeds and over test examples.

    Each draw takes seeds with replacement (the same for all three models, which belong together by seed) and every task's
    test examples with replacement (the same for all models, which were tested on the same ones).

    Args:
        student, dense, moe: for each task the scores [seeds, examples], higher is better; correct or not, for instance.

    Returns:
        Estimate, low, high. NaN, -inf, inf where the MoE's mean is not above the dense one's; low and high are -inf, inf
        also where that holds in more than the interval's tail of the draws.
    """
    estimate = benefit_retention(*(np.mean([scores.mean() for scores in m]) for m in (student, dense, moe)))
    if math.isnan(estimate):
        return estimate, -math.inf, math.inf
    tail, seeds, means = (1 - level) / 2, len(student[0]), 0
    for task, parts in enumerate(zip(student, dense, moe, strict=True)):
        stacked = np.concatenate(parts).astype(np.float64)  # [3 * seeds, examples]
        weights = _resampling(stacked.shape[1], draws, seed, task)
        drawn = [_weighted_means(stacked, weights[first : first + 100]) for first in range(0, draws, 100)]
        means = means + np.concatenate(drawn).reshape(draws, 3, seeds) / len(student)
    drawn = np.random.default_rng(seed).integers(seeds, size=(draws, 1, seeds))
    s, d, m = np.take_along_axis(means, drawn, axis=2).mean(axis=2).T
    benefit = m - d
    if (benefit <= 0).mean() > tail:
        return estimate, -math.inf, math.inf
    defined = benefit > 0
    low, high = np.quantile((s - d)[defined] / benefit[defined], [tail, 1 - tail])
    return estimate, float(low), float(high)


# Drawing takes ten times as long as what is done with it, and a table asks for the same again and again.
@lru_cache(maxsize=4)
def _resampling(examples: int, draws: int, seed: int, task: int) -> np.ndarray:
    """How often each example is drawn, uint8 [draws, examples]: Poisson(1) up to the fixed total, which a ratio does not need."""
    rng, counts = np.random.default_rng([seed, task]), np.empty((draws, examples), np.uint8)
    for first in range(0, draws, 100):
        part = counts[first : first + 100]
        part[...] = rng.poisson(1.0, part.shape)
    return counts


def _weighted_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[m, n] values under [b, n] weights -> [b, m]. In float64, so that tables do not depend on the number of threads."""
    weights = weights.astype(np.float64)
    return weights @ values.T / weights.sum(axis=1, keepdims=True)
