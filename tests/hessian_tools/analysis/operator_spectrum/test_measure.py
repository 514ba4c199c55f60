"""Tests of the spectrum of one operator: compared to dense matrices."""

import numpy as np
import pytest
import torch
from torch import nn

from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import ggn, hessian


def test_the_record_agrees_with_dense_matrices() -> None:
    """A smooth network in float64, small enough to know everything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,))
    objective = make_objective(model, nn.functional.cross_entropy, data)
    settings = SpectrumSettings(top=6, smallest=4, tol=1e-9, damping=0.05, probes=60, steps=60, vectors=True, seed=3)
    result = spectrum(objective, settings)
    _, gradient = objective.value_and_gradient()
    for name, factory in (("hessian", hessian), ("ggn", ggn)):
        values, vectors = np.linalg.eigh(dense(factory(objective)).numpy())
        s = result.spectra[name]
        found = [*s.eigenvalues, *s.smallest_eigenvalues]
        expected = [*values[::-1][:6], *values[: len(s.smallest_eigenvalues)]]
        assert [e.value for e in found] == pytest.approx(expected, abs=1e-10)
        assert all(abs(e.value - x) <= e.bound + 1e-13 for e, x in zip(found, expected, strict=True))
        cosines = (vectors.T @ (gradient / gradient.norm()).numpy()) ** 2
        assert s.eigenvalues[0].gradient == pytest.approx(cosines[-1], abs=1e-9)
        assert s.gradient_share == pytest.approx(cosines[-6:].sum(), abs=1e-9)
        assert s.eigenvalues[0].participation == pytest.approx(
            1 / (len(values) * (vectors[:, -1] ** 4).sum()), rel=1e-8
        )
        assert s.search is not None
        assert s.search.largest == pytest.approx(values[-7], abs=1e-6)
        assert s.search.smallest == pytest.approx(values[len(s.smallest_eigenvalues)], abs=1e-6)
        assert s.vectors is not None
        assert abs(s.vectors[:, 0] @ vectors[:, -1]) == pytest.approx(1, abs=1e-9)
        assert s.frobenius_norm == pytest.approx(np.linalg.norm(values), rel=0.05)
    h, g = result.spectra["hessian"], result.spectra["ggn"]
    exact = np.linalg.eigvalsh(dense(ggn(objective)).numpy()).clip(0)
    assert g.effective_dimension is not None
    assert g.log_determinant is not None
    assert g.effective_dimension.estimate == pytest.approx((exact / (exact + 0.05)).sum(), rel=0.05)
    assert g.log_determinant.estimate == pytest.approx(np.log(exact + 0.05).sum(), rel=0.05)
    values = np.linalg.eigvalsh(dense(hessian(objective)).numpy())
    assert h.negative_share is not None
    assert h.negative_share.estimate == pytest.approx(np.abs(values[values < 0]).sum() / np.abs(values).sum(), rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"top": 0},
        {"smallest": -1},
        {"probes": 0},
        {"trace_probes": 1},
        {"accuracy": 0.0},
        {"accuracy": 1.0},
        {"damping": 0.0},
        {"damping": float("inf")},
        {"resamples": 0},
        {"magnitude": 3, "method": "power"},
        {"operators": ()},
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        SpectrumSettings(**changes)  # type: ignore[arg-type]
