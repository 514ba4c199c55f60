"""Tests of a Lanczos basis in float32: against float64, closed forms and dense eigendecompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from draws import seeded
from scipy import stats
from torch import Tensor

from hessian_tools.linalg.basis import combined, orthogonalize, rotate
from hessian_tools.linalg.lanczos import Eigenpairs, eigenpairs
from hessian_tools.linalg.lanczos_quadrature import quadrature, tridiagonal
from hessian_tools.linalg.spectral_density import density
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import Composed, Operator
from hessian_tools.operators.curvature import hessian
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

ROUNDING = 6e-8  # of a number in float32, relative


def orthonormal(size: int, count: int, seed: int = 0) -> Tensor:
    draws = torch.randn(size, count, dtype=torch.float64, generator=seeded(seed))
    return torch.linalg.qr(draws).Q


def diagonal(values: Tensor, dtype: torch.dtype) -> Composed:
    column = values.to(dtype)[:, None]
    return Composed(len(values), dtype, values.device, lambda block: column * block)


def found(op: Operator, basis_dtype: torch.dtype, **options: int) -> Eigenpairs:
    return eigenpairs(op, generator=seeded(3), tol=1e-5, basis_dtype=basis_dtype, **options)


@pytest.mark.parametrize("columns", [(), (3,)])
def test_the_projection_is_that_of_numpy(columns: tuple[int, ...]) -> None:
    basis = orthonormal(70_001, 7).float()  # more than two pieces, the last of them short
    v = torch.randn(70_001, *columns, dtype=torch.float64, generator=seeded(1))
    w, coefficients = orthogonalize(v, basis)
    wide = basis.double().numpy()
    expected = np.linalg.lstsq(wide, v.numpy(), rcond=None)[0]
    assert np.abs(coefficients.numpy() - expected).max() < 1e-11
    assert np.abs(w.numpy() - (v.numpy() - wide @ expected)).max() < 1e-11
    assert np.abs(wide.T @ w.numpy()).max() < 1e-13 * float(v.norm())


def test_vectors_in_float32_stay_orthonormal_to_more_digits_than_they_have() -> None:
    rounded = orthonormal(200_000, 5).float().double()
    assert float((rounded.T @ rounded - torch.eye(5)).abs().max()) < 10 * ROUNDING / 200_000**0.5


def test_combinations_are_orthonormal_in_float64() -> None:
    rows = orthonormal(40_000, 6).T.contiguous()
    y = orthonormal(6, 3, seed=1)
    got = combined(rows.float(), y)
    assert float((got.T @ got - torch.eye(3)).abs().max()) < 1e-14
    assert float((got - rows.T @ y).norm(dim=0).max()) < 2 * ROUNDING
    assert torch.equal(combined(rows, y), (y.T @ rows).T)


def test_a_rotation_of_rows_is_the_product() -> None:
    rows = orthonormal(5_000, 6).T.contiguous()
    y, narrow = orthonormal(6, 2, seed=1), rows.float()
    rotate(narrow, y)
    assert float((narrow[:2].double() - y.T @ rows).norm(dim=1).max()) < 2 * ROUNDING
    assert torch.equal(narrow[2:], rows[2:].float())


@pytest.mark.parametrize("max_basis", [400, 24])  # without and with restarts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenpairs_of_a_known_spectrum_are_those_of_a_basis_in_float64(dtype: torch.dtype, max_basis: int) -> None:
    size = 50_000
    values = torch.linspace(-1, 1, size, dtype=torch.float64)
    values[:6], values[-3:] = 20 * 1.5 ** torch.arange(6.0), torch.tensor([-9.0, -13.0, -20.0])
    values = values.float().double()  # a product in float32 multiplies with these numbers
    op = diagonal(values, dtype)
    narrow, wide = (found(op, d, largest=6, smallest=3, max_basis=max_basis) for d in (torch.float32, torch.float64))
    exact = torch.cat([values.sort(descending=True).values[:6], values.sort().values[:3]])
    for pairs in (narrow, wide):
        assert bool(pairs.converged.all())
        assert bool(((pairs.values - exact).abs() <= pairs.bounds + 1e-9).all())
        gram = pairs.vectors.T @ pairs.vectors
        assert float((gram - torch.eye(9)).abs().max()) < 1e-12
        images = values[:, None] * pairs.vectors
        residuals = (images - pairs.vectors * pairs.values).norm(dim=0)
        assert float((residuals - pairs.residuals).abs().max()) < 3 * ROUNDING * pairs.norm
    assert abs(narrow.products - wide.products) <= 8
    assert float((narrow.values - wide.values).abs().max()) < 3 * ROUNDING * wide.norm


def test_no_copies_of_converged_eigenvalues_appear() -> None:
    """Strakos' matrix: without reorthogonalization its largest eigenvalues are found again and again."""
    values = 0.001 + torch.arange(300.0, dtype=torch.float64) / 299 * 99.999 * 0.9 ** (299 - torch.arange(300.0))
    pairs = found(diagonal(values, torch.float64), torch.float32, largest=12, max_basis=200)
    exact = values.sort(descending=True).values[:12]
    assert float((pairs.values - exact).abs().max()) < 1e-6 * float(exact[0])


