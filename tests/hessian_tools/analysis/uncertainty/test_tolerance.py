"""A tolerance follows from the error over the data, and what is computed for it is used again."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives import spiking_objective

from hessian_tools.analysis.settings import TOL, SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.analysis.uncertainty.sampling_error import sample_groups
from hessian_tools.analysis.uncertainty.tolerance import GroupForms, tolerance
from hessian_tools.linalg.lanczos import LOOSE
from hessian_tools.objective import Objective
from hessian_tools.operators.curvature import OPERATORS


@given(st.floats(0, 1e6), st.floats(1e-6, 1e6), st.floats(1e-8, 1e-2))
def test_a_tolerance_is_a_tenth_of_the_error_between_its_limits(error: float, norm: float, tightest: float) -> None:
    found = tolerance(error, norm, tightest)
    assert tightest <= found <= LOOSE
    if tightest < found < LOOSE:
        assert found * norm == pytest.approx(error / 10)


@pytest.mark.parametrize(("error", "norm"), [(math.nan, 1.0), (1.0, 0.0), (1.0, math.nan)])
def test_an_unknown_error_asks_for_the_smallest_tolerance(error: float, norm: float) -> None:
    assert tolerance(error, norm, 1e-4) == 1e-4


def objective(samples: int = 90) -> Objective:
    return spiking_objective(samples=samples, loss="ce", batch_size=30, input_shape=(1, 4, 5), hidden=(20, 10))


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_the_forms_of_a_search_are_those_of_the_groups_and_not_computed_again(name: str) -> None:
    o = objective()
    parts = sample_groups(o, torch.Generator().manual_seed(0))
    op = OPERATORS[name](o, 1e9)
    v = torch.linalg.qr(torch.randn(o.size, 3, dtype=torch.float64))[0]
    other = torch.randn(o.size, 2, dtype=torch.float64)
    fresh = OPERATORS[name](o.regrouped(parts), 0)
    (expected, rest), counts = fresh.batch_forms(v, other)
    groups = OPERATORS[name](o.regrouped(parts), 0)
    forms = GroupForms(op, groups, parts)
    _, images = forms.enough(TOL, v, torch.ones(3))
    if images is not None:
        torch.testing.assert_close(images, (op @ v).double(), rtol=1e-5, atol=1e-8)
    assert (images is None) == (name == "ggn")
    made = groups.products
    (found, others), numbers = forms(v, other)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(others, rest, rtol=1e-5, atol=1e-8)
    assert torch.equal(numbers, counts)
    assert groups.products - made == 5  # as many as without a search, after an interruption
    again = GroupForms(op, OPERATORS[name](o.regrouped(parts), 0), parts)(v, other)[0]
    assert all(torch.equal(a, b) for a, b in zip((found, others), again, strict=True))


def test_a_search_stops_at_the_error_over_the_data_unless_a_tolerance_is_given() -> None:
    o = objective(300)
    settings = SpectrumSettings(top=4, smallest=2, density=False, draws=0, trace_probes=4)
    free = spectrum(o, settings)
    tight = spectrum(o, dataclasses.replace(settings, tol=TOL))
    assert free.spectra["hessian"].hessian_vector_products < tight.spectra["hessian"].hessian_vector_products
    for name in ("hessian", "ggn"):
        loose, exact = free.spectra[name], tight.spectra[name]
        assert loose.hessian_vector_products <= exact.hessian_vector_products + 4 * (name == "ggn")  # those of `enough`
        norm = exact.eigenvalues[0].value
        for a, b in zip(loose.eigenvalues, exact.eigenvalues, strict=True):
            error = b.data_stderr if math.isfinite(b.data_stderr) else b.data_stderr_least
            assert a.converged
            assert b.converged
            assert abs(a.value - b.value) <= max(0.1 * error, TOL * norm)
            assert a.residual <= min(LOOSE, max(TOL, 0.11 * error / norm)) * norm
            other = a.data_stderr if math.isfinite(a.data_stderr) else a.data_stderr_least
            assert other == pytest.approx(error, rel=0.3)
