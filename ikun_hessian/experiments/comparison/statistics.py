"""Small-sample statistics over seeds: medians, paired differences, equivalence, survival and rank correlation.

There are few seeds, and their numbers are skewed and sometimes infinite (a run that never reached its target). These
functions therefore use order statistics and ranks, whose null distributions are exact for every n, instead of means and
normal approximations. Infinite values have the worst rank. If ratios matter, pass differences of logarithms.

Coverage was checked with 4000 samples of 5 to 20 differences from each of the normal, lognormal (sigma 0.5 and 1),
exponential, uniform and t(2) distributions. The 95% intervals of `paired_shift` covered the pseudo-median in 92 to 97%
of the samples, and those of `median` covered the median in 93 to 96%. The t interval covered the mean in 82 to 97%.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

LEVEL = 0.95
LEAST = 5  # fewest values or pairs for an interval; with 4 the widest exact one covers only 87.5%
ROUNDING = 1e-12  # a smaller standard error of tau counts as zero
Values = Sequence[float] | npt.NDArray[np.float64]
_Array = npt.NDArray[np.float64]
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval. NaN if n is too small for an interval.
        high: Upper end of the interval. NaN if n is too small for an interval.
        n: Number of values or pairs.
        level: Confidence level. It is below 0.95 only for n = 5, for which no exact interval reaches 0.95.
    """

    value: float = NAN
    low: float = NAN
    high: float = NAN
    n: int = 0
    level: float = LEVEL


