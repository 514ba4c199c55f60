"""Lanczos and power iteration against closed forms and dense eigendecompositions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessian_tools.lanczos import Eigenpairs, eigenpairs, quadrature, tridiagonal
from hessian_tools.operators import Composed, Dense, Operator, scaled
from hessian_tools.power import power_iteration


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laplacian(n: int = 400) -> tuple[Dense, np.ndarray]:
    """The path Laplacian with fixed ends: eigenvalues 2 - 2 cos(k pi / (n + 1)), ascending."""
    side = -torch.ones(n - 1, dtype=torch.float64)
    matrix = 2 * torch.eye(n, dtype=torch.float64) + torch.diag(side, 1) + torch.diag(side, -1)
    return Dense(matrix), 2 - 2 * np.cos(np.arange(1, n + 1) * np.pi / (n + 1))


def with_eigenvalues(values: Tensor, seed: int = 0) -> tuple[Dense, Tensor]:
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=seeded(seed)))[0]
    matrix = q @ torch.diag(values.double()) @ q.T
    return Dense((matrix + matrix.T) / 2), values.double().sort().values


def check(op: Operator, pairs: Eigenpairs, exact: Tensor, top: int, bottom: int) -> None:
    """Values, order, orthonormality, and residuals that are what they claim to be."""
    scale = float(exact.abs().max())
    expected = torch.cat([exact.flip(0)[:top], exact[:bottom]])
    assert (pairs.values - expected).abs().max() <= 1e-8 * scale
    images = op @ pairs.vectors
    residuals = (images - pairs.vectors * pairs.values.to(images)).norm(dim=0)
    assert (residuals - pairs.residuals).abs().max() <= 1e-12 * scale
    assert residuals.max() <= 1e-8 * scale
    gram = pairs.vectors.T @ pairs.vectors
    assert (gram - torch.eye(top + bottom)).abs().max() <= 1e-12
    assert pairs.converged.all()


@pytest.mark.parametrize("max_basis", [None, 60])
def test_path_laplacian(max_basis: int | None) -> None:
    op, exact = laplacian()
    pairs = eigenpairs(op, 10, 5, generator=seeded(), tol=1e-8, max_basis=max_basis, max_products=5000)
    check(op, pairs, torch.from_numpy(exact), 10, 5)


@given(st.integers(2, 40), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_random_matrices(n: int, seed: int) -> None:
    m = torch.randn(n, n, dtype=torch.float64, generator=seeded(seed))
    op = Dense(m + m.T)
    top = min(3, n - 1)
    check(op, eigenpairs(op, top, 1, generator=seeded(seed), tol=1e-9), torch.linalg.eigvalsh(m + m.T), top, 1)


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([3.0] * 9 + [-1.0] * 3 + [0.0] * 38),  # multiple
        torch.cat([torch.arange(1.0, 21), -torch.arange(1.0, 21)]),  # +-lambda pairs
        torch.cat([torch.zeros(195), torch.tensor([1.0, 2, 3, 4, 100])]),  # rank deficient
        0.1
        + (torch.arange(100.0) / 99)
        * 99.9
        * 0.9 ** (99 - torch.arange(100.0)),  # Strakos: ghosts if not reorthogonalized
    ],
    ids=["multiple", "pairs", "low rank", "strakos"],
)
def test_hard_spectra(values: Tensor) -> None:
    op, exact = with_eigenvalues(values)
    check(op, eigenpairs(op, 5, 3, generator=seeded(), tol=1e-9), exact, 5, 3)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_equivariance(scale: float) -> None:
    op, _ = laplacian(60)
    one = eigenpairs(op, 4, 2, generator=seeded())
    other = eigenpairs(scaled(op, scale), 4, 2, generator=seeded())
    torch.testing.assert_close(other.values / scale, one.values, rtol=1e-10, atol=1e-12)
    assert torch.equal(other.converged, one.converged)
    assert other.products == one.products


def test_same_seed_same_arrays_other_seed_same_values() -> None:
    op, _ = laplacian(80)
    a, b, c = (eigenpairs(op, 4, 2, generator=seeded(s), tol=1e-10) for s in (0, 0, 1))
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.vectors, b.vectors)
    assert not torch.equal(a.vectors, c.vectors)
    torch.testing.assert_close(a.values, c.values)


def test_float32_products_reach_float32_accuracy() -> None:
    op, exact = laplacian(200)
    single = Composed(200, torch.float32, op.device, lambda v: op.matrix.float() @ v)
    pairs = eigenpairs(single, 3, 0, generator=seeded(), tol=1e-4)
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values, exact[::-1][:3], rtol=1e-5)


def test_not_converged_is_said() -> None:
    op, exact = laplacian()
    pairs = eigenpairs(op, 10, 5, generator=seeded(), tol=1e-10, max_products=30)
    assert not pairs.converged.any()
    assert pairs.products <= 30 + 15
    for value, residual in zip(pairs.values, pairs.residuals, strict=True):  # an eigenvalue lies within the residual
        assert np.abs(exact - float(value)).min() <= float(residual) * (1 + 1e-9)


def test_zero_operator_and_size_one() -> None:
    pairs = eigenpairs(Dense(torch.zeros(20, 20, dtype=torch.float64)), 3, 2, generator=seeded())
    assert pairs.values.tolist() == [0.0] * 5
    assert pairs.converged.all()
    assert eigenpairs(Dense(torch.tensor([[7.0]])), 1, generator=seeded()).values.item() == pytest.approx(7)


def test_bad_input() -> None:
    op, _ = laplacian(5)
    with pytest.raises(ValueError, match="cannot find 4 largest and 2 smallest of 5"):
        eigenpairs(op, 4, 2, generator=seeded())
    with pytest.raises(ValueError, match="cannot find"):
        eigenpairs(op, 0, 0, generator=seeded())
    broken = Composed(5, torch.float64, op.device, lambda v: v * math.nan)
    with pytest.raises(FloatingPointError):
        eigenpairs(broken, 1, generator=seeded())
    with pytest.raises(FloatingPointError):
        power_iteration(broken, 1, generator=seeded())
    with pytest.raises(ValueError, match="cannot find 9 of 5"):
        power_iteration(op, 9, generator=seeded())


@given(st.integers(3, 30), st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_gauss_quadrature_is_exact_to_degree_2m_minus_1(n: int, m: int, seed: int) -> None:
    values = torch.randn(n, dtype=torch.float64, generator=seeded(seed))
    op, _ = with_eigenvalues(values, seed)
    v = torch.randn(n, dtype=torch.float64, generator=seeded(seed + 1))
    nodes, weights = quadrature(*tridiagonal(op, v, m))
    v = v / v.norm()
    power = v.clone()
    for k in range(2 * m):
        assert float((weights * nodes**k).sum()) == pytest.approx(float(v @ power), abs=1e-10 * max(1.0, 4.0**k))
        power = op @ power


def test_tridiagonal_on_a_complement() -> None:
    op, exact = with_eigenvalues(torch.tensor([50.0, -40.0, *torch.linspace(-1, 1, 30).tolist()]))
    pairs = eigenpairs(op, 1, 1, generator=seeded(), tol=1e-12)
    alpha, beta = tridiagonal(op, torch.randn(32, dtype=torch.float64, generator=seeded(3)), 60, pairs.vectors)
    nodes, _ = quadrature(alpha, beta)
    np.testing.assert_allclose(nodes, exact[1:-1], atol=1e-8)


def test_power_iteration_by_magnitude_with_signs() -> None:
    op, _ = with_eigenvalues(torch.tensor([-10.0, 7.0, 4.0, -2.0, 1.0, 0.5, 0.1]))
    pairs = power_iteration(op, 4, generator=seeded(), tol=1e-9, max_iterations=500)
    np.testing.assert_allclose(pairs.values, [-10, 7, 4, -2], rtol=1e-9)
    assert pairs.converged.all()
    assert pairs.residuals.max() <= 1e-8


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_power_iteration_is_scale_equivariant(scale: float) -> None:
    op, _ = with_eigenvalues(torch.tensor([-10.0, 7.0, 4.0, -2.0, 1.0]))
    one = power_iteration(op, 2, generator=seeded())
    other = power_iteration(scaled(op, scale), 2, generator=seeded())
    torch.testing.assert_close(other.values / scale, one.values)
    assert other.products == one.products
    assert torch.equal(other.converged, one.converged)


def test_power_iteration_admits_what_it_cannot_do() -> None:
    op, _ = with_eigenvalues(torch.tensor([5.0, -5.0, 1.0, 0.1]))
    pairs = power_iteration(op, 1, generator=seeded(), max_iterations=300)
    assert not pairs.converged[0]
    assert pairs.residuals[0] > 0.1
