"""A 95% confidence interval for the mean of few random values, which may be skewed or take only a few values.

Student's t interval covers less than it says for skewed values: for instance 85% for 16 lognormal values with sigma 1.
Hall (1992, "On the removal of skewness by transformation", JRSS B 54) transforms the t statistic by a monotone cubic
polynomial that removes its skewness. The interval here spans both intervals, so it is never narrower than Student's.

Its coverage was measured with 4000 samples of 10 to 64 values: 95 to 97% for normal values, 93 to 97% for values with
the distribution of chi^2 (1 degree of freedom), 91 to 95% for lognormal values with sigma 1, and 87 to 92% with sigma
1.5. For quadratic forms of random signs z^T A z, the values themselves do not show their spread: with four equally
coupled coordinates, 10 values cover 82% and 16 values 88%. There the standard deviation is known from the matrix (see
`hessian_tools.linalg.trace`). With it as `least_spread`, 10 and more values cover 94 to 99% for 17 matrices, among them
blocks of 2 to 16 equal couplings, stars and rank-one matrices; without it, that takes 24 values.
"""

from __future__ import annotations

import math

from scipy import special
from torch import Tensor

# Fewest values for an interval. A quadratic form of random signs can take one value with probability 3/4 (three
# coordinates coupled equally). Fewer than 10 values are then too often all equal, and the interval is too often empty.
LEAST_VALUES = 10


def mean_interval(values: Tensor, least_spread: float = 0.0) -> tuple[float, float]:
    """Compute the 95% confidence interval of the mean of independent values.

    Args:
        values: Values [n].
        least_spread: Another estimate of the standard deviation of a value. The larger one is used.

    Returns:
        Lower and upper end. Both are NaN if n is below LEAST_VALUES, because no interval from so few values covers.
    """
    n = len(values)
    if n < LEAST_VALUES:
        return math.nan, math.nan
    mean, spread = float(values.mean()), float(values.std())
    spread = spread if math.isnan(spread) else max(spread, least_spread)
    if not spread > 0:
        return (mean, mean) if spread == 0 else (math.nan, math.nan)
    quantile = float(special.stdtrit(n - 1, 0.975)) / math.sqrt(n)
    skewness = n**2 / ((n - 1) * (n - 2)) * float(((values - mean) / spread).pow(3).mean())

    def student(bound: float) -> float:
        """Return (mean - mu) / spread at which the transformed statistic equals `bound`."""
        a, y = skewness / 3, bound - skewness / (6 * n)
        return (math.cbrt(1 + 3 * a * y) - 1) / a if abs(a) > 1e-6 else y

    low = mean - spread * max(quantile, student(quantile))
    high = mean - spread * min(-quantile, student(-quantile))
    return low, high