def median(values: Values) -> Interval:
    """Estimate the median, with an interval that is valid for any continuous distribution.

    The interval is interpolated between the two pairs of order statistics whose levels enclose 95% (Hettmansperger &
    Sheather 1986). For n = 5 it is the range of the values, with level 93.75%.

    Args:
        values: Values [n]. They may be infinite.

    Returns:
        The median with its interval.

    Raises:
        ValueError: If a value is NaN.
    """
    x = np.sort(known_values(values))
    n = len(x)
    if n < LEAST:
        return Interval(_middle(x), n=n)
    if n == LEAST:
        return Interval(_middle(x), x[0], x[-1], n, 1 - 2 * 0.5**n)
    levels = 1 - 2 * stats.binom.cdf(np.arange(n // 2), n, 0.5)  # of [(k + 1)-th smallest, (k + 1)-th largest]
    k = int(np.flatnonzero(levels >= LEVEL)[-1])
    share = (levels[k] - LEVEL) / (levels[k] - levels[k + 1])
    weight = (n - k - 1) * share / (k + 1 + (n - 2 * k - 2) * share)
    return Interval(_middle(x), _between(x[k], x[k + 1], weight), _between(x[-k - 1], x[-k - 2], weight), n)


def _middle(x: _Array) -> float:
    """Return the median of sorted values; if the two middle ones are opposite infinities, the upper one."""
    return _between(x[(len(x) - 1) // 2], x[len(x) // 2], 0.5) if len(x) else NAN


def _between(first: float, second: float, weight: float) -> float:
    """Interpolate linearly; equal values, also infinite ones, are returned unchanged."""
    return float(first if weight == 0 or first == second else (1 - weight) * first + weight * second)


def paired_shift(differences: Values) -> Interval:
    """Estimate the pseudo-median of paired differences (Hodges & Lehmann 1963).

    The estimate is the median of the Walsh averages, the means of any two differences. The interval holds the shifts
    that the exact signed-rank test does not reject at 5% (Tukey's interval). It is exact if the differences are
    symmetric about their median, which holds for two levels that are equal up to a shift. For n = 5 its level is
    93.75%.

    Args:
        differences: Differences [n]. Infinite differences count as larger than all others.

    Returns:
        The pseudo-median with its interval.

    Raises:
        ValueError: If a difference is NaN.
    """
    d = known_values(differences)
    n = len(d)
    first, second = np.triu_indices(n)
    with np.errstate(invalid="ignore"):
        walsh = (d[first] + d[second]) / 2
    walsh = np.sort(np.where(np.isnan(walsh), 0.0, walsh))  # inf - inf: equal ranks whose signs cancel
    if n < LEAST:
        return Interval(_middle(walsh), n=n)
    below = _cumulative(n)
    k = max(1, int(np.searchsorted(below, (1 - LEVEL) / 2, side="right")))  # P(T < k) <= 2.5%
    return Interval(_middle(walsh), walsh[k - 1], walsh[-k], n, min(LEVEL, 1 - 2 * float(below[k - 1])))


def signed_rank(differences: Values, alternative: str = "two-sided") -> float:
    """Compute the p-value of Wilcoxon's signed-rank test that differences are symmetric about 0.

    The test enumerates all 2^n signs of the ranks, so it is exact for every n and for ties. Zeros are dropped.

    Args:
        differences: Differences [n].
        alternative: "two-sided", "greater" or "less".

    Returns:
        The p-value; 1 if all differences are 0.

    Raises:
        ValueError: If a difference is NaN.
    """
    upper, lower = signed_rank_tails(differences)
    return min(1.0, {"two-sided": 2 * min(upper, lower), "greater": upper, "less": lower}[alternative])


def signed_rank_tails(differences: Values) -> tuple[float, float]:
    """Compute the p-values of `signed_rank` for the alternatives "greater" and "less"."""
    d = known_values(differences)
    d = d[d != 0]
    ranks = np.rint(2 * stats.rankdata(np.abs(d))).astype(int)  # doubled, because ties have half-integer ranks
    chances = _null(ranks)
    found = int(ranks[d > 0].sum())
    return min(1.0, float(chances[found:].sum())), min(1.0, float(chances[: found + 1].sum()))


def _null(ranks: npt.NDArray[np.int64]) -> _Array:
    """Return P(sum of the positive ranks = 0, 1, ...) for random signs: the product of (1 + x^rank) / 2."""
    chances = np.ones(1)
    for rank in ranks:
        chances = 0.5 * (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0)))
    return chances


def equivalence(differences: Values, bound: float) -> float:
    """Compute the p-value of the two one-sided tests (Schuirmann 1987) for a shift within (-bound, bound).

    Args:
        differences: Differences [n].
        bound: Largest shift that counts as equivalent.

    Returns:
        The exact p-value, from signed ranks, of the hypothesis that the shift lies outside the bounds. NaN if n is 0.

    Raises:
        ValueError: If a difference is NaN.
    """
    d = known_values(differences)
    return max(signed_rank(d + bound, "greater"), signed_rank(d - bound, "less")) if len(d) else NAN


@cache
def _cumulative(n: int) -> _Array:
    """Return P(signed-rank statistic <= 0, 1, ...) for n differences without ties."""
    return np.cumsum(_null(np.arange(1, n + 1)))


def effect_size(differences: Values) -> Interval:
    """Estimate the standardized mean of paired differences, d_z, with Hedges' correction for small n.

    The interval inverts the noncentral t distribution and is exact for normal differences.

    Args:
        differences: Differences [n]. Infinite ones are ignored.

    Returns:
        The effect size with its interval. The value is NaN for fewer than three finite differences, or if they are
        equal.

    Raises:
        ValueError: If a difference is NaN.
    """
    d = known_values(differences)
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
    tail, t = (1 - LEVEL) / 2, abs(raw) * math.sqrt(n)  # of |d|: SciPy's lower tail is inaccurate far from 0
    ends = [math.copysign(1, raw) * _noncentrality(t, n - 1, p) / math.sqrt(n) for p in (1 - tail, tail)]
    return Interval(value, min(ends), max(ends), n)


def _noncentrality(t: float, freedom: int, p: float) -> float:
    """Return the noncentrality at which P(T <= t) = p; NaN if SciPy cannot compute the distribution.

    This holds for t >= 0, at least four degrees of freedom and p between 0.025 and 0.975.
    """
    try:  # P is above 0.998 and below 0.004 at the ends of the bracket
        return float(optimize.brentq(lambda nc: float(stats.nct.cdf(t, freedom, nc)) - p, -3.0, 2 * t + 5))
    except ValueError:
        return NAN


def superiority(differences: Values) -> Interval:
    """Estimate P(difference > 0) among pairs that differ (the probability of superiority).

    Args:
        differences: Differences [n]. Zeros are ignored.

    Returns:
        The fraction with the interval of Clopper and Pearson, whose coverage is at least 95%.

    Raises:
        ValueError: If a difference is NaN.
    """
    d = known_values(differences)
    d = d[d != 0]
    if not len(d):
        return Interval()
    found = stats.binomtest(int((d > 0).sum()), len(d))
    ends = found.proportion_ci(LEVEL)
    return Interval(float(found.statistic), float(ends.low), float(ends.high), len(d))


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's (1979) method, which controls the probability of any false rejection.

    Args:
        p: p-values. NaN values are ignored and stay NaN.

    Returns:
        The adjusted p-values, in the order given.
    """
    order = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, worst = [NAN] * len(p), 0.0
    for rank, (value, i) in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * value))
        adjusted[i] = worst
    return adjusted


def least_pairs(alpha: float = 1 - LEVEL) -> int:
    """Return the smallest n for which an exact two-sided paired p-value can be at most alpha: 2 / 2^n <= alpha."""
    return math.ceil(1 - math.log2(alpha))


def survival_median(times: Values, reached: Sequence[bool] | npt.NDArray[np.bool_]) -> Interval:
    """Estimate the median time to an event (Kaplan-Meier) with the interval of Brookmeyer and Crowley (1982).

    The interval uses log-log bands. For continuous times it covered the median in 93 to 98% of samples from n = 5 on,
    but in 89 to 92% for n = 5 with a third of the times censored at random. For whole epochs, which have ties, it
    covered in 96 to 99%.

    Args:
        times: Time of the event, or of censoring [n].
        reached: Whether the event was observed [n].

    Returns:
        The median with its interval; infinite if fewer than half of the runs reached the event.
    """
    t, seen = np.asarray(times, np.float64), np.asarray(reached, bool)
    n = len(t)
    if not seen.any():
        return Interval(INF if n else NAN, INF if n >= LEAST else NAN, INF if n >= LEAST else NAN, n)
    curve = stats.ecdf(stats.CensoredData(uncensored=t[seen], right=t[~seen])).sf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the band is NaN where all or none survive; replaced below
        band = curve.confidence_interval(LEVEL, method="log-log")

    def first(left: _Array) -> float:
        """Return the first time at which the surviving fraction is at most one half."""
        hit = np.flatnonzero(left <= 0.5 + 1e-12)
        return float(curve.quantiles[hit[0]]) if len(hit) else INF

    value = first(curve.probabilities)
    if n < LEAST:
        return Interval(value, n=n)
    low, high = (
        np.where(np.isnan(b.probabilities), curve.probabilities, b.probabilities) for b in (band.low, band.high)
    )
    return Interval(value, first(low), first(high), n)


def kendall(x: Values, y: Values, groups: Sequence[object] | None = None) -> Interval:
    """Estimate Kendall's tau-a: concordant minus discordant pairs, divided by the number of all pairs.

    The interval is a jackknife over runs with t quantiles and n - (number of groups) - 1 degrees of freedom. In 800
    samples of normal pairs with tau from 0 to 0.6 it covered in 92 to 98% for n = 6 to 30 (an interval that does not
    exist counts as a miss), and in 96 to 99% for three or six groups of at least five.

    Args:
        x: Values [n].
        y: Values [n].
        groups: Group of each run [n]. Only pairs within a group count, pooled over the groups.

    Returns:
        The correlation. The ends of its interval are NaN for fewer than `LEAST` runs, or if the jackknife values do not
        vary (for instance if all pairs are concordant).

    Raises:
        ValueError: If a value is NaN, or the lengths differ.
    """
    a, b = known_values(x), known_values(y)
    names: list[object] = [None] * len(a) if groups is None else list(groups)
    if not len(a) == len(b) == len(names):
        raise ValueError(f"x, y and groups must have equal lengths, not {len(a)}, {len(b)} and {len(names)}")
    group = np.array([names.index(name) for name in names])
    partners = (group[:, None] == group) & ~np.eye(len(a), dtype=bool)
    keep = partners.any(1)
    n, pairs = int(keep.sum()), partners.sum(1)[keep]  # number of partners of each run
    if not n:
        return Interval()
    agreeing = (np.where(partners, _order(a) * _order(b), 0.0).sum(1))[keep]
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


def _order(x: _Array) -> _Array:
    """Return the sign of x_i - x_j [n, n], also for infinite values."""
    return (x[:, None] > x).astype(np.float64) - (x[:, None] < x)


def known_values(values: Values) -> _Array:
    """Return the values as an array. Raise ValueError if one is NaN."""
    x = np.asarray(values, np.float64)
    if np.isnan(x).any():
        raise ValueError("the values contain NaN: omit unknown values, or use an infinity for runs that count as worst")
    return x
