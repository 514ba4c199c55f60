"""Tests of the two ends of a spectrum."""

import dataclasses

import pytest

from hessian_tools.analysis.operator_spectrum.eigenvalues import two_ends
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.results.operator_spectrum import Eigenvalue


def pair(value: float) -> Eigenvalue:
    return Eigenvalue(value, 0.0, 0.0, True, {})


@pytest.mark.parametrize(
    ("values", "top", "changes", "upper", "lower"),
    [
        ([3, 2, 1, -5, -4], 3, {}, [3, 2, 1], [-5, -4]),
        ([2, 3, 1], 3, {}, [3, 2, 1], []),
        ([-5, 3, -2], 3, {"magnitude": 3}, [3], [-5, -2]),
        ([-5, 3, -2], 3, {"method": "power", "top": 3}, [3], [-5, -2]),
        ([-5, -3], 2, {"magnitude": 2}, [-3, -5], []),
        ([3, 0], 2, {"magnitude": 2}, [3, 0], []),
        ([-1, -2, -6], 2, {}, [-1, -2], [-6]),
    ],
)
def test_the_two_ends_of_an_operator_are_the_outermost_eigenvalues(
    values: list[float], top: int, changes: dict[str, object], upper: list[float], lower: list[float]
):
    found = [pair(v) for v in values]
    settings = dataclasses.replace(SpectrumSettings(), **changes)  # type: ignore[arg-type]
    high, low = two_ends(found, top, settings)
    assert [found[i].value for i in high] == upper
    assert [found[i].value for i in low] == lower
