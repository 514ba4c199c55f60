"""Tests of the statistics over seeds against SciPy, enumeration and closed forms, and of the intervals' coverage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from ikun_hessian.experiments.comparison.statistics import (
    Interval,
    effect_size,
    equivalence,
    holm,
    kendall,
    least_pairs,
    median,
    paired_shift,
    signed_rank,
    superiority,
    survival_median,
)

Array = npt.NDArray[np.float64]
NAN, INF = math.nan, math.inf


def coverage(
    estimate: Callable[[Array], Interval], draw: Callable[[], Array], truth: float, times: int = 1500
) -> float:
    """How often the interval holds the truth; the share itself is known to 0.6%."""
    found = [estimate(draw()) for _ in range(times)]
    return sum(i.low <= truth <= i.high for i in found) / times


SHAPES: dict[str, tuple[Callable[[np.random.Generator, int], Array], float]] = {  # how to draw, median
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "lognormal": (lambda rng, n: np.exp(0.7 * rng.normal(size=n)), 1.0),
    "exponential": (lambda rng, n: rng.exponential(size=n), math.log(2)),
}


# --- medians


def test_median_from_order_statistics() -> None:
    """Levels by the binomial distribution; the interpolation's closed form for n = 10 (Hettmansperger & Sheather)."""
    assert median([3.0, 1.0, 2.0, 5.0, 4.0]) == Interval(3.0, 1.0, 5.0, 5, 0.9375)
    x = np.arange(1.0, 11.0)
    wide, narrow = 1 - 2 * (1 + 10) / 1024, 1 - 2 * (1 + 10 + 45) / 1024
    share = (wide - 0.95) / (wide - narrow)
    weight = (10 - 2) * share / (2 + 6 * share)
    found = median(x)
    assert found.value == 5.5
    assert found.low == pytest.approx(2 + weight)
    assert found.high == pytest.approx(9 - weight)
    assert median([4.0, 2.0]).value == 3.0
    assert math.isnan(median([4.0, 2.0]).low)
    assert math.isnan(median([]).value)


def test_the_median_may_be_infinite() -> None:
    found = median([1.0, 2.0, 3.0, INF, INF, 4.0])
    assert (found.value, found.high) == (3.5, INF)
    assert 1 <= found.low < 2
    assert median([INF] * 6) == Interval(INF, INF, INF, 6)
    assert median([-INF, 1.0, 2.0]).value == 1.0
    with pytest.raises(ValueError, match="the values contain NaN"):
        median([1.0, NAN])


@pytest.mark.parametrize("n", [5, 6, 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_median_covers(shape: str, n: int) -> None:
    rng = np.random.default_rng(n)
    draw, truth = SHAPES[shape]
    assert 0.92 <= coverage(median, lambda: draw(rng, n), truth) <= 0.98


# --- paired differences


def test_signed_rank_is_scipys_without_ties() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 6, 9, 25):
        d = rng.normal(0.4, 1, n)
        for alternative in ("two-sided", "greater", "less"):
            expected = stats.wilcoxon(d, alternative=alternative, method="exact").pvalue
            assert signed_rank(d, alternative) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "d", [[1.0, 1.0, -1.0, 2.0, 0.0, 3.0], [0.5, 0.5, 0.5, -0.5, 2.0], [INF, INF, 1.0, -2.0, -INF]]
)
def test_signed_rank_with_ties_is_all_signs(d: list[float]) -> None:
    kept = np.array([x for x in d if x != 0])
    ranks = stats.rankdata(np.abs(kept))
    every = np.array([np.dot(ranks, signs) for signs in itertools.product((0, 1), repeat=len(kept))])
    found = ranks[kept > 0].sum()
    upper, lower = (every >= found).mean(), (every <= found).mean()
    assert signed_rank(d) == pytest.approx(min(1, 2 * min(upper, lower)), rel=1e-12)
    assert signed_rank(d, "greater") == pytest.approx(upper, rel=1e-12)
    assert signed_rank(d, "less") == pytest.approx(lower, rel=1e-12)


def test_signed_rank_without_differences_is_one() -> None:
    assert signed_rank([0.0, 0.0]) == signed_rank([]) == 1.0


