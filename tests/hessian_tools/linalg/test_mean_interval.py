"""Coverage of the interval of a mean, and its closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from draws import seeded
from scipy import stats
from torch import Tensor

from hessian_tools.linalg.mean_interval import LEAST_VALUES, mean_interval


def normal(n: int) -> Tensor:
    return torch.randn(1000, n, dtype=torch.float64, generator=seeded(n))


@pytest.mark.parametrize("n", [10, 16, 32, 64])
@pytest.mark.parametrize(
    ("kind", "values", "mean", "least"),
    [
        ("normal", normal, 0.0, 0.93),
        ("chi^2", lambda n: normal(n).square(), 1.0, 0.92),
        ("lognormal .5", lambda n: (0.5 * normal(n)).exp(), math.exp(0.125), 0.93),
        ("lognormal 1", lambda n: normal(n).exp(), math.exp(0.5), 0.90),  # Student's t: 83, 85, 88, 91%
        ("negative", lambda n: -normal(n).exp(), -math.exp(0.5), 0.90),
    ],
)
def test_the_interval_covers_skewed_means(
    kind: str, values: Callable[[int], Tensor], mean: float, least: float, n: int
) -> None:
    found = [mean_interval(row) for row in values(n)]
    assert sum(low <= mean <= high for low, high in found) / 1000 >= least, kind


def test_the_default_draws_cover_lognormal_pairs() -> None:
    """The failing case: 32 draws are 16 pairs of skewed losses, of which Student's t covers 84%."""
    rows = torch.randn(4000, 16, dtype=torch.float64, generator=seeded(1)).exp()
    t = stats.t.ppf(0.975, 15) * rows.std(1) / 4
    student = float(((rows.mean(1) - math.exp(0.5)).abs() <= t).double().mean())
    found = [mean_interval(row) for row in rows]
    assert student < 0.87
    assert 0.915 <= sum(low <= math.exp(0.5) <= high for low, high in found) / 4000 <= 0.98


def test_symmetric_values_give_students_interval() -> None:
    values = torch.cat([torch.arange(1, 9), -torch.arange(1, 9)]).double()
    half = float(stats.t.ppf(0.975, 15) * values.std() / 4)
    assert mean_interval(values) == pytest.approx((-half, half))


@pytest.mark.parametrize("scale", [1e-12, -1.0, 1e12])
def test_the_interval_is_equivariant(scale: float) -> None:
    values = normal(16)[0].exp()
    low, high = mean_interval(values)
    assert sorted(mean_interval(scale * values)) == pytest.approx(sorted((scale * low, scale * high)))
    assert mean_interval(values + 3) == pytest.approx((low + 3, high + 3))


def test_few_equal_and_unknown_values() -> None:
    assert all(map(math.isnan, mean_interval(torch.arange(LEAST_VALUES - 1).double())))
    assert mean_interval(torch.full((20,), 2.0, dtype=torch.float64)) == (2, 2)
    for bad in (math.nan, math.inf):
        assert all(map(math.isnan, mean_interval(torch.tensor([1.0] * 19 + [bad], dtype=torch.float64))))
