"""Tests of Lanczos and power iteration against closed forms and dense eigendecompositions in float64."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from draws import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import laplacian
from torch import Tensor

from hessian_tools.linalg.error_bounds import random_start_bound, temple_bounds
from hessian_tools.linalg.lanczos import (
    LOOSE,
    Eigenpairs,
    certified,
    eigenpairs,
    excess,
    expected_products,
    least_basis,
)
from hessian_tools.linalg.lanczos_quadrature import quadrature, tridiagonal
from hessian_tools.linalg.power_iteration import power_iteration
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import Composed, Dense, Operator, scaled
from hessian_tools.operators.curvature import hessian


def with_eigenvalues(values: Tensor, seed: int = 0) -> tuple[Dense, Tensor]:
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=seeded(seed)))[0]
    matrix = q @ torch.diag(values.double()) @ q.T
    return Dense((matrix + matrix.T) / 2), values.double().sort().values


def diagonal(values: Tensor) -> Composed:
    """A diagonal operator that stores no matrix."""
    column = values.double()[:, None]
    return Composed(len(values), torch.float64, values.device, lambda block: column * block)


def check(op: Operator, pairs: Eigenpairs, exact: Tensor, top: int, bottom: int) -> None:
    """Check values, order, orthonormality and residuals."""
    check_pairs(op, pairs, torch.cat([exact.flip(0)[:top], exact[:bottom]]), float(exact.abs().max()))


def check_pairs(op: Operator, pairs: Eigenpairs, expected: Tensor, scale: float) -> None:
    assert (pairs.values - expected).abs().max() <= 1e-8 * scale
    images = op @ pairs.vectors
    residuals = (images - pairs.vectors * pairs.values.to(images)).norm(dim=0)
    assert (residuals - pairs.residuals).abs().max() <= 1e-12 * scale
    assert residuals.max() <= 1e-8 * scale
    gram = pairs.vectors.T @ pairs.vectors
    assert (gram - torch.eye(len(expected))).abs().max() <= 1e-12
    assert pairs.converged.all()
    assert (pairs.bounds <= pairs.residuals).all()


@pytest.mark.parametrize("max_basis", [None, 60])
def test_eigenvalues_of_the_path_laplacian_are_found(max_basis: int | None) -> None:
    op, exact = laplacian()
    pairs = eigenpairs(op, 10, 5, generator=seeded(), tol=1e-8, max_basis=max_basis, max_products=5000)
    check(op, pairs, torch.from_numpy(exact), 10, 5)


@given(st.integers(2, 40), st.integers(0, 10**6))
@settings(max_examples=25)
def test_eigenpairs_of_random_matrices_are_found(n: int, seed: int) -> None:
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
def test_eigenpairs_of_hard_spectra_are_found(values: Tensor) -> None:
    op, exact = with_eigenvalues(values)
    check(op, eigenpairs(op, 5, 3, generator=seeded(), tol=1e-9), exact, 5, 3)


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([5.0, -5.0, 3.0, -3.0, 3.0, *torch.linspace(-2, 2, 60).tolist()]),
        -torch.linspace(1, 9, 50),
        torch.tensor([-4.0] * 5 + [4.0] * 2 + [-6.0] + [0.0] * 40),
        torch.tensor([2.0] * 12),
    ],
    ids=["pairs", "negative definite", "degenerate", "multiple of the identity"],
)
@pytest.mark.parametrize("max_basis", [None, 14])
def test_eigenvalues_are_found_by_magnitude(values: Tensor, max_basis: int | None) -> None:
    op, exact = with_eigenvalues(values)
    pairs = eigenpairs(op, 0, magnitude=5, generator=seeded(), tol=1e-9, max_basis=max_basis)
    expected = exact.abs().sort(descending=True).values[:5]
    check_pairs(op, pairs, expected * pairs.values.sign(), float(exact.abs().max()))
    signs = [(pairs.values > 0).sum(), (exact[exact.abs() >= float(expected[-1]) - 1e-9] > 0).sum()]
    assert signs[0] == signs[1] or (exact.abs() >= float(expected[-1]) - 1e-9).sum() > 5  # ties: either copy will do


@given(st.integers(2, 40), st.integers(0, 10**6))
@settings(max_examples=25)
def test_eigenvalues_of_random_matrices_are_found_by_magnitude(n: int, seed: int) -> None:
    m = torch.randn(n, n, dtype=torch.float64, generator=seeded(seed))
    op, count = Dense(m + m.T), min(4, n)
    pairs = eigenpairs(op, 0, magnitude=count, generator=seeded(seed), tol=1e-9, max_basis=max(9, n // 2))
    exact = torch.linalg.eigvalsh(m + m.T)
    expected = exact[exact.abs().argsort(descending=True)][:count]
    check_pairs(op, pairs, expected, float(expected[0].abs()))


def test_magnitude_finds_what_the_two_ends_find() -> None:
    op, _ = with_eigenvalues(torch.cat([torch.linspace(-1, 1, 200), torch.tensor([4.0, 3.0, -3.5, -2.0, 1.5])]))
    found = eigenpairs(op, 0, magnitude=5, generator=seeded(), tol=1e-9, max_basis=12)
    np.testing.assert_allclose(found.values, [4, -3.5, 3, -2, 1.5], atol=1e-8)
    assert found.low == pytest.approx(-3.5)
    assert found.high == pytest.approx(4)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scaling_the_operator_scales_its_eigenvalues(scale: float) -> None:
    op, _ = laplacian(60)
    one = eigenpairs(op, 4, 2, generator=seeded())
    other = eigenpairs(scaled(op, scale), 4, 2, generator=seeded())
    torch.testing.assert_close(other.values / scale, one.values, rtol=1e-10, atol=1e-12)
    assert torch.equal(other.converged, one.converged)
    assert other.products == one.products
    assert (other.bounds / scale <= one.bounds * (1 + 1e-3) + 1e-15).all()
    assert excess(other, 60) / scale == pytest.approx(excess(one, 60))


def test_the_same_seed_gives_the_same_arrays_and_another_the_same_values() -> None:
    op, _ = laplacian(80)
    a, b, c = (eigenpairs(op, 4, 2, generator=seeded(s), tol=1e-10, max_basis=25) for s in (0, 0, 1))
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


def test_pairs_that_did_not_converge_are_flagged() -> None:
    op, exact = laplacian()
    pairs = eigenpairs(op, 10, 5, generator=seeded(), tol=1e-10, max_products=30)
    assert not pairs.converged.any()
    assert pairs.products == op.products == 30 + 15
    for value, residual in zip(pairs.values, pairs.residuals, strict=True):  # an eigenvalue lies within the residual
        assert np.abs(exact - float(value)).min() <= float(residual) * (1 + 1e-9)


def test_a_zero_operator_and_one_of_size_one_are_solved() -> None:
    pairs = eigenpairs(Dense(torch.zeros(20, 20, dtype=torch.float64)), 3, 2, generator=seeded())
    assert pairs.values.tolist() == [0.0] * 5
    assert pairs.converged.all()
    assert eigenpairs(Dense(torch.tensor([[7.0]])), 1, generator=seeded()).values.item() == pytest.approx(7)


def test_bad_input_is_refused() -> None:
    op, _ = laplacian(5)
    with pytest.raises(ValueError, match="cannot find 4 largest and 2 smallest of 5"):
        eigenpairs(op, 4, 2, generator=seeded())
    with pytest.raises(ValueError, match="cannot find"):
        eigenpairs(op, 0, 0, generator=seeded())
    with pytest.raises(ValueError, match="exclude the 10 largest and 0 smallest: pass 0"):
        eigenpairs(op, magnitude=2, generator=seeded())
    for count in (6, -1):
        with pytest.raises(ValueError, match=f"cannot find {count} by magnitude of 5"):
            eigenpairs(op, 0, magnitude=count, generator=seeded())
    with pytest.raises(ValueError, match="cannot find -1 largest and 3 smallest"):
        eigenpairs(op, -1, 3, generator=seeded())
    broken = Composed(5, torch.float64, op.device, lambda v: v * math.nan)
    with pytest.raises(FloatingPointError):
        eigenpairs(broken, 1, generator=seeded())
    with pytest.raises(FloatingPointError):
        power_iteration(broken, 1, generator=seeded())
    with pytest.raises(ValueError, match="cannot find 9 of 5"):
        power_iteration(op, 9, generator=seeded())
    with pytest.raises(ValueError, match="in 0 iterations"):
        power_iteration(op, 1, generator=seeded(), max_iterations=0)


# ---------------------------------------------------------------- multiple eigenvalues
@pytest.mark.parametrize(("features", "classes", "top"), [(6, 3, 8), (20, 4, 60), (4, 6, 20)])
def test_softmax_regression_at_zero_has_its_known_eigenvalues(features: int, classes: int, top: int) -> None:
    """H = (X'X / n) x (I - 11'/K) / K: every eigenvalue of X'X / (n K) K - 1 times, and `features` zeros."""
    x = torch.randn(50, features, dtype=torch.float64, generator=seeded(1)) * torch.linspace(0.5, 2, features)
    y = torch.randint(0, classes, (50,), generator=seeded(2))
    model = torch.nn.Linear(features, classes, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    op = hessian(make_objective(model, torch.nn.functional.cross_entropy, (x, y), dtype=torch.float64))
    gram = torch.from_numpy(np.linalg.eigvalsh((x.T @ x).numpy() / (50 * classes)))
    exact = torch.cat([torch.zeros(features), gram.repeat_interleave(classes - 1)])
    check(op, eigenpairs(op, top, 0, generator=seeded(), tol=1e-9), exact, top, 0)


@pytest.mark.parametrize("max_basis", [None, 20])
@pytest.mark.parametrize(
    ("values", "most"),
    [
        (torch.zeros(1000), 16),
        (torch.cat([torch.zeros(995), torch.arange(1.0, 6)]), 21),
        (torch.cat([torch.zeros(987), torch.tensor([3.0] * 9 + [2.0] * 3 + [-1.0])]), 40),
    ],
    ids=["zero", "rank 5", "multiple"],
)
def test_a_closed_krylov_space_ends_the_search(values: Tensor, most: int, max_basis: int | None) -> None:
    """Few distinct eigenvalues: all copies found, without the 1000 products allowed."""
    op, exact = diagonal(values), values.double().sort().values
    pairs = eigenpairs(op, 11, 4, generator=seeded(), max_basis=max_basis)
    check(op, pairs, exact, 11, 4)
    assert pairs.products <= most + 15
    assert pairs.complete
    assert pairs.steps == len(values.unique())
    assert excess(pairs, 1000) == 0


def test_copies_missed_at_a_loose_tol_show_from_another_start() -> None:
    """One Krylov space holds one copy of each eigenvalue; the complement of what was found shows the other."""
    op = diagonal(torch.cat([torch.linspace(-1, 1, 300), torch.tensor([9.0, 9.0, 5.0])]))
    pairs = eigenpairs(op, 2, generator=seeded())
    np.testing.assert_allclose(pairs.values, [9, 5], atol=1e-6)
    start = torch.randn(303, dtype=torch.float64, generator=seeded(1))
    alpha, beta = tridiagonal(op, start, 20, pairs.vectors)
    assert quadrature(alpha, beta)[0].max() == pytest.approx(9)


# ---------------------------------------------------------------- bounds
def test_temple_bounds_are_those_computed_by_hand() -> None:
    def row(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    # gaps 5 - 3 - 0.2 and 3 - 1 - 0.5
    found = temple_bounds(row(5, 3), row(0.1, 0.2), row(1), row(0.5))
    np.testing.assert_allclose(found, [0.01 / 1.8, 0.04 / 1.5])
    # overlapping, gap below the residual, alone
    np.testing.assert_allclose(temple_bounds(row(5, 4.9), row(0.1, 0.2), row(), row()), [0.1, 0.2])
    np.testing.assert_allclose(temple_bounds(row(5), row(0.5), row(4.7), row(0.1)), [0.5])
    np.testing.assert_allclose(temple_bounds(row(5), row(0.5), row(), row()), [0.5])


@given(st.integers(5, 40), st.sampled_from([1e-6, 1e-8, 1e-10]), st.integers(0, 10**6))
@settings(max_examples=40)
def test_bounds_hold_on_random_matrices(n: int, tol: float, seed: int) -> None:
    m = torch.randn(n, n, dtype=torch.float64, generator=seeded(seed))
    check_bounds(Dense(m + m.T), torch.linalg.eigvalsh(m + m.T), tol, seed)


@given(st.integers(10, 40), st.floats(1, 8), st.integers(0, 10**6))
@settings(max_examples=40)
def test_bounds_hold_for_nearly_multiple_eigenvalues(n: int, digits: float, seed: int) -> None:
    delta = 10**-digits
    inner = torch.rand(n - 4, dtype=torch.float64, generator=seeded(seed))
    close = torch.tensor([2, 2 + delta, 3, 3 + 2 * delta], dtype=torch.float64)
    op, exact = with_eigenvalues(torch.cat([inner, close]), seed)
    check_bounds(op, exact, 1e-12, seed)


def check_bounds(op: Operator, exact: Tensor, tol: float, seed: int) -> None:
    top = min(4, len(exact) - 1)
    pairs = eigenpairs(op, top, 1, generator=seeded(seed + 1), tol=tol)
    error = (pairs.values[:, None] - exact).abs().min(1).values
    assert pairs.converged.all()
    assert (error <= pairs.bounds + 1e-14 * float(exact.abs().max())).all()


def test_bounds_hold_at_a_loose_tol() -> None:
    """The residual always holds; the bound unless an eigenvalue near has no Ritz value yet, which is rare."""
    missed = total = sharper = 0
    for seed in range(200):
        m = torch.randn(40, 40, dtype=torch.float64, generator=seeded(seed))
        exact = torch.linalg.eigvalsh(m + m.T)
        pairs = eigenpairs(Dense(m + m.T), 5, 3, generator=seeded(seed), tol=1e-3)
        error = (pairs.values[:, None] - exact).abs().min(1).values
        assert (error <= pairs.residuals + 1e-14 * pairs.norm).all()
        missed += int((error > pairs.bounds + 1e-14 * pairs.norm).sum())
        sharper += int((pairs.bounds < 0.1 * pairs.residuals).sum())
        total += 8
    assert missed <= 1e-3 * total
    assert sharper >= 0.3 * total  # of eigenvalues that are not isolated


def hilbert(n: int) -> Tensor:
    """Eigenvalues that decrease geometrically to 0, so most lie closer to 0 than any tolerance."""
    index = torch.arange(n, dtype=torch.float64)
    return 1 / (index[:, None] + index + 1)


@pytest.mark.parametrize("tol", [1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("kind", ["hilbert", "geometric", "harmonic", "both ends"])
def test_bounds_hold_where_the_spectrum_piles_up(kind: str, tol: float) -> None:
    """Near 0, eigenvalues lie between Ritz values that look isolated (on 0.1.0 up to half of the bounds failed)."""
    values = {
        "geometric": 0.5 ** torch.arange(80, dtype=torch.float64),
        "harmonic": 1 / torch.arange(1, 101, dtype=torch.float64).square(),
        "both ends": torch.cat([0.6 ** torch.arange(50), 3 - 0.7 ** torch.arange(50)]).double(),
    }
    for seed in range(20):
        op = Dense(hilbert(60)) if kind == "hilbert" else with_eigenvalues(values[kind], seed)[0]
        exact = torch.linalg.eigvalsh(op.matrix)
        pairs = eigenpairs(op, 3, 3, generator=seeded(seed), tol=tol)
        error = (pairs.values[:, None] - exact).abs().min(1).values
        assert (error <= pairs.bounds + 1e-14 * pairs.norm).all()


def test_the_bound_of_an_isolated_eigenvalue_is_sharper_than_its_residual() -> None:
    bulk = torch.linspace(-1, 1, 300, dtype=torch.float64)
    op, _ = with_eigenvalues(torch.cat([bulk, torch.tensor([20.0]).double()]), 0)
    vectors = torch.linalg.eigh(op.matrix).eigenvectors
    mixed = (vectors[:, -1:] + 1e-4 * vectors[:, -2:-1]) / math.sqrt(1 + 1e-8)  # residual 1.9e-3, error 1.9e-7
    others = torch.linspace(-1, 1, 30, dtype=torch.float64), torch.full((30,), 0.1, dtype=torch.float64)
    (found,) = certified(op, mixed, 1e-3, others=others, steps=31).bounds.tolist()
    assert 1.89e-7 <= found <= 3e-7
    (unknown,) = certified(op, mixed, 1e-3, others=others).bounds.tolist()
    assert unknown == pytest.approx(1.9e-3, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-160, 1e160, 1e200, 1e300])
def test_extreme_scales_give_the_same_pairs(scale: float) -> None:
    """The squares of these entries overflow or underflow, which looked like an invariant space."""
    matrix = torch.diag(torch.linspace(1, 9, 40, dtype=torch.float64))
    one, other = (eigenpairs(Dense(m), 5, generator=seeded()) for m in (matrix, matrix * scale))
    torch.testing.assert_close(other.values / scale, one.values)
    torch.testing.assert_close(other.residuals / scale, one.residuals, rtol=1e-3, atol=1e-14)
    assert (other.products, other.steps, other.complete) == (one.products, one.steps, one.complete)
    assert other.converged.all()
    assert excess(other, 40) / scale == pytest.approx(excess(one, 40))
    power, same = (power_iteration(Dense(m), 2, generator=seeded(), tol=0.1) for m in (matrix, matrix * scale))
    torch.testing.assert_close(same.values / scale, power.values)
    start = torch.randn(40, dtype=torch.float64, generator=seeded(1))
    for a, b in zip(tridiagonal(Dense(matrix), start, 10), tridiagonal(Dense(matrix * scale), start, 10), strict=True):
        torch.testing.assert_close(b / scale, a)


def test_a_product_beyond_all_numbers_is_refused() -> None:
    a = torch.full((40, 40), 1e308, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="not finite"):
        eigenpairs(Dense(a), 2, generator=seeded())


def test_bounds_are_residuals_where_the_gap_is_not_known() -> None:
    op, exact = laplacian(50)
    vectors = torch.linalg.eigh(op.matrix)[1][:, [-1, -3]] + 0
    pairs = certified(op, vectors, 1e-4)
    assert torch.equal(pairs.bounds, pairs.residuals)
    assert (pairs.steps, pairs.complete) == (0, False)
    assert (pairs.low, pairs.high) == pytest.approx((exact[-3], exact[-1]))
    early = eigenpairs(op, 3, generator=seeded(), max_products=8, tol=1e-12)
    assert torch.equal(early.bounds, early.residuals)
    assert not early.converged.any()


def test_bounds_count_the_round_off_of_float32_products() -> None:
    op, exact = laplacian(200)
    single = Composed(200, torch.float32, op.device, lambda v: op.matrix.float() @ v)
    pairs = eigenpairs(single, 3, 2, generator=seeded(), tol=1e-5)
    assert (pairs.bounds >= pairs.residuals.clamp_max(1e-7 * pairs.norm)).all()
    truth = torch.from_numpy(np.concatenate([exact[::-1][:3], exact[:2]]))
    assert ((pairs.values - truth).abs() <= pairs.bounds).all()


def test_fields_survive_take_and_save() -> None:
    op, _ = laplacian(60)
    pairs = eigenpairs(op, 3, 2, generator=seeded())
    file = io.BytesIO()
    torch.save(vars(pairs), file)
    file.seek(0)
    loaded = Eigenpairs(**torch.load(file, weights_only=True))
    for name, value in vars(pairs).items():
        assert (
            torch.equal(getattr(loaded, name), value) if isinstance(value, Tensor) else getattr(loaded, name) == value
        )
    some = loaded.take(torch.tensor([True, False, True, False, True]))
    assert torch.equal(some.bounds, pairs.bounds[[0, 2, 4]])
    assert (some.steps, some.low, some.high) == (pairs.steps, pairs.low, pairs.high)
    old = {k: v for k, v in vars(pairs).items() if k not in ("bounds", "steps", "complete", "low", "high")}
    assert len(Eigenpairs(**old).take(pairs.converged).values) == 5
    assert excess(Eigenpairs(**old), 60) == math.inf


# ---------------------------------------------------------------- what a random start may miss
@given(st.integers(1, 500), st.integers(1000, 10**9), st.floats(1e-6, 0.5))
def test_random_start_bound_inverts_the_formula(steps: int, size: int, failure: float) -> None:
    e = random_start_bound(steps, size, failure)
    if e < 1:
        assert 1.648 * math.sqrt(size) * math.exp(-math.sqrt(e) * (2 * steps - 1)) == pytest.approx(failure)
    else:
        assert 1.648 * math.sqrt(size) * math.exp(-(2 * steps - 1)) >= failure * (1 - 1e-9)
    assert random_start_bound(steps + 1, size, failure) <= e <= random_start_bound(steps, 2 * size, failure)
    assert random_start_bound(steps, size, failure / 2) >= e


def test_the_random_start_bound_is_right_at_its_ends() -> None:
    assert random_start_bound(0, 100) == 1
    assert random_start_bound(1, 100) == 1
    assert random_start_bound(100, 100) == 0
    for bad in ((5, 0, 0.05), (-1, 10, 0.05), (5, 10, 0.0), (5, 10, 1.0)):
        with pytest.raises(ValueError, match="the failure probability must lie between 0 and 1"):
            random_start_bound(*bad)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("steps", [10, 15, 20])
def test_random_starts_miss_no_more_than_the_bound(steps: int, isolated: bool) -> None:
    """300 starts on a uniform spectrum, or on one whose largest eigenvalue stands just beyond the bound. The largest
    Ritz values are taken from an orthonormal basis of the Krylov space by NumPy: no recurrence."""
    n, rng = 400, np.random.default_rng(0)
    e = random_start_bound(steps, n)
    values = np.append(np.linspace(0, 1 - 1.01 * e if isolated else 1, n - 1), 1.0)
    start = rng.standard_normal((300, n))
    powers = np.cos(np.outer(np.arange(steps), np.arccos(2 * values - 1)))  # Chebyshev: well conditioned
    q, _ = np.linalg.qr((start[:, None, :] * powers).transpose(0, 2, 1))
    theta = np.linalg.eigvalsh(q.transpose(0, 2, 1) @ (values[:, None] * q))[:, -1]
    assert np.mean(1 - theta > e) <= 0.05


@pytest.mark.parametrize("max_basis", [None, 8])
def test_excess_covers_both_ends(max_basis: int | None) -> None:
    values, hits = torch.linspace(-1, 2, 500, dtype=torch.float64), 0
    for seed in range(100):
        pairs = eigenpairs(diagonal(values), 1, generator=seeded(seed), max_products=20, max_basis=max_basis, tol=1e-12)
        assert pairs.steps == (max_basis or 20)
        beyond = excess(pairs, 500)
        hits += beyond == math.inf or (pairs.high + beyond >= 2 and pairs.low - beyond <= -1)
        e = random_start_bound(pairs.steps, 500, 0.025)
        assert beyond == (pytest.approx(e / (1 - 2 * e) * (pairs.high - pairs.low)) if e < 0.5 else math.inf)
    assert hits >= 95


def test_steps_are_those_of_a_random_start() -> None:
    op, _ = laplacian(60)
    full = eigenpairs(op, 3, generator=seeded(), max_products=12)
    assert (full.steps, full.complete) == (12, False)
    assert eigenpairs(op, 3, generator=seeded(), max_products=40, max_basis=9).steps == 9
    given_start = eigenpairs(op, 3, generator=seeded(), max_products=12, start=torch.ones(60))
    assert (given_start.steps, excess(given_start, 60)) == (0, math.inf)
    whole = eigenpairs(op, 58, 2, generator=seeded())
    assert whole.complete
    assert excess(whole, 60) == 0


# ---------------------------------------------------------------- memory
def test_max_basis_is_kept_or_refused() -> None:
    op = diagonal(torch.cat([torch.linspace(-1, 1, 2000), torch.arange(2.0, 14)]))
    for wanted in (1, 10, 50):
        least = least_basis(wanted)
        with pytest.raises(ValueError, match=rf"{wanted} eigenpairs need a basis of {least} vectors of 2012 float64"):
            eigenpairs(op, wanted, generator=seeded(), max_basis=least - 1)
    with pytest.raises(ValueError, match=r"\(3e-05 GiB\) are allowed: ask for fewer pairs or allow more memory"):
        eigenpairs(op, 5, generator=seeded(), max_basis=2)
    with pytest.raises(ValueError, match=r"0 \(0 GiB\) are allowed"):
        eigenpairs(op, 5, generator=seeded(), max_basis=0)
    for end in ({"largest": 10}, {"largest": 0, "magnitude": 10}, {"largest": 8, "smallest": 2}):
        pairs = eigenpairs(op, **end, generator=seeded(), max_basis=least_basis(10))
        np.testing.assert_allclose(pairs.values[:8], np.arange(13, 5, -1), atol=1e-6)
        assert pairs.converged.all()


def test_vectors_do_not_keep_the_basis() -> None:
    pairs = eigenpairs(diagonal(torch.linspace(-1, 1, 3000)), 3, 1, generator=seeded(), max_products=30)
    assert pairs.vectors.shape == (3000, 4)
    assert pairs.vectors.untyped_storage().nbytes() == 3000 * 4 * 8


PEAK = """
import torch
from hessian_tools.linalg.lanczos import eigenpairs
from hessian_tools.operators.base import Composed

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def run(size):
    values = torch.linspace(-1, 1, size, dtype=torch.float64)[:, None]
    values[:12, 0] = torch.arange(2.0, 14)
    op = Composed(size, torch.float64, torch.device("cpu"), lambda block: values * block)
    before = peak()
    pairs = eigenpairs(op, 10, generator=torch.Generator().manual_seed(0), max_basis=20)
    assert pairs.converged.all() and pairs.products > 30  # restarted
    return peak() - before

torch.set_num_threads(1)
run(5000)  # what the libraries set aside at first use
print(run(400_000))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_peak_memory_stays_within_the_basis() -> None:
    """(max_basis + wanted + 6) vectors of P float64. VmHWM, since ru_maxrss begins at the parent's peak."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    run = subprocess.run(
        [sys.executable, "-c", PEAK],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    vectors = int(run.stdout) / (400_000 * 8)
    assert 20 <= vectors <= 20 + 10 + 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("end", [{"largest": 4, "smallest": 2}, {"largest": 0, "magnitude": 6}])
def test_cuda_agrees_with_the_cpu(end: dict[str, int]) -> None:
    values = torch.cat([torch.linspace(-1, 1, 2000), torch.arange(2.0, 8), -torch.arange(2.5, 5)])
    here, there = (eigenpairs(diagonal(values.to(d)), **end, generator=seeded(), max_basis=15) for d in ("cpu", "cuda"))
    assert there.vectors.is_cuda
    assert not there.bounds.is_cuda
    assert len(there.take(there.converged).values) == 6
    torch.testing.assert_close(there.values, here.values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(there.residuals, here.residuals, rtol=1e-3, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_basis_in_float32_is_on_the_device_too() -> None:
    values = torch.cat([torch.linspace(-1, 1, 2000), torch.arange(2.0, 8)])
    here, there = (
        eigenpairs(diagonal(values.to(d)), 4, generator=seeded(), max_basis=15, basis_dtype=torch.float32)
        for d in ("cpu", "cuda")
    )
    assert there.vectors.is_cuda
    assert there.converged.all()
    torch.testing.assert_close(there.values, here.values, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- progress
def test_progress_tells_products_and_the_worst_residual() -> None:
    op, _ = laplacian()
    calls: list[tuple[int, int, float]] = []
    pairs = eigenpairs(op, 4, 2, generator=seeded(), tol=1e-6, max_basis=60, progress=lambda *call: calls.append(call))
    done = [c[0] for c in calls]
    assert done == list(range(1, op.products + 1))
    assert pairs.products == op.products
    assert all(c[0] <= c[1] <= 1000 + 6 for c in calls)
    assert calls[0][1] == 1006
    assert math.isnan(calls[0][2])
    assert calls[-1][2] <= 1e-6
    assert abs(calls[int(0.8 * len(calls))][1] / pairs.products - 1) <= 0.3  # the estimate has come near


def test_the_expected_number_of_products_is_right() -> None:
    checks = [(4, 1e-1), (8, 1e-2), (12, 1e-3)]
    assert expected_products(checks, 1e-5, 13, 100) == 20
    assert expected_products([(0, 1.0), (1, 9.0), (2, 7.0), *checks], 1e-5, 13, 100) < 30  # the oldest is forgotten
    assert expected_products(checks, 1e-5, 30, 100) == 31
    assert expected_products(checks, 1e-60, 13, 100) == 100
    assert expected_products(checks, 0.3 * 5e-324, 13, 100) == 100  # the target underflows to 0
    assert expected_products(checks, 1e-5, 100, 100) == 100
    assert expected_products(checks[:2], 1e-5, 9, 100) == 100
    for flat in (
        [(4, 0.1), (8, 0.1), (12, 0.1)],
        [(4, 0.1), (8, 0.2), (12, 0.3)],
        [(4, math.inf), (8, 1.0), (12, 0.1)],
    ):
        assert expected_products(flat, 1e-5, 13, 100) == 100
    assert expected_products([(4, 0.1), (8, 0.01), (12, 0.0)], 1e-5, 13, 100) == 14


def test_power_iteration_tells_its_progress() -> None:
    op, _ = with_eigenvalues(torch.tensor([-10.0, 7.0, 4.0, -2.0, 1.0]))
    calls: list[tuple[int, int, float]] = []
    pairs = power_iteration(op, 2, generator=seeded(), progress=lambda *call: calls.append(call))
    assert pairs.products == op.products == calls[-1][0] + 2
    assert {c[1] for c in calls} == {202}
    assert calls[-1][2] <= 1e-4
    assert torch.equal(pairs.bounds, pairs.residuals)


@given(st.integers(3, 30), st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=25)
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


def test_the_tridiagonal_matrix_is_that_of_the_complement() -> None:
    op, exact = with_eigenvalues(torch.tensor([50.0, -40.0, *torch.linspace(-1, 1, 30).tolist()]))
    pairs = eigenpairs(op, 1, 1, generator=seeded(), tol=1e-12)
    alpha, beta = tridiagonal(op, torch.randn(32, dtype=torch.float64, generator=seeded(3)), 60, pairs.vectors)
    nodes, _ = quadrature(alpha, beta)
    np.testing.assert_allclose(nodes, exact[1:-1], atol=1e-8)


def test_power_iteration_finds_signed_values_by_magnitude() -> None:
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


def test_power_iteration_flags_what_it_cannot_separate() -> None:
    op, _ = with_eigenvalues(torch.tensor([5.0, -5.0, 1.0, 0.1]))
    pairs = power_iteration(op, 1, generator=seeded(), max_iterations=300)
    assert not pairs.converged[0]
    assert pairs.residuals[0] > 0.1


def test_the_default_basis_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 300, dtype=torch.float64, generator=generator)
    matrix = matrix + matrix.T
    exact = float(torch.linalg.eigvalsh(matrix)[-1])
    steps = []
    for size in (4 * 2**30, 300 * 8 * 12):
        monkeypatch.setattr("hessian_tools.linalg.lanczos.BASIS_BYTES", size)
        pairs = eigenpairs(Dense(matrix), 1, generator=torch.Generator().manual_seed(0), tol=1e-8)
        assert abs(float(pairs.values[0]) - exact) <= float(pairs.residuals[0]) + 1e-10
        steps.append(pairs.steps)
    assert steps[1] <= 12 < steps[0]


@pytest.mark.parametrize(("asked", "given"), [(1e-3, True), (1e-3, False), (1e-7, True), (math.nan, True), (0.5, True)])
def test_the_search_continues_to_the_tolerances_that_it_is_told(asked: float, given: bool) -> None:
    values = torch.linspace(-1, 1, 400, dtype=torch.float64) ** 5
    op, exact = with_eigenvalues(values)
    calls = []

    def enough(vectors: Tensor, found: Tensor) -> tuple[Tensor, Tensor | None]:
        images = op.matrix @ vectors
        calls.append((images - vectors * found).norm(dim=0))
        return torch.full((5,), asked), images if given else None

    def products(tol: float, **more: object) -> tuple[Eigenpairs, int]:
        before = op.products
        return eigenpairs(op, 3, 2, generator=seeded(1), tol=tol, **more), op.products - before  # type: ignore[arg-type]

    tight, most = products(1e-9)
    pairs, made = products(1e-9, enough=enough)
    (residuals,) = calls
    limit = 1e-9 if math.isnan(asked) else min(asked, LOOSE)
    scale = float(exact.abs().max())
    assert residuals.max() <= LOOSE * scale
    explicit = (op.matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, explicit, rtol=1e-6, atol=1e-13)
    assert pairs.residuals.max() <= limit * scale
    assert pairs.converged.all()
    assert pairs.tol == pytest.approx(limit)
    assert made <= most
    assert made < most or math.isnan(asked)
    at_once = bool((residuals <= 0.9 * limit * scale).all())
    steps = pairs.steps
    assert made == steps + (0 if at_once and given else 5)
    assert (pairs.values - tight.values).abs().max() <= limit * scale


@given(st.integers(30, 60), st.integers(0, 10**6), st.floats(1e-6, 1))
@settings(max_examples=30)
def test_bounds_hold_at_tolerances_that_differ(n: int, seed: int, spread: float) -> None:
    op, exact = with_eigenvalues(torch.randn(n, generator=seeded(seed)).cumsum(0), seed)

    def enough(vectors: Tensor, found: Tensor) -> tuple[Tensor, Tensor | None]:
        return LOOSE * spread ** torch.rand(4, generator=seeded(seed)).double(), None

    pairs = eigenpairs(op, 2, 2, generator=seeded(seed + 1), tol=1e-9, enough=enough)
    gaps = (exact[None] - pairs.values[:, None]).abs().amin(1)
    assert pairs.converged.all()
    assert (gaps <= pairs.residuals + 1e-12 * exact.abs().max()).all()
