"""Number of pairs that a study needs for its comparisons to reach a given power."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ikun_hessian.experiments.comparison.statistics import LEAST, LEVEL, NAN, Values, known_values, least_pairs

POWER = 0.8
EFFICIENCY = 3 / math.pi  # of the signed-rank test relative to the t test, for normal differences
MOST_PAIRS = 100_000  # the search stops here
SURE = 50.0  # SciPy fails for larger noncentralities; the power is already 1 at this one


@dataclass(frozen=True)
class SampleSize:
    """Number of pairs that a study needs for a power of 0.8. NaN if it is undefined or above 100,000.

    Attributes:
        effect: Pairs needed for the observed effect to become significant.
        equivalence: Pairs needed to show equivalence within the bound if the true shift is 0.
    """

    effect: float = NAN
    equivalence: float = NAN


def sample_size(differences: Values, bound: float = NAN, comparisons: int = 1) -> SampleSize:
    """Estimate the number of pairs needed, from the observed mean and spread of the differences.

    The power is that of the paired t test, corrected by the efficiency of the signed-rank test, 3/pi. The result is at
    least `least_pairs`. The mean and the spread are themselves uncertain if n is small. The signed-rank test drops
    differences of 0, so for the effect the pairs are planned from the others and then increased by the share of zeros.

    For times to an event with censored runs, pass the differences of the test (`CensoredPairs.differences` at 0), and
    no bound: censoring changes the differences at the bounds in a way that these do not determine.

    Args:
        differences: Differences [n]. Infinite ones are ignored.
        bound: Largest shift that counts as equivalent. NaN: do not plan for equivalence.
        comparisons: Number of comparisons in the Holm family. The plan uses the smallest level, 0.05 / comparisons.

    Returns:
        The number of pairs for the effect and for equivalence.

    Raises:
        ValueError: If a difference is NaN.
    """
    d = known_values(differences)
    d = d[np.isfinite(d)]
    spread = float(d.std(ddof=1)) if len(d) > 1 else 0.0
    if not spread > 0:
        return SampleSize()
    alpha, kept = (1 - LEVEL) / comparisons, d[d != 0]
    scatter = float(kept.std(ddof=1)) if len(kept) > 1 else 0.0
    shift = abs(float(kept.mean())) / scatter if scatter > 0 else 0.0

    def shown(n: int) -> float:
        return float(stats.nct.sf(stats.t.isf(alpha / 2, n - 1), n - 1, min(shift * math.sqrt(n), SURE)))

    def bounded(n: int) -> float:
        return (
            2 * float(stats.nct.sf(stats.t.isf(1 - LEVEL, n - 1), n - 1, min(bound / spread * math.sqrt(n), SURE))) - 1
        )

    effect = _least(shown, least_pairs(alpha)) * len(d) / len(kept) if shift > 0 else NAN
    return SampleSize(
        float(math.ceil(effect)) if effect <= MOST_PAIRS else NAN,
        NAN if math.isnan(bound) else _least(bounded, LEAST),
    )


def _least(power: Callable[[int], float], least: int) -> float:
    """Return the least number of pairs with a power of 0.8 for the signed-rank test; `power` increases with n."""
    low, high = 1, 2  # power(low) < 0.8 <= power(high)
    while not power(high) >= POWER:
        low, high = high, 2 * high
        if high > MOST_PAIRS:
            return NAN
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return float(max(math.ceil(high / EFFICIENCY), least))
