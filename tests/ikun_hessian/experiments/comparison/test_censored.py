"""Tests of the comparison of censored pairs: coverage, level, and agreement with the signed-rank test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ikun_hessian.experiments.comparison.censored import CensoredPairs, censored_pairs
from ikun_hessian.experiments.comparison.statistics import paired_shift, signed_rank


def simulated(random: np.random.Generator, n: int, ratio: float, horizon: float, epochs: bool = False) -> CensoredPairs:
    """Draw n pairs of lognormal times with a common part, and observe them up to a horizon."""
    common = random.normal(size=(n, 1))
    times = 10 * np.exp(0.35 * (common + random.normal(size=(n, 2)))) * np.array([ratio, 1.0])
    times = np.ceil(times) if epochs else times
    first, second = ([(min(t, horizon), t <= horizon, horizon) for t in column] for column in times.T)
    return censored_pairs(first, second)


@pytest.mark.parametrize("epochs", [False, True])
@pytest.mark.parametrize(("horizon", "ratio"), [(14.0, 1.0), (10.5, 1.0), (8.5, 1.0), (14.0, 1.5), (10.5, 1.5)])
def test_the_interval_of_the_ratio_covers_at_every_share_of_censoring(
    horizon: float, ratio: float, epochs: bool
) -> None:
    """About 25, 50 and 65% censored; counting censored runs as infinite covered 88, 79 and 74%."""
    random = np.random.default_rng(int(10 * horizon) + epochs)
    hits, inside = 0, []
    for replicate in range(400):
        pairs = simulated(random, 16, ratio, horizon, epochs)
        covered = pairs.p(ratio) > 0.05
        hits += covered
        if replicate < 20:  # the interval is the set of ratios that the test does not reject
            found = pairs.ratio()
            inside.append(math.isnan(found.low) or found.low <= ratio <= found.high)
            assert epochs or covered == inside[-1]  # whole epochs have ties, at which the p-value jumps
    assert hits / 400 >= 0.92
    assert sum(inside) >= 17


def test_the_p_value_keeps_its_level_and_agrees_with_the_interval() -> None:
    random = np.random.default_rng(3)
    rejected = 0
    for _ in range(100):
        pairs = simulated(random, 8, 1.0, 10.0)
        p, found = pairs.p(), pairs.ratio()
        rejected += p <= 0.05
        if not math.isnan(found.low):
            assert (p <= 0.05) <= (not found.low < 1 < found.high)
            assert (found.low > 1 or found.high < 1) <= (p <= 0.05)
    assert rejected / 100 <= 0.1


def test_without_censoring_it_is_the_signed_rank_test() -> None:
    random = np.random.default_rng(0)
    a, b = random.lognormal(size=(2, 9))
    pairs = censored_pairs([(t, True, 99.0) for t in a], [(t, True, 99.0) for t in b])
    d = np.log(a / b)
    assert pairs.p() == pytest.approx(stats.wilcoxon(d, method="exact").pvalue)
    found, expected = pairs.ratio(), paired_shift(d)
    assert (found.value, found.low, found.high) == pytest.approx(
        tuple(math.exp(x) for x in (expected.value, expected.low, expected.high))
    )
    bound = math.log(1.25)
    assert pairs.equivalence(1.25) == max(signed_rank(d + bound, "greater"), signed_rank(d - bound, "less"))


def test_an_end_that_censoring_leaves_open_is_infinite() -> None:
    reached, never = [(float(t), True, 20.0) for t in range(3, 10)], [(20.0, False, 20.0)] * 7
    pairs = censored_pairs(never, reached)
    found = pairs.ratio()
    assert pairs.p() == 2 / 2**7
    assert found.high == math.inf
    assert 1 < found.low < 20 / 3
    other = censored_pairs(reached, never).ratio()
    assert other.low == 0
    assert other.high == pytest.approx(1 / found.low)


def test_nothing_observed_leaves_no_interval() -> None:
    never = [(20.0, False, 20.0)] * 7
    pairs = censored_pairs(never, never)
    assert pairs.p() == 1
    assert all(map(math.isnan, (pairs.ratio().value, pairs.ratio().low, pairs.ratio().high)))


def test_a_run_with_a_short_log_says_nothing_beyond_its_end() -> None:
    """The partner reached the target after the short run was lost from sight."""
    pairs = censored_pairs([(4.0, False, 4.0)] * 6, [(5.0, True, 9.0)] * 6)
    assert pairs.p() == 1


def test_impossible_times_are_refused() -> None:
    for bad in ((0.0, True, 9.0), (10.0, True, 9.0), (math.nan, True, 9.0)):
        with pytest.raises(ValueError, match="positive and at most the horizon"):
            censored_pairs([bad], [(1.0, True, 9.0)])
