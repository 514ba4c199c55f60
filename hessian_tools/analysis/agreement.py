"""Agreement of predicted curvatures with measured ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from hessian_tools.results.calibration import Agreement

RESAMPLES = 1000  # bootstrap samples for the confidence interval of a correlation


def agreement(predicted: Any, truth: Any, seed: int = 0, resamples: int = RESAMPLES) -> Agreement:
    """Compare predicted curvatures with measured ones.

    Args:
        predicted: Predicted curvatures [K].
        truth: Measured curvatures [K] of the same directions.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap samples for the confidence interval of the correlation. With 0 the interval is
            NaN.

    Returns:
        Rank correlation, median ratio and slope (see `Agreement`).
    """
    both = (predicted > 0) & (truth > 0)
    nan = float("nan")
    ratios = np.log(truth[both] / predicted[both]) if both.any() else np.array([nan])
    low, middle, high = np.exp(np.percentile(ratios, [25, 50, 75]))
    within = float(((ratios > math.log(0.7)) & (ratios < math.log(1.4))).sum() / len(truth))
    slope = nan
    if both.sum() > 2:
        slope = float(stats.theilslopes(np.log(truth[both]), np.log(predicted[both]))[0])
    correlation, low_end, high_end = float(_spearman(predicted, truth)), nan, nan
    if resamples and not math.isnan(correlation):
        chosen = np.random.default_rng(seed).integers(0, len(truth), (resamples, len(truth)))
        half = 1.96 * np.nanstd(_fisher(_spearman(predicted[chosen], truth[chosen])))
        low_end, high_end = (float(np.tanh(_fisher(correlation) + side * half)) for side in (-1, 1))
    return Agreement(
        correlation,
        (low_end, high_end),
        float(middle),
        (float(low), float(high)),
        within,
        slope,
    )


def correlation_within_kinds(predicted: Any, truth: Any, kinds: Sequence[str]) -> float:
    """Return the rank correlation that is left after the differences between kinds of directions are removed.

    Args:
        predicted: Predicted curvatures [K].
        truth: Measured curvatures [K] of the same directions.
        kinds: Kind of every direction [K].

    Returns:
        The correlation of the ranks, from which the mean rank of their kind is subtracted. NaN if nothing varies.
    """
    ranks = np.stack([stats.rankdata(predicted), stats.rankdata(truth)])
    for kind in set(kinds):
        own = np.array(kinds) == kind
        ranks[:, own] -= ranks[:, own].mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return float((ranks[0] * ranks[1]).sum() / np.sqrt(np.square(ranks).sum(1).prod()))


def _spearman(a: Any, b: Any) -> Any:
    """Spearman correlation over the last axis; NaN if one of the two is constant."""
    a, b = (ranks - ranks.mean(-1, keepdims=True) for ranks in (stats.rankdata(x, axis=-1) for x in (a, b)))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def _fisher(correlation: Any) -> Any:
    """Fisher's z transform."""
    return np.arctanh(np.clip(correlation, -1 + 1e-6, 1 - 1e-6))
