"""Tests of how an analysis divides its memory."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hessian_tools.analysis.planning.memory import budget
from hessian_tools.linalg.lanczos import least_basis


@given(
    st.floats(1e4, 1e12),
    st.integers(1, 10**8),
    st.integers(1, 60),
    st.integers(0, 100),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0, 1e12),
)
def test_the_budget_is_kept(
    memory: float, size: int, wanted: int, steps: int, dtype: torch.dtype, in_use: float
) -> None:
    least, work = max(least_basis(wanted), steps), 8 * size * (wanted + 4)
    left = memory - min(in_use, memory / 4)
    try:
        found = budget(memory, size, wanted, steps, dtype, in_use)
    except ValueError:
        assert dtype.itemsize * size * (least + 1) + work > 0.89 * left
        return
    assert found.vectors >= least
    assert found.kept >= 0
    assert found.basis_dtype.itemsize * size * found.vectors + work + found.kept <= left * (1 + 1e-9)
    assert dtype == torch.float32 or found.basis_dtype == torch.float64


def test_a_small_network_gets_a_long_basis_in_float64() -> None:
    found = budget(4 * 2**30, 6056, 15, 60, torch.float32)
    assert (found.vectors, found.basis_dtype) == (400, torch.float64)


def test_a_basis_that_does_not_fit_in_float64_takes_the_dtype_of_the_operator() -> None:
    narrow, wide = (budget(8 * 2**30, 11_000_000, 15, 60, dtype) for dtype in (torch.float32, torch.float64))
    assert (narrow.basis_dtype, wide.basis_dtype) == (torch.float32, torch.float64)
    assert (narrow.vectors, wide.vectors) == (60, 60)
    assert narrow.kept - wide.kept == 4 * 11_000_000 * 60
