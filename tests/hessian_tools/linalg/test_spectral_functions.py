"""Tests of functions of the spectrum against closed forms and dense eigenvalues, and of their coverage."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from draws import seeded
from matrices import laplacian
from real_network import curvature
from torch import Tensor

from hessian_tools.linalg.lanczos import Eigenpairs, certified
from hessian_tools.linalg.spectral_density import DensityEstimate, density
from hessian_tools.linalg.spectral_functions import effective_dimension, log_determinant, negative_share
from hessian_tools.linalg.trace import rademacher
from hessian_tools.operators.base import Dense, scaled
from hessian_tools.results.operator_spectrum import Functional

DAMPED = {"effective dimension": effective_dimension, "log determinant": log_determinant}


def diagonal(*values: float) -> Dense:
    return Dense(torch.diag(torch.tensor(values, dtype=torch.float64)))


def indefinite(n: int = 40) -> Dense:
    m = torch.randn(n, n, dtype=torch.float64, generator=seeded(2))
    return Dense(m + m.T)


def ends(op: Dense, top: int, bottom: int) -> Eigenpairs:
    vectors = torch.linalg.eigh(op.matrix).eigenvectors
    return certified(op, torch.cat([vectors[:, len(vectors) - top :], vectors[:, :bottom]], 1), 1e-4)


def test_functions_of_the_path_laplacian_are_exact_with_all_eigenvalues() -> None:
    op, exact = laplacian()
    whole = density(op, probes=2, generator=seeded(), deflate=ends(op, 400, 0))
    found = log_determinant(whole, 400, 0.0)
    assert found.estimate == pytest.approx(math.log(401), rel=1e-9)
    assert (found.stderr, found.quadrature_error, found.damping) == (0, 0, 0)
    assert effective_dimension(whole, 400, 0.3).estimate == pytest.approx((exact / (exact + 0.3)).sum(), rel=1e-9)
    lifted = Dense(op.matrix + torch.eye(400, dtype=torch.float64))  # A + I, so that z = -1 gives det A again
    whole = density(lifted, probes=2, generator=seeded(), deflate=ends(lifted, 400, 0))
    assert log_determinant(whole, 400, -1.0).estimate == pytest.approx(math.log(401), rel=1e-9)


@pytest.mark.parametrize("name", DAMPED)
def test_functions_of_the_path_laplacian_are_estimated_from_probes(name: str) -> None:
    """The interval holds the closed form; Var = 2 (||F||_F^2 - sum F_ii^2), F = f(A), for one Rademacher probe."""
    op, exact = laplacian()
    vectors = torch.linalg.eigh(op.matrix).eigenvectors.numpy()
    values = np.log(exact + 0.01) if name == "log determinant" else exact / (exact + 0.01)
    matrix = vectors * values @ vectors.T
    found = DAMPED[name](density(op, probes=48, steps=60, generator=seeded(2)), 400, 0.01)
    assert (found.probes, found.damping) == (48, 0.01)
    assert found.ci95[0] <= values.sum() <= found.ci95[1]
    assert found.quadrature_error < 0.3 * found.stderr
    variance = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2))
    assert found.stderr == pytest.approx(math.sqrt(variance / 48), rel=0.3)


@pytest.mark.parametrize("name", [*DAMPED, "negative share"])
def test_all_steps_are_the_probes_quadratic_forms(name: str) -> None:
    """Deflated eigenvalues exactly, plus (P - k) z'f(A)z / z'z for every probe z on their complement."""
    op = indefinite()
    values, vectors = torch.linalg.eigh(op.matrix)
    pairs = ends(op, 3, 2)
    z0 = 1 - 2 * float(values[0])
    found_density = density(op, probes=5, steps=40, generator=seeded(4), deflate=pairs)

    def traces(f: Callable[[Tensor], Tensor]) -> np.ndarray:
        z = rademacher(op, 5, seeded(4))
        weights = (vectors.T @ z)[2:-3].square()
        bulk = (weights * f(values[2:-3])[:, None]).sum(0) / weights.sum(0)
        return (f(pairs.values).sum() + 35 * bulk).numpy()

    if name == "negative share":
        negative, both = traces(lambda x: -x.clamp_max(0)), traces(torch.abs)
        found = negative_share(found_density, 40)
        expected = negative.mean() / both.mean()
        # delta method, written out: var(N / D) = (var N - 2 R cov + R^2 var D) / (n D^2)
        c = np.cov(negative, both)
        variance = (c[0, 0] - 2 * expected * c[0, 1] + expected**2 * c[1, 1]) / (5 * both.mean() ** 2)
        assert math.isnan(found.damping)
    else:
        forms = traces(
            {"effective dimension": lambda x: x / (x + z0), "log determinant": lambda x: (x + z0).log()}[name]
        )
        found = DAMPED[name](found_density, 40, z0)
        expected, variance = forms.mean(), forms.var(ddof=1) / 5
        assert found.damping == z0
    assert found.estimate == pytest.approx(expected, rel=1e-9)
    assert found.stderr == pytest.approx(math.sqrt(variance), rel=1e-7)
    assert all(map(math.isnan, found.ci95))  # five probes give no interval


@pytest.mark.parametrize("name", [*DAMPED, "negative share"])
def test_quadrature_error_is_the_change_from_half_of_the_steps(name: str) -> None:
    op = indefinite(80)
    pairs = ends(op, 2, 1)
    z = 1.05 * -float(pairs.values[-1])

    def found(steps: int) -> Functional:
        probed = density(op, probes=4, steps=steps, generator=seeded(), deflate=pairs)
        return negative_share(probed, 80) if name == "negative share" else DAMPED[name](probed, 80, z)

    assert found(12).quadrature_error == pytest.approx(abs(found(12).estimate - found(6).estimate), rel=1e-9)
    assert 0 < found(24).quadrature_error < found(6).quadrature_error
    assert math.isnan(found(1).quadrature_error)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_operator_scales_its_functions(scale: float) -> None:
    op = indefinite()
    z = -1.2 * float(torch.linalg.eigvalsh(op.matrix)[0])
    one, other = (density(o, probes=24, steps=15, generator=seeded()) for o in (op, scaled(op, scale)))
    for unscaled, rescaled, shift in (
        (effective_dimension(one, 40, z), effective_dimension(other, 40, scale * z), 0.0),
        (log_determinant(one, 40, z), log_determinant(other, 40, scale * z), 40 * math.log(scale)),
        (negative_share(one, 40), negative_share(other, 40), 0.0),
    ):
        assert rescaled.estimate - shift == pytest.approx(unscaled.estimate, rel=1e-8)
        assert rescaled.stderr == pytest.approx(unscaled.stderr, rel=1e-6)
        assert np.subtract(rescaled.ci95, shift) == pytest.approx(unscaled.ci95, rel=1e-6)
        assert rescaled.quadrature_error == pytest.approx(unscaled.quadrature_error, rel=1e-5)


def test_negative_shares_of_known_spectra_are_right() -> None:
    def share(op: Dense) -> Functional:
        return negative_share(density(op, probes=24, generator=seeded(), deflate=ends(op, 2, 1)), op.shape[0])

    assert share(diagonal(-1, -2, 4, 5)).estimate == pytest.approx(3 / 12)
    definite = share(diagonal(1, 2, 4, 5))
    assert (definite.estimate, definite.stderr, definite.ci95) == (0, 0, (0, 0))
    assert share(diagonal(-1, -2, -4, -5)).ci95 == pytest.approx((1, 1))
    zero = share(diagonal(0, 0, 0, 0))
    assert (zero.estimate, zero.stderr, zero.ci95, zero.quadrature_error) == (0, 0, (0, 0), 0)
    wide = negative_share(density(indefinite(), probes=24, steps=3, generator=seeded()), 40)
    assert 0 <= wide.ci95[0] < wide.estimate < wide.ci95[1] <= 1


@pytest.mark.parametrize("f", DAMPED.values())
def test_bad_arguments_are_refused(f: Callable[..., Functional]) -> None:
    found = density(diagonal(-1, 0.5, 2, 3), probes=2, generator=seeded())
    for z, slack in ((0.5, 0.0), (0.999, 0.0), (1.1, 0.2), (math.nan, 0.0), (2.0, math.nan)):
        with pytest.raises(ValueError, match=r"^A \+ zI may not be positive definite: the lowest .* -1, "):
            f(found, 4, z, slack)
    assert math.isfinite(f(found, 4, 1.1, 0.05).estimate)
    # round-off below zero of a positive semidefinite operator
    rounded = density(diagonal(-1e-9, 0.5, 2, 3), probes=2, generator=seeded())
    assert math.isfinite(f(rounded, 4, 1e-6).estimate)
    single = density(diagonal(1, 0.5, 2, 3), probes=1, generator=seeded())
    with pytest.raises(ValueError, match="at least 2 probes, not 1"):
        f(single, 4, 1.0)
    with pytest.raises(ValueError, match="at least 2 probes, not 1"):
        negative_share(single, 4)


@functools.cache
def replicates(name: str, steps: int) -> tuple[Tensor, list[DensityEstimate]]:
    """The eigenvalues of the first 320 weights, and 200 densities of 24 probes, the top 10 and bottom 5 deflated."""
    op = Dense(curvature(name)[:320, :320])
    found = density(op, probes=4800, steps=steps, generator=seeded(7), deflate=ends(op, 10, 5))
    parts = ("nodes", "weights", "coarse_nodes", "coarse_weights", "quadratic", "squared")
    groups = [{part: getattr(found, part)[i : i + 24] for part in parts} for i in range(0, 4800, 24)]
    return torch.linalg.eigvalsh(op.matrix), [dataclasses.replace(found, **group) for group in groups]


@pytest.mark.parametrize("name", [*DAMPED, "negative share"])
def test_intervals_cover_the_exact_values_on_a_real_network(name: str) -> None:
    """200 replicates of 24 probes: the 95% interval holds the true value in at least 92% of them."""
    if name == "negative share":
        values, densities = replicates("hessian", 24)
        exact = float(values.clamp_max(0).sum() / -values.abs().sum())
        found = [negative_share(d, 320) for d in densities]
    else:
        values, densities = replicates("ggn", 16)
        z = 0.01 * float(values[-1])
        exact = float(((values / (values + z)) if name == "effective dimension" else (values + z).log()).sum())
        found = [DAMPED[name](d, 320, z) for d in densities]
    assert 0.92 <= np.mean([f.ci95[0] <= exact <= f.ci95[1] for f in found])
    assert np.sqrt(np.mean([f.stderr**2 for f in found])) == pytest.approx(np.std([f.estimate for f in found]), rel=0.1)