@pytest.mark.parametrize("n", [5, 6, 9, 12])
def test_paired_shift_inverts_the_signed_rank_test(n: int) -> None:
    """Inside the interval the exact test keeps the shift, outside it rejects it; the middle Walsh mean estimates."""
    d = np.random.default_rng(n).normal(1, 1, n)
    found = paired_shift(d)
    walsh = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(d, 2)]
    assert found.value == pytest.approx(np.median(walsh))
    width = 1e-6
    for inside in (found.low + width, found.high - width):
        assert stats.wilcoxon(d - inside, method="exact").pvalue > 0.05
    if n > 5:
        for outside in (found.low - width, found.high + width):
            assert stats.wilcoxon(d - outside, method="exact").pvalue <= 0.05
    assert found.level == (0.9375 if n == 5 else 0.95)


def test_paired_shift_handles_few_and_infinite_differences() -> None:
    assert paired_shift([1.0, 3.0]).value == 2.0
    assert math.isnan(paired_shift([1.0, 3.0]).low)
    one = paired_shift([1.0, 2.0, 3.0, 4.0, 5.0, INF])
    assert (one.value, one.low, one.high) == (3.5, 1.0, INF)
    both = paired_shift([-INF, INF, 1.0, 2.0, 3.0, 4.0])
    assert both.low == -both.high == -INF
    assert math.isfinite(both.value)


@pytest.mark.parametrize("n", [5, 6, 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_paired_shift_covers(shape: str, n: int) -> None:
    """Differences themselves skewed (the pseudo-median then, by simulation), and differences of two skewed levels."""
    rng = np.random.default_rng([n, 7])
    draw, _ = SHAPES[shape]
    truth = float(np.median(draw(rng, 400_000) + draw(rng, 400_000)) / 2)
    assert 0.92 <= coverage(paired_shift, lambda: draw(rng, n), truth) <= 0.98
    assert 0.92 <= coverage(paired_shift, lambda: draw(rng, n) - draw(rng, n), 0.0) <= 0.98


def test_no_p_below_the_least_pairs() -> None:
    for alpha in (0.05, 0.05 / 3, 0.001):
        n = least_pairs(alpha)
        assert signed_rank(np.arange(1.0, n + 1)) <= alpha < signed_rank(np.arange(1.0, n))


# --- equivalence


def test_equivalence_is_two_one_sided_tests() -> None:
    d = np.random.default_rng(3).normal(0.02, 0.1, 8)
    one = stats.wilcoxon(d + 0.2, alternative="greater", method="exact").pvalue
    other = stats.wilcoxon(d - 0.2, alternative="less", method="exact").pvalue
    assert equivalence(d, 0.2) == pytest.approx(max(one, other))
    assert equivalence(d, 0.2) < 0.05 < equivalence(d, 0.01)
    assert equivalence(d + 1, 0.2) > 0.9  # far outside on one side: its own test fails
    assert equivalence(d - 1, 0.2) > 0.9
    assert math.isnan(equivalence([], 0.2))


def test_equivalence_keeps_its_level() -> None:
    """At the bound itself it is claimed in at most 5%."""
    rng = np.random.default_rng(0)
    claims = [equivalence(rng.normal(0.2, 0.05, 7), 0.2) < 0.05 for _ in range(600)]
    assert np.mean(claims) <= 0.07


# --- sizes of effects


def test_effect_size_inverts_the_noncentral_t() -> None:
    """Hedges' factor by its closed form; ends at which the t statistic lies at 2.5% and 97.5%."""
    d = np.array([0.8, 1.4, 0.2, 1.1, 0.9, 0.5])
    raw = d.mean() / d.std(ddof=1)
    found = effect_size(d)
    assert found.value == pytest.approx(raw * math.gamma(2.5) / (math.sqrt(2.5) * math.gamma(2.0)))
    t = stats.ttest_1samp(d, 0).statistic
    for end, p in ((found.low, 0.975), (found.high, 0.025)):
        assert stats.nct.cdf(t, 5, end * math.sqrt(6)) == pytest.approx(p, abs=1e-6)
    mirrored = effect_size(-d)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    assert effect_size([*d, INF]).value == found.value
    assert math.isnan(effect_size([1.0, 1.0, 1.0]).value)
    assert math.isnan(effect_size([1.0]).value)
    assert math.isnan(effect_size([1.0, 2.0, 4.0]).low)


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_effect_size_covers(shift: float, n: int) -> None:
    rng = np.random.default_rng(n)
    assert 0.92 <= coverage(effect_size, lambda: rng.normal(shift, 1, n), shift, 500) <= 0.98


def test_effect_size_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    found = [effect_size(rng.normal(1.0, 1.0, 4)).value for _ in range(4000)]
    assert np.mean(found) == pytest.approx(1.0, abs=4 * np.std(found) / math.sqrt(4000))


def test_superiority_is_the_share_of_positive_differences() -> None:
    """Clopper and Pearson from the beta distribution; pairs that tie say nothing."""
    found = superiority([1.0, 2.0, INF, -1.0, 0.0, 3.0])
    low, high = stats.beta.ppf(0.025, 4, 2), stats.beta.ppf(0.975, 5, 1)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.8, low, high, 5))
    assert math.isnan(superiority([0.0]).value)


