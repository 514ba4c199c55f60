"""Tests of diagonals: exact ones against dense matrices, and the coverage of the standard errors of estimates."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from hessian_tools.linalg.diagonal import DiagonalEstimate, diagonal
from hessian_tools.linalg.lanczos import Eigenpairs, eigenpairs
from hessian_tools.operators.base import Dense


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(size: int = 120, seed: int = 0) -> Tensor:
    """A few large eigenvalues and a bulk of both signs."""
    q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=seeded(seed)))
    values = torch.linspace(-0.5, 1, size, dtype=torch.float64)
    values[:3] = torch.tensor([30.0, 20.0, 12.0])
    a: Tensor = (q * values) @ q.T
    return (a + a.T) / 2


@pytest.mark.parametrize("probes", [120, 500])
def test_few_parameters_give_the_exact_diagonal(probes: int) -> None:
    op, a = Dense(matrix()), matrix()
    found = diagonal(op, probes, seeded(1))
    assert found.exact
    assert (found.probes, op.products) == (120, 120)
    assert torch.equal(found.values, a.diagonal())
    assert not found.stderr.any()


def covered(found: DiagonalEstimate, truth: Tensor) -> float:
    """The share of entries within the 95% t interval."""
    quantile = float(stats.t.ppf(0.975, found.probes - 1))
    return float(((found.values - truth).abs() <= quantile * found.stderr + 1e-12).double().mean())


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("probes", [10, 64])
def test_errors_cover(deflated: bool, probes: int) -> None:
    a = matrix()
    pairs = eigenpairs(Dense(a), 3, generator=seeded(2)) if deflated else None
    found = [diagonal(Dense(a), probes, seeded(10 + i), pairs) for i in range(20)]
    shares = torch.tensor([covered(one, a.diagonal()) for one in found])
    assert 0.93 <= float(shares.mean()) <= 0.97
    assert all(not one.exact and one.probes == probes for one in found)
    # the standard errors are those of the theory: sum_{j != i} B_ij^2 / n
    b = a if pairs is None else a - (pairs.vectors * pairs.values) @ pairs.vectors.T
    theory = ((b.square().sum(1) - b.diagonal().square()) / probes).sqrt()
    mean = torch.stack([one.stderr.square() for one in found]).mean(0).sqrt()
    torch.testing.assert_close(mean, theory, rtol=0.25, atol=0)


def test_known_pairs_make_the_errors_smaller_and_need_not_be_exact() -> None:
    """With the three large pairs the error is that of the bulk. With wrong values the mean stays right."""
    a = matrix()
    pairs = eigenpairs(Dense(a), 3, generator=seeded(2))
    plain, known = (diagonal(Dense(a), 40, seeded(3), deflate) for deflate in (None, pairs))
    assert float(known.stderr.mean()) < 0.4 * float(plain.stderr.mean())
    wrong = Eigenpairs(**{**vars(pairs), "values": pairs.values * 1.01})
    assert covered(diagonal(Dense(a), 110, seeded(4), wrong), a.diagonal()) > 0.85


def test_a_large_diagonal_does_not_drown_the_errors() -> None:
    """The couplings are 1e-9 of the entries."""
    a = matrix(50) + 1e9 * torch.eye(50, dtype=torch.float64)
    found = diagonal(Dense(a), 40, seeded(5))
    reference = diagonal(Dense(matrix(50)), 40, seeded(5))
    torch.testing.assert_close(found.stderr, reference.stderr, rtol=1e-4, atol=0)


def test_no_couplings_no_error() -> None:
    a = torch.arange(30, dtype=torch.float64).diag()
    found = diagonal(Dense(a), 5, seeded(6))
    assert torch.equal(found.values, a.diagonal())
    assert not found.stderr.any()


def test_progress_is_reported_and_one_probe_refused() -> None:
    seen: list[tuple[int, int]] = []
    diagonal(Dense(matrix()), 10, seeded(0), progress=lambda done, most, _: seen.append((done, most)))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    with pytest.raises(ValueError, match="at least 2 probes, not 1"):
        diagonal(Dense(matrix()), 1, seeded(0))
