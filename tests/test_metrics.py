import math

import numpy as np
import pytest

from ones_lib import benefit_retention
from ones_lib.metrics import retention_interval


def test_the_papers_numbers():
    """78.4, 79.5 and 61.7% (arXiv 2201.10890) give a dense baseline of 76.6."""
    dense = (78.4 - 0.617 * 79.5) / (1 - 0.617)
    assert dense == pytest.approx(76.6, abs=0.05)
    assert benefit_retention(78.4, dense, 79.5) == pytest.approx(0.617)


@pytest.mark.parametrize(("student", "expected"), [(60, 0.0), (80, 1.0), (70, 0.5), (90, 1.5), (50, -0.5)])
def test_by_hand_never_clipped(student, expected):
    assert benefit_retention(student, 60, 80) == expected


@pytest.mark.parametrize("moe", [60, 59.9])
def test_undefined_where_there_is_no_benefit(moe):
    assert math.isnan(benefit_retention(61, 60, moe))


def draws(accuracies, examples=4000, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.random(examples) < a for a in accuracies])


def test_interval_holds_the_truth_about_as_often_as_it_says():
    """200 experiments with known accuracies: student 0.7, dense 0.6, MoE 0.8, retention 0.5."""
    hits = 0
    for trial in range(200):
        parts = [draws([a], 1000, seed=(trial, i)) for i, a in enumerate((0.7, 0.6, 0.8))]
        _, low, high = retention_interval(*parts, draws=300)
        hits += low <= 0.5 <= high
    assert 180 <= hits <= 199


def test_spread_over_seeds_widens_the_interval():
    calm = retention_interval(draws([0.7, 0.7, 0.7]), draws([0.6] * 3, seed=1), draws([0.8] * 3, seed=2))
    wild = retention_interval(draws([0.62, 0.7, 0.78]), draws([0.6] * 3, seed=1), draws([0.8] * 3, seed=2))
    assert wild[2] - wild[1] > 2 * (calm[2] - calm[1])
    assert calm[1] < calm[0] < calm[2]


def test_shared_test_examples_cancel():
    """Three models that fail on nested sets of examples: the student halfway, in every resample nearly."""
    hard = np.linspace(0, 1, 2000)[None]
    _, low, high = retention_interval(hard < 0.7, hard < 0.6, hard < 0.8)
    independent = retention_interval(draws([0.7], 2000), draws([0.6], 2000, 1), draws([0.8], 2000, 2))
    assert high - low < independent[2] - independent[1]


def test_undefined_interval_is_unbounded():
    nan, low, high = retention_interval(draws([0.7]), draws([0.8], seed=1), draws([0.6], seed=2))
    assert math.isnan(nan)
    assert (low, high) == (-math.inf, math.inf)
    estimate, low, high = retention_interval(draws([0.7], 100), draws([0.6], 100, 1), draws([0.61], 100, 2))
    assert (low, high) == (-math.inf, math.inf) or math.isnan(estimate)