@pytest.mark.parametrize("n", [5, 10])
def test_superiority_covers_at_least(n: int) -> None:
    rng = np.random.default_rng(n)
    truth = float(stats.norm.cdf(0.8))
    assert coverage(superiority, lambda: rng.normal(0.8, 1, n), truth, 500) >= 0.95


# --- several comparisons


def test_holm_adjusts_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    found = holm([0.02, NAN, 0.01])
    assert found[::2] == pytest.approx([0.02, 0.02])
    assert math.isnan(found[1])


def test_holm_keeps_the_familywise_error() -> None:
    rng = np.random.default_rng(0)
    false = [min(holm(list(rng.uniform(size=5)))) <= 0.05 for _ in range(2000)]
    assert 0.035 <= np.mean(false) <= 0.065


# --- epochs until something is reached


def test_survival_median_by_hand() -> None:
    """Kaplan and Meier's product by hand: 5/6, 4/6, then 3 left of which one goes: 4/6 * 2/3 = 4/9."""
    times, reached = [1.0, 2.0, 2.5, 3.0, 4.0, 5.0], [True, True, False, True, False, True]
    assert survival_median(times, reached).value == 3.0
    assert survival_median([1.0, 2.0, 9.0, 9.0, 9.0], [True, True, False, False, False]).value == INF
    assert survival_median([9.0] * 5, [False] * 5) == Interval(INF, INF, INF, 5)
    few = survival_median([3.0, 4.0], [True, False])
    assert few.value == 3.0
    assert math.isnan(few.low)
    assert math.isnan(survival_median([], []).value)
    later = survival_median([1.0, 2.0, 3.0, 4.0, 9.0, 9.0], [True] * 4 + [False] * 2)
    assert (later.value, later.high) == (3.0, INF)


def test_survival_interval_by_hand() -> None:
    """Brookmeyer and Crowley: the times at which the log-log band of Greenwood's variance holds 1/2."""
    times = np.array([2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    n = len(times)
    left = np.arange(n, 0, -1)
    survival = np.cumprod(1 - 1 / left)[:-1]
    variance = np.cumsum(1 / (left * (left - 1.0 + 1e-300)))[:-1]
    width = 1.959964 * np.sqrt(variance) / np.log(survival)
    lower, upper = survival ** np.exp(-width), survival ** np.exp(width)
    low, high = (min(t for t, s in zip(times, (*b, 0.0), strict=True) if s <= 0.5) for b in (lower, upper))
    found = survival_median(times, [True] * n)
    assert (found.low, found.high) == (min(low, high), max(low, high))


@pytest.mark.parametrize("censored", [False, True])
@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("shape", ["lognormal", "exponential"])
def test_survival_median_covers(shape: str, n: int, censored: bool) -> None:
    """All observed, or censored at the end of a budget of 1.6 medians."""
    rng = np.random.default_rng([n, censored])
    draw, truth = SHAPES[shape]
    budget = 1.6 * truth if censored else INF

    def found(times: Array) -> Interval:
        return survival_median(np.minimum(times, budget), times <= budget)

    assert 0.92 <= coverage(found, lambda: draw(rng, n), truth, 1000) <= 0.98


# --- rank correlation


def test_kendall_is_scipys_without_ties() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 15))
    assert kendall(x, y).value == pytest.approx(stats.kendalltau(x, y).statistic)
    assert kendall(x, y).n == 15


