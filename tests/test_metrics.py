import math

import numpy as np
import pytest
import torch

from ones_lib import benefit_retention
from ones_lib.data.squad import best_no_answer_threshold, squad_scores
from ones_lib.metrics import rank_correlation, retention_interval


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


def interval(*models, **options):
    """Of a single task."""
    return retention_interval(*([scores] for scores in models), **options)


def test_interval_holds_the_truth_about_as_often_as_it_says():
    """200 experiments with known accuracies: student 0.7, dense 0.6, MoE 0.8, retention 0.5."""
    hits = 0
    for trial in range(200):
        parts = [draws([a], 1000, seed=(trial, i)) for i, a in enumerate((0.7, 0.6, 0.8))]
        _, low, high = interval(*parts, draws=300)
        hits += low <= 0.5 <= high
    assert 180 <= hits <= 199


def test_spread_over_seeds_widens_the_interval():
    calm = interval(draws([0.7, 0.7, 0.7]), draws([0.6] * 3, seed=1), draws([0.8] * 3, seed=2))
    wild = interval(draws([0.62, 0.7, 0.78]), draws([0.6] * 3, seed=1), draws([0.8] * 3, seed=2))
    assert wild[2] - wild[1] > 2 * (calm[2] - calm[1])
    assert calm[1] < calm[0] < calm[2]


def test_shared_test_examples_cancel():
    """Three models that fail on nested sets of examples: the student halfway, in every resample nearly."""
    hard = np.linspace(0, 1, 2000)[None]
    _, low, high = interval(hard < 0.7, hard < 0.6, hard < 0.8)
    independent = interval(draws([0.7], 2000), draws([0.6], 2000, 1), draws([0.8], 2000, 2))
    assert high - low < independent[2] - independent[1]


def test_undefined_interval_is_unbounded():
    nan, low, high = interval(draws([0.7]), draws([0.8], seed=1), draws([0.6], seed=2))
    assert math.isnan(nan)
    assert (low, high) == (-math.inf, math.inf)
    estimate, low, high = interval(draws([0.7], 100), draws([0.6], 100, 1), draws([0.61], 100, 2))
    assert (low, high) == (-math.inf, math.inf) or math.isnan(estimate)


def test_interval_of_several_tasks_is_of_their_mean():
    """Tasks of different sizes count the same; equal tasks give what one of them gives, but for the drawing."""
    models = [draws([a, a + 0.01], 3000, seed=i) for i, a in enumerate((0.7, 0.6, 0.8))]
    small = [draws([a, a], 300, seed=9 + i) for i, a in enumerate((0.5, 0.5, 0.6))]
    estimate, low, high = retention_interval(*([a, b] for a, b in zip(models, small, strict=True)))
    s, d, m = ((a.mean() + b.mean()) / 2 for a, b in zip(models, small, strict=True))
    assert estimate == pytest.approx((s - d) / (m - d))
    assert low < estimate < high
    one, two = interval(*models), retention_interval(*([a, a] for a in models))
    assert two[0] == pytest.approx(one[0])
    assert two[2] - two[1] < one[2] - one[1]  # the copies are resampled each on its own


@pytest.mark.parametrize(
    ("prediction", "answers", "f1", "exact"),
    [
        ("the Norman", ["Normans", "norman"], 1, 1),  # article, case; the best of several answers
        ("in the 10th century.", ["10th century"], 0.8, 0),  # 2 of 3 words right, all 2 found; punctuation
        ("10th, century", ["10th century"], 1, 1),
        ("France", ["Germany"], 0, 0),
        ("", ["Germany"], 0, 0),
        ("", [], 1, 1),
        ("Germany", [], 0, 0),
        ("a b b", ["b b c"], 0.8, 0),  # the article does not count: b b against b b c
        ("x x", ["x"], 2 / 3, 0),
    ],
)
def test_squad_scores_by_hand(prediction, answers, f1, exact):
    found = squad_scores([prediction], [answers])
    assert found["f1"].item() == pytest.approx(f1)
    assert found["exact_match"].item() == exact


@pytest.mark.parametrize("seed", range(20))
def test_no_answer_threshold_is_the_best_there_is(seed):
    """Against trying every threshold; ties among the odds included."""
    generator = torch.Generator().manual_seed(seed)
    answered, silent = torch.rand(2, 12, generator=generator)
    odds = torch.randint(-3, 4, (12,), generator=generator).float()
    threshold = best_no_answer_threshold(answered, silent, odds)
    means = [torch.where(odds > t, silent, answered).mean() for t in [-math.inf, *odds.tolist()]]
    assert torch.where(odds > threshold, silent, answered).mean() == pytest.approx(float(max(means)))


def test_no_answer_threshold_by_hand():
    """Answering the two questions with the lowest odds is right, the third has no answer: threshold at the second."""
    answered, silent = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert best_no_answer_threshold(answered, silent, torch.tensor([-2.0, 0.5, 3.0])) == 0.5
    assert best_no_answer_threshold(torch.zeros(3), torch.ones(3), torch.tensor([-2.0, 0.5, 3.0])) == -math.inf


def test_rank_correlation_is_scipys_and_its_interval_holds_it():
    from scipy.stats import spearmanr

    generator = np.random.default_rng(0)
    x = generator.normal(size=(20, 3))
    y = -x + generator.normal(size=(20, 3))
    estimate, low, high = rank_correlation(x, y)
    assert estimate == pytest.approx(spearmanr(x.mean(axis=1), y.mean(axis=1)).statistic)
    assert -1 <= low < estimate < high < 0
    wide = rank_correlation(x[:6], y[:6])
    assert wide[2] - wide[1] > high - low  # fewer variants, less certain
    assert rank_correlation(x[:, :1], np.exp(x[:, :1]))[0] == pytest.approx(1)
    assert all(math.isnan(v) for v in rank_correlation(x, np.ones_like(x)))
    with pytest.raises(ValueError, match=r"x, y: expected two arrays \[variants, seeds\], found \[20, 3\] and \[20\]"):
        rank_correlation(x, y[:, 0])
