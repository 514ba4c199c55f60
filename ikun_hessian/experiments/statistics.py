"""Small-sample statistics over seeds: medians, paired differences, equivalence, survival and rank correlation.

A few seeds, skewed and sometimes infinite numbers (a run that never got there): so order statistics and ranks, whose
null distributions are exact for every n, in place of means and normal tails. Over 4000 samples each of 5 to 20
differences, normal, lognormal (sigma 1/2 and 1), exponential, uniform and t(2), the 95% intervals of `paired_shift`
covered the pseudo-median in 92 to 97%, those of `median` the median in 93 to 96%; the t interval of the mean covered in
82 to 97%. Differences are of logarithms where the ratio is what matters. Infinite values are worst ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

LEVEL, POWER = 0.95, 0.8
LEAST = 5  # values or pairs: fewer have no interval, for the widest one there is covers 87.5% at most
EFFICIENCY = 3 / math.pi  # of the signed-rank test against the t test, normal differences
ROUNDING = 1e-12  # of a standard error of shares
MOST_PAIRS, SURE = 100_000, 50.0  # of sample_size; noncentralities beyond SURE, which SciPy cannot do, change nothing
Values = Sequence[float] | npt.NDArray[np.float64]
Array = npt.NDArray[np.float64]
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Interval:
    """An estimate from n values or pairs, and the ends within which the truth lies with probability `level`.

    NaN ends: n does not allow an interval. level is below 0.95 only for n = 5, where no exact interval reaches it.
    """

    value: float = NAN
    low: float = NAN
    high: float = NAN
    n: int = 0
    level: float = LEVEL


def median(values: Values) -> Interval:
    """The median of values [n], with an interval for any continuous distribution.

    From the order statistics, interpolated between the two whose levels enclose 95% (Hettmansperger & Sheather 1986);
    least and largest for n = 5, 93.75%. Values may be infinite, not NaN.
    """
    x = np.sort(_known(values))
    n = len(x)
    if n < LEAST:
        return Interval(_middle(x), n=n)
    if n == LEAST:
        return Interval(_middle(x), x[0], x[-1], n, 1 - 2 * 0.5**n)
    levels = 1 - 2 * stats.binom.cdf(np.arange(n // 2), n, 0.5)  # of [k + 1-th least, k + 1-th largest]
    k = int(np.flatnonzero(levels >= LEVEL)[-1])
    share = (levels[k] - LEVEL) / (levels[k] - levels[k + 1])
    weight = (n - k - 1) * share / (k + 1 + (n - 2 * k - 2) * share)
    return Interval(_middle(x), _between(x[k], x[k + 1], weight), _between(x[-k - 1], x[-k - 2], weight), n)


def _middle(x: Array) -> float:
    """The median of sorted values; the upper of two middle ones where they are infinite and opposite."""
    return _between(x[(len(x) - 1) // 2], x[len(x) // 2], 0.5) if len(x) else NAN


def _between(first: float, second: float, weight: float) -> float:
    return float(first if weight == 0 or first == second else (1 - weight) * first + weight * second)


def paired_shift(differences: Values) -> Interval:
    """The pseudo-median of paired differences [n]: the median of the means of two (Hodges & Lehmann 1963).

    The interval holds the shifts that the exact signed-rank test does not reject at 5% (Tukey's, from ordered Walsh
    averages): exact for differences that are symmetric about their median, which those of two levels alike but for a
    shift are. n = 5 allows 93.75% at most. Infinite differences count as larger than all others.
    """
    d = _known(differences)
    n = len(d)
    first, second = np.triu_indices(n)
    with np.errstate(invalid="ignore"):
        walsh = (d[first] + d[second]) / 2
    walsh = np.sort(np.where(np.isnan(walsh), 0.0, walsh))  # inf - inf: ranks alike, signs cancel
    if n < LEAST:
        return Interval(_middle(walsh), n=n)
    below = _cumulative(n)
    k = max(1, int(np.searchsorted(below, (1 - LEVEL) / 2, side="right")))  # P(T < k) <= 2.5%
    return Interval(_middle(walsh), walsh[k - 1], walsh[-k], n, min(LEVEL, 1 - 2 * float(below[k - 1])))


def signed_rank(differences: Values, alternative: str = "two-sided") -> float:
    """p of Wilcoxon's signed-rank test that differences [n] lie about 0, exact for every n and for tied sizes.

    By all 2^n signs of the ranks at hand, zeros dropped. alternative: two-sided, greater or less. 1 if all are 0.
    """
    d = _known(differences)
    d = d[d != 0]
    ranks = np.rint(2 * stats.rankdata(np.abs(d))).astype(int)  # doubled: ties have half ranks
    chances = _null(ranks)
    found = int(ranks[d > 0].sum())
    upper, lower = float(chances[found:].sum()), float(chances[: found + 1].sum())
    p = {"two-sided": 2 * min(upper, lower), "greater": upper, "less": lower}[alternative]
    return min(1.0, p)


def _null(ranks: npt.NDArray[np.int64]) -> Array:
    """P(sum of the ranks with a positive sign = 0, 1, ...), all signs alike: the product of (1 + x^rank) / 2."""
    chances = np.ones(1)
    for rank in ranks:
        chances = 0.5 * (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0)))
    return chances


def equivalence(differences: Values, bound: float) -> float:
    """p of the two one-sided tests (Schuirmann 1987) of a shift outside (-bound, bound): exact, by signed ranks."""
    d = _known(differences)
    return max(signed_rank(d + bound, "greater"), signed_rank(d - bound, "less")) if len(d) else NAN


@cache
def _cumulative(n: int) -> Array:
    """P(the signed-rank statistic of n untied differences <= 0, 1, ...)."""
    return np.cumsum(_null(np.arange(1, n + 1)))


def effect_size(differences: Values) -> Interval:
    """Standardized mean of paired differences [n], d_z, with Hedges' correction for small n; finite ones alone.

    The interval inverts the noncentral t distribution: exact for normal differences. NaN for fewer than two.
    """
    d = _known(differences)
    d = d[np.isfinite(d)]
    n = len(d)
    spread = float(d.std(ddof=1)) if n > 1 else 0.0
    if not spread > 1e-12 * float(np.abs(d).max(initial=0)):
        return Interval(n=n)
    raw = float(d.mean()) / spread
    value = (
        raw * math.exp(special.gammaln((n - 1) / 2) - special.gammaln((n - 2) / 2)) * math.sqrt(2 / (n - 1))
        if n > 2
        else NAN
    )
    if n < LEAST:
        return Interval(value, n=n)
    tail, t = (1 - LEVEL) / 2, abs(raw) * math.sqrt(n)  # of the size: SciPy has no lower tail far from 0
    ends = [math.copysign(1, raw) * _noncentrality(t, n - 1, p) / math.sqrt(n) for p in (1 - tail, tail)]
    return Interval(value, min(ends), max(ends), n)


def _noncentrality(t: float, freedom: int, p: float) -> float:
    """The noncentrality at which P(T <= t) = p, falling in it, for t >= 0, at least four degrees of freedom and p of
    0.025 to 0.975; NaN where the distribution cannot be had."""
    try:  # at the ends P is above 0.998 and below 0.004
        return float(optimize.brentq(lambda nc: float(stats.nct.cdf(t, freedom, nc)) - p, -3.0, 2 * t + 5))
    except ValueError:
        return NAN


def superiority(differences: Values) -> Interval:
    """P(difference > 0) over pairs that differ (probability of superiority); Clopper and Pearson's interval, which
    covers in at least 95%."""
    d = _known(differences)
    d = d[d != 0]
    if not len(d):
        return Interval()
    found = stats.binomtest(int((d > 0).sum()), len(d))
    ends = found.proportion_ci(LEVEL)
    return Interval(float(found.statistic), float(ends.low), float(ends.high), len(d))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: the chance of any false claim among them stays below each.

    NaN stays NaN and counts for nothing.
    """
    order = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, worst = [NAN] * len(p), 0.0
    for rank, (value, i) in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * value))
        adjusted[i] = worst
    return adjusted