def network() -> Operator:
    torch.manual_seed(0)
    net = Network(Spec(input_shape=(1, 8, 8), channels=4, timesteps=3))
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    return hessian(make_objective(net, LOSSES["mse"], (x, y)))


def test_eigenpairs_of_a_network_are_those_of_a_basis_in_float64() -> None:
    op = network()
    narrow, wide = (found(op, d, largest=4, smallest=2, max_basis=40) for d in (torch.float32, torch.float64))
    assert bool(narrow.converged.all())
    assert bool(wide.converged.all())
    assert bool(((narrow.values - wide.values).abs() <= narrow.bounds + wide.bounds).all())
    assert float((narrow.values - wide.values).abs().max()) < 1e-6 * wide.norm
    for pairs in (narrow, wide):
        images = torch.stack([(op @ v).double() for v in pairs.vectors.T], 1)
        residuals = (images - pairs.vectors * pairs.values).norm(dim=0)
        assert float((residuals - pairs.residuals).abs().max()) < 1e-7 * pairs.norm


def test_a_density_is_that_of_a_basis_in_float64() -> None:
    values = torch.linspace(0, 1, 20_000, dtype=torch.float64).square().float().double()
    op = diagonal(values, torch.float32)
    narrow, wide = (
        density(op, probes=2, steps=40, generator=seeded(5), basis_dtype=d) for d in (torch.float32, torch.float64)
    )
    exact, even = values.numpy(), np.full(len(values), 1 / len(values))
    for a, b, w, u in zip(narrow.nodes, wide.nodes, narrow.weights, wide.weights, strict=True):
        assert stats.wasserstein_distance(a, b, w, u) < 1e-6
        assert stats.wasserstein_distance(a, exact, w, even) < 0.01
    assert torch.allclose(narrow.quadratic, wide.quadratic, rtol=1e-6)


def test_a_start_on_the_complement_is_that_of_a_basis_in_float64() -> None:
    values = torch.linspace(-1, 1, 2_000, dtype=torch.float64)
    values[-3:] = torch.tensor([5.0, 6.0, 7.0])
    op, fixed = diagonal(values, torch.float32), torch.eye(2_000, dtype=torch.float64)[:, -3:]
    start = torch.randn(2_000, dtype=torch.float64, generator=seeded(2))
    nodes, _ = quadrature(*tridiagonal(op, start, 30, fixed, torch.float32))
    others, _ = quadrature(*tridiagonal(op, start, 30, fixed))
    assert float((nodes - others).abs().max()) < 1e-6
    assert float(nodes.max()) <= 1 + 1e-6


def test_a_basis_that_is_too_small_is_refused_with_its_size() -> None:
    op = diagonal(torch.linspace(-1, 1, 1000), torch.float32)
    with pytest.raises(ValueError, match="need a basis of 9 vectors of 1000 float32"):
        eigenpairs(op, 4, generator=seeded(0), max_basis=6, basis_dtype=torch.float32)
