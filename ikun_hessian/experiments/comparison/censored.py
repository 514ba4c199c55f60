"""Paired comparison of times to an event when some runs end before the event (right-censored pairs).

The model is that of accelerated failure times with one stratum per pair: under the hypothesis of a ratio r, the times
T_a and r T_b of a pair are exchangeable. Both are observed within the window min(C_a, r C_b), where C is the horizon of
a run. Truncated to that window they are still exchangeable, so Wilcoxon's signed-rank test of log min(T_a, window) -
log min(r T_b, window) is exact, for any share of censored times. A pair that is censored on both sides counts as a
zero. The p-value of a ratio of 1, the test of equivalence, the estimate and the confidence interval are all of this
test. Without censoring it is the signed-rank test of the logarithms of the ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from ikun_hessian.experiments.comparison.statistics import (
    INF,
    LEAST,
    LEVEL,
    NAN,
    Interval,
    paired_shift,
    signed_rank,
    signed_rank_tails,
)

MOST = 20_000  # most candidates for an end of an interval
COARSE = 50  # number of candidates that are tried before the bisection
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CensoredPairs:
    """Times of pairs of runs, as logarithms.

    Attributes:
        first: Log time of the event of the first run, or of its censoring [n].
        first_horizon: Log of the time up to which the first run was observed, or would have been [n].
        second: The same for the second run [n].
        second_horizon: The same for the second run [n].
        censored: Whether a time is that of a censoring, for any run of the pair [n].
    """

    first: _Array
    first_horizon: _Array
    second: _Array
    second_horizon: _Array
    censored: npt.NDArray[np.bool_]

    def differences(self, shift: float) -> _Array:
        """Return log min(T_a, window) - log min(r T_b, window) [n] for log r = `shift`, without rounding errors."""
        window = np.minimum(self.first_horizon, self.second_horizon + shift)
        d = np.minimum(self.first, window) - np.minimum(self.second + shift, window)
        rounded: _Array = np.rint(d / 1e-12) * 1e-12
        return rounded

    def p(self, ratio: float = 1.0, alternative: str = "two-sided") -> float:
        """Compute the exact p-value of the hypothesis that the ratio of the times is `ratio`."""
        return signed_rank(self.differences(math.log(ratio)), alternative)

    def equivalence(self, margin: float) -> float:
        """Compute the p-value of the two one-sided tests for a ratio between 1 / margin and margin."""
        return max(self.p(1 / margin, "greater"), self.p(margin, "less")) if len(self.first) else NAN

    def ratio(self) -> Interval:
        """Estimate the ratio of the first to the second time, with the interval of the ratios that are not rejected.

        An end that censoring leaves open is 0 or infinite. If both ends are open, there is no interval.

        Returns:
            The estimate (Hodges & Lehmann 1963) with its interval; n is the number of pairs.
        """
        n = len(self.first)
        if not self.censored.any():
            found = paired_shift(self.differences(0.0))
            return replace(found, value=_exp(found.value), low=_exp(found.low), high=_exp(found.high))
        shifts = self._candidates()
        # Between two candidates the statistic is nearly constant: its value is that of the middle.
        middles = [shifts[0] - 1, *(shifts[1:] + shifts[:-1]) / 2, shifts[-1] + 1]
        ends = [-INF, *shifts.tolist(), INF]  # those of the region around each middle

        count = len(middles)

        @cache
        def tails(k: int) -> tuple[float, float]:
            return signed_rank_tails(self.differences(float(middles[k])))

        low = _edge(count, lambda k: tails(k)[0] < tails(k)[1])  # first region that is not too small
        high = count - 1 - _edge(count, lambda k: tails(count - 1 - k)[0] > tails(count - 1 - k)[1])
        below, above = ends[low], ends[high + 1]
        value = (below + above) / 2 if math.isfinite(below) and math.isfinite(above) else below + above
        if n < LEAST:
            return Interval(_exp(value), n=n)
        level = min(LEVEL, 1 - 2 * 0.5**n)
        tail = (1 - level) / 2 + 1e-12
        first = _edge(count, lambda k: tails(k)[0] <= tail)
        last = count - 1 - _edge(count, lambda k: tails(count - 1 - k)[1] <= tail)
        below, above = ends[first], ends[last + 1]
        if math.isinf(below) and math.isinf(above):
            return Interval(_exp(value), n=n)
        return Interval(_exp(value), _exp(below), _exp(above), n, level)

    def _candidates(self) -> _Array:
        """Return the shifts at which the order of the differences can change, and both ends of a grid of 2%."""
        known = [x - y for x in (self.first, self.first_horizon) for y in (self.second, self.second_horizon)]
        d = np.unique(np.concatenate(known))
        walsh = np.add.outer(d, d).ravel() / 2
        grid = np.arange(d.min(), d.max() + 0.02, 0.02)
        found: _Array = np.unique(np.rint(np.concatenate([walsh, grid]) / 1e-9) * 1e-9)
        return found if len(found) <= MOST else np.unique(np.concatenate([d, grid]))


def censored_pairs(
    first: Sequence[tuple[float, bool, float]], second: Sequence[tuple[float, bool, float]]
) -> CensoredPairs:
    """Collect pairs of times.

    Args:
        first: For each pair, (time, whether the event was observed, horizon) of the first run. The horizon is the time
            up to which the run was or would have been observed; it is at least the time.
        second: The same for the second run.

    Returns:
        The pairs.

    Raises:
        ValueError: If a time is not positive, or an event lies after its horizon.
    """
    table = np.array([(*a, *b) for a, b in zip(first, second, strict=True)], np.float64).reshape(-1, 6)
    a, seen, ca, b, seen_too, cb = table.T
    if not ((a > 0) & (b > 0) & (a <= ca) & (b <= cb)).all():
        raise ValueError("times must be positive and at most the horizon of their run")
    a, b = np.where(seen > 0, a, ca), np.where(seen_too > 0, b, cb)
    return CensoredPairs(np.log(a), np.log(ca), np.log(b), np.log(cb), ~((seen > 0) & (seen_too > 0)))


def _edge(count: int, rejected: Callable[[int], bool]) -> int:
    """Return the first index that is not rejected, given that the rejected ones come first.

    A coarse grid is searched before the bisection, because the test is monotone only approximately.
    """
    coarse = sorted({*range(0, count, max(1, count // COARSE)), count - 1})
    right = next((k for k in coarse if not rejected(k)), count)
    left = max((k for k in coarse if k < right), default=-1)
    while right - left > 1:
        middle = (left + right) // 2
        left, right = (middle, right) if rejected(middle) else (left, middle)
    return min(right, count - 1)


def _exp(x: float) -> float:
    """Return exp(x), or infinity if it would overflow. NaN stays NaN."""
    return INF if x > 700 else math.exp(x)