def least_pairs(alpha: float = 1 - LEVEL) -> int:
    """Pairs without which no exact two-sided paired p can be as small as alpha: 2 / 2^n <= alpha."""
    return math.ceil(1 - math.log2(alpha))


@dataclass(frozen=True)
class SampleSize:
    """Pairs needed, each with probability 0.8. effect: for the effect that was seen to be significant. equivalence: for
    a true shift of 0 to be shown to lie within the bound. NaN: not to be had, or more than 100,000."""

    effect: float = NAN
    equivalence: float = NAN


def sample_size(differences: Values, bound: float = NAN, comparisons: int = 1) -> SampleSize:
    """Pairs to plan with, from the spread and the mean of finite differences [n], themselves known no better than n is.

    By the power of the paired t test over the signed-rank test's efficiency, 3/pi, and no fewer than `least_pairs`.
    comparisons: in Holm's family, all of which may have to pass at the smallest level.
    """
    d = _known(differences)
    d = d[np.isfinite(d)]
    spread = float(d.std(ddof=1)) if len(d) > 1 else 0.0
    if not spread > 0:
        return SampleSize()
    alpha, shift = (1 - LEVEL) / comparisons, abs(float(d.mean())) / spread

    def shown(n: int) -> float:
        return float(stats.nct.sf(stats.t.isf(alpha / 2, n - 1), n - 1, min(shift * math.sqrt(n), SURE)))

    def bounded(n: int) -> float:
        return (
            2 * float(stats.nct.sf(stats.t.isf(1 - LEVEL, n - 1), n - 1, min(bound / spread * math.sqrt(n), SURE))) - 1
        )

    return SampleSize(
        _least(shown, least_pairs(alpha)) if shift > 0 else NAN,
        NAN if math.isnan(bound) else _least(bounded, LEAST),
    )