def test_kendall_within_groups_pools_pairs() -> None:
    """Weights by the pairs of each group; a level that moves both does not enter."""
    rng = np.random.default_rng(1)
    sizes = {"a": 5, "b": 8, "c": 1}
    names = [name for name, n in sizes.items() for _ in range(n)]
    shift = np.array([{"a": 0.0, "b": 100.0, "c": 200.0}[name] for name in names])
    x, y = rng.normal(size=(2, 14)) + shift
    where = {name: [i for i, other in enumerate(names) if other == name] for name in "ab"}
    expected = sum(stats.kendalltau(x[i], y[i]).statistic * len(i) * (len(i) - 1) for i in where.values()) / (20 + 56)
    found = kendall(x, y, names)
    assert found.value == pytest.approx(expected)
    assert found.n == 13
    assert kendall(x, y).value > 0.4 > abs(found.value)


def test_the_kendall_interval_is_the_jackknifes() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=9)
    y = x + rng.normal(size=9)
    found = kendall(x, y)
    without = np.array([stats.kendalltau(np.delete(x, i), np.delete(y, i)).statistic for i in range(9)])
    stderr = math.sqrt(8 / 9 * ((without - without.mean()) ** 2).sum())
    half = stats.t.ppf(0.975, 7) * stderr
    assert (found.low, found.high) == pytest.approx((max(-1, found.value - half), min(1, found.value + half)))


def test_kendall_has_no_interval_where_leaving_out_changes_nothing() -> None:
    """There is no interval if tau, computed by SciPy, is the same whichever run is left out."""
    x, y = list(range(6)), [4, 5, 2, 3, 0, 1]
    without = [stats.kendalltau(np.delete(x, i), np.delete(y, i)).statistic for i in range(6)]
    assert without == pytest.approx([-0.6] * 6)
    for order in (y, y[::-1]):
        found = kendall(x, order)
        assert abs(found.value) == pytest.approx(0.6)
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert found.n == 6
    apart = kendall(x * 2, [*y, *(10.0 * np.array(y))], [0] * 6 + [1] * 6)
    assert apart.value == pytest.approx(-0.6)
    assert math.isnan(apart.low)
    assert kendall(x, [4, 5, 2, 3, 1, 0]).low < kendall(x, [4, 5, 2, 3, 1, 0]).high  # one pair exchanged


def test_kendall_handles_ties_infinities_and_few_values() -> None:
    assert kendall([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]).value == 1
    assert math.isnan(kendall([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]).low)
    assert math.isnan(kendall([1, 2, 3], [1, 3, 2]).low)
    assert math.isnan(kendall([1.0, 2.0], [1.0, 2.0], ["a", "b"]).value)
    assert kendall([1, 2, INF, INF], [1, 2, 3, 4]).value == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="equal lengths, not 2, 1 and 2"):
        kendall([1, 2], [1])
    with pytest.raises(ValueError, match="NaN"):
        kendall([1, NAN], [1, 2])


@pytest.mark.parametrize(("groups", "each"), [(1, 10), (1, 30), (3, 6)])
@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_kendall_covers(rho: float, groups: int, each: int) -> None:
    """Normal pairs, tau = 2 asin(rho) / pi, one of them skewed by exp, which ranks do not see."""
    rng = np.random.default_rng([groups, each])
    names = np.repeat(np.arange(groups), each)
    truth = 2 / math.pi * math.asin(rho)

    def draw() -> Array:
        x, e = rng.normal(size=(2, len(names)))
        return np.array([np.exp(x), rho * x + math.sqrt(1 - rho**2) * e])

    found = coverage(lambda pair: kendall(pair[0], pair[1], list(names)), draw, truth, 500)
    assert 0.92 <= found <= (0.98 if groups == 1 else 0.99)