def _least(power: Callable[[int], float], least: int) -> float:
    """The least number of pairs with power 0.8 for the signed-rank test, power growing with n."""
    low, high = 1, 2  # power(low) < 0.8 <= power(high)
    while not power(high) >= POWER:
        low, high = high, 2 * high
        if high > MOST_PAIRS:
            return NAN
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return float(max(math.ceil(high / EFFICIENCY), least))


def survival_median(times: Values, reached: Sequence[bool] | npt.NDArray[np.bool_]) -> Interval:
    """Kaplan and Meier's median of times [n], those not reached censored there; inf where less than half got there.

    The interval is Brookmeyer and Crowley's (1982) from log-log bands. Continuous times were covered in 93 to 98% from
    n = 5 on, but in 89 to 92% for n = 5 with a third censored at random; whole epochs, which tie, in 96 to 99%.
    """
    t, seen = np.asarray(times, np.float64), np.asarray(reached, bool)
    n = len(t)
    if not seen.any():
        return Interval(INF if n else NAN, INF if n >= LEAST else NAN, INF if n >= LEAST else NAN, n)
    curve = stats.ecdf(stats.CensoredData(uncensored=t[seen], right=t[~seen])).sf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the NaN band where all or none are left: replaced below
        band = curve.confidence_interval(LEVEL, method="log-log")

    def first(left: Array) -> float:
        """Where the survivors are half or fewer for the first time."""
        hit = np.flatnonzero(left <= 0.5 + 1e-12)
        return float(curve.quantiles[hit[0]]) if len(hit) else INF

    value = first(curve.probabilities)
    if n < LEAST:
        return Interval(value, n=n)
    low, high = (
        np.where(np.isnan(b.probabilities), curve.probabilities, b.probabilities) for b in (band.low, band.high)
    )
    return Interval(value, first(low), first(high), n)


def paired_log_rank(times: Values, reached: Sequence[bool], others: Values, reached_too: Sequence[bool]) -> float:
    """p of the log-rank test stratified by pair: who got there first, exact in place of its chi-squared.

    A pair says something where one reached it while the other, not yet there, was still observed; each then has one
    event of expectation 1/2, so that the test is a sign test of these pairs. 1 without any.
    """
    pairs = list(zip(times, reached, others, reached_too, strict=True))
    first = sum(e and (a < b or (a == b and not f)) for a, e, b, f in pairs)  # censored at an event's time: still there
    second = sum(f and (b < a or (a == b and not e)) for a, e, b, f in pairs)
    return float(stats.binomtest(first, first + second).pvalue) if first + second else 1.0


def kendall(x: Values, y: Values, groups: Sequence[object] | None = None) -> Interval:
    """Kendall's tau-a of x [n] and y [n]: concordant less discordant pairs of runs, over all pairs.

    groups [n]: only pairs within a group count, pooled. The interval is the jackknife's over runs with t quantiles, n
    less the groups less one degrees of freedom. In 800 samples each of normal pairs, tau 0 to 0.6, it covered in 92 to
    98% for n = 6 to 30, none counted as a miss, and 96 to 99% for three or six groups of five or more. NaN ends for
    fewer than LEAST runs, and where the jackknife sees no spread, as if all pairs are alike. Raises ValueError for NaN
    or lengths that differ.
    """
    a, b = _known(x), _known(y)
    names: list[object] = [None] * len(a) if groups is None else list(groups)
    if not len(a) == len(b) == len(names):
        raise ValueError(f"kendall needs values in pairs, not {len(a)}, {len(b)} and {len(names)} of them")
    group = np.array([names.index(name) for name in names])
    partners = (group[:, None] == group) & ~np.eye(len(a), dtype=bool)
    keep = partners.any(1)
    n, pairs = int(keep.sum()), partners.sum(1)[keep]  # of every run
    if not n:
        return Interval()
    agreeing = (np.where(partners, _order(a) * _order(b), 0.0).sum(1))[keep]  # concordant less discordant ones
    value, freedom = float(agreeing.sum() / pairs.sum()), n - len(set(group[keep].tolist())) - 1
    left = pairs.sum() - 2 * pairs
    if n < LEAST or freedom < 2 or not left.all():
        return Interval(value, n=n)
    without = (agreeing.sum() - 2 * agreeing) / left
    stderr = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    if stderr < ROUNDING:
        return Interval(value, n=n)
    half = float(stats.t.isf((1 - LEVEL) / 2, freedom)) * stderr
    return Interval(value, max(-1.0, value - half), min(1.0, value + half), n)


def _order(x: Array) -> Array:
    """The sign of x_i - x_j, also of infinite ones [n, n]."""
    return (x[:, None] > x).astype(np.float64) - (x[:, None] < x)


def _known(values: Values) -> Array:
    x = np.asarray(values, np.float64)
    if np.isnan(x).any():
        raise ValueError("NaN among the values: leave out what is not known, or make it infinite where it is worst")
    return x
