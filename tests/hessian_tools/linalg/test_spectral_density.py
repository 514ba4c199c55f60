"""Tests of spectral densities and traces against dense spectra, and of the coverage of their intervals."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from draws import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from real_network import curvature
from scipy import stats
from torch import Tensor

from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.linalg.lanczos import certified, eigenpairs
from hessian_tools.linalg.lanczos_quadrature import quadrature, tridiagonal, tridiagonals
from hessian_tools.linalg.spectral_density import DensityEstimate, default_probes, density, wasserstein
from hessian_tools.linalg.trace import (
    estimate,
    estimate_forms,
    form_variance,
    frobenius,
    probe_forms,
    probe_moments,
    rademacher,
    trace,
)
from hessian_tools.operators.base import Composed, Dense, Operator, projected, scaled

COVERED = [("hessian", 1960, 10), ("ggn", 1960, 10), ("hessian", 320, 12), ("hessian", 320, 32)]


def real_hessian() -> Dense:
    return Dense(curvature("hessian"))


def spread(n: int = 300, low: float = -1.0, high: float = 3.0) -> Dense:
    """Evenly spaced eigenvalues, dense eigenvectors."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=seeded()))[0]
    matrix = q @ torch.diag(torch.linspace(low, high, n, dtype=torch.float64)) @ q.T
    return Dense((matrix + matrix.T) / 2)


def cdf_distance(x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> float:
    """The integral of |F - G| by hand: the distribution functions between any two neighbouring atoms."""
    points = np.unique(np.concatenate([x, y]))
    total = 0.0
    for left, right in itertools.pairwise(points):
        total += abs(float(u[x <= left].sum()) - float(v[y <= left].sum())) * (right - left)
    return total


def test_moments_cdf_and_weights_agree_with_the_dense_spectrum() -> None:
    op = real_hessian()
    exact = torch.linalg.eigvalsh(op.matrix)
    pairs = eigenpairs(op, 6, 4, generator=seeded())
    found = density(op, probes=6, steps=60, generator=seeded(1), deflate=pairs)
    assert found.atoms == 10
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        assert float(weights.sum()) == pytest.approx(1, abs=1e-10)
        assert (weights >= 0).all()
        assert nodes.min() >= exact[0] - 1e-6
        assert nodes.max() <= exact[-1] + 1e-6
    spread = found.moment(1).std() / 6**0.5
    assert abs(found.moment(1).mean() - exact.mean()) <= 5 * spread
    assert found.moment(2).mean() == pytest.approx(float(exact.square().mean()), rel=0.2)
    # Wasserstein-1 distance of the pooled quadrature to the true spectrum, relative to its range
    distance = stats.wasserstein_distance(
        exact, torch.cat(found.nodes), u_weights=None, v_weights=torch.cat(found.weights)
    )
    assert distance <= 1e-3 * float(exact[-1] - exact[0])


def test_density_is_right_without_deflation_and_with_everything_deflated() -> None:
    op = Dense(torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)))
    plain = density(op, probes=2, steps=10, generator=seeded())
    assert plain.atoms == 0
    assert plain.moment(0).tolist() == pytest.approx([1, 1])
    everything = eigenpairs(op, 3, 0, generator=seeded(), tol=1e-12)
    whole = density(op, probes=2, steps=5, generator=seeded(), deflate=everything)
    assert whole.moment(1).tolist() == pytest.approx([8 / 3, 8 / 3])
    assert len(whole.nodes[0]) == 3
    assert (whole.accuracy, whole.steps) == (0, 0)


@pytest.mark.parametrize("counts", [{"probes": 2, "steps": 8}, {"accuracy": 0.1}])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_density_is_scale_equivariant(scale: float, counts: dict[str, float]) -> None:
    op = Dense(torch.diag(torch.linspace(-1, 3, 50, dtype=torch.float64)))
    a = density(op, **counts, generator=seeded())
    b = density(scaled(op, scale), **counts, generator=seeded())
    assert (b.steps, b.probes) == (a.steps, a.probes)
    assert b.accuracy == pytest.approx(a.accuracy)
    for x, y in zip(a.nodes, b.nodes, strict=True):
        torch.testing.assert_close(y / scale, x)
    for x, y in zip(a.weights, b.weights, strict=True):
        torch.testing.assert_close(x, y)


def test_probes_give_the_trace_and_the_norm() -> None:
    op = real_hessian()
    pairs = eigenpairs(op, 3, 2, generator=seeded(), tol=1e-6)
    found = density(op, probes=3, steps=4, generator=seeded(5), deflate=pairs)
    forms, squared = probe_forms(op, 3, seeded(5), pairs)  # the same seed draws the same probes
    torch.testing.assert_close(found.quadratic, forms, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.squared, squared, rtol=1e-6, atol=1e-10)


def test_the_trace_and_norm_of_the_laplacian_are_estimated() -> None:
    n = 400
    side = -torch.ones(n - 1, dtype=torch.float64)
    op = Dense(2 * torch.eye(n, dtype=torch.float64) + torch.diag(side, 1) + torch.diag(side, -1))
    found = trace(op, probes=64, generator=seeded())
    assert found.ci95[0] <= 800 <= found.ci95[1]
    # Var = 2 (||A||_F^2 - sum A_ii^2) = 2 (2398 - 1600) for one Rademacher probe
    assert found.stderr == pytest.approx(math.sqrt(2 * 798 / 64), rel=0.3)
    _, squared = probe_forms(op, 200, seeded(1))
    assert frobenius(squared) == pytest.approx(math.sqrt(2398), rel=0.02)


@pytest.mark.parametrize(("name", "size", "probes"), COVERED)
def test_the_interval_of_the_trace_covers_it(name: str, size: int, probes: int) -> None:
    """500 replicates: the 95% interval holds the true trace in at least 92% of them."""
    op = Dense(curvature(name)[:size, :size])
    exact = float(op.matrix.trace())
    vectors = torch.linalg.eigh(op.matrix).eigenvectors
    pairs = certified(op, torch.cat([vectors[:, -10:], vectors[:, :5]], 1), 1e-4)
    forms, _ = probe_forms(op, 500 * probes, seeded(7), pairs)
    hits = 0
    for values in forms.split(probes):
        found = estimate(values, float(pairs.values.sum()))
        hits += found.ci95[0] <= exact <= found.ci95[1]
    assert hits / 500 >= 0.92


def hostile(kind: str) -> Tensor:
    """Matrices [40, 40] whose quadratic forms of signs are discrete or skewed, without any deflation."""
    a = torch.diag(torch.linspace(1, 2, 40, dtype=torch.float64))
    if kind == "coupling":
        a[3, 7] = a[7, 3] = 5.0
    elif kind == "rank one":
        u = torch.randn(40, dtype=torch.float64, generator=seeded(2))
        a += 5 * torch.outer(u, u)
    else:
        size = int(kind.split()[1])
        a[:size, :size] += 5.0
    return a


@pytest.mark.parametrize("probes", [10, 11, 12, 13, 16, 24, 32])
@pytest.mark.parametrize("kind", ["coupling", "rank one", "block 3", "block 5", "block 30", "block 40"])
def test_the_interval_of_the_trace_covers_on_hostile_matrices(kind: str, probes: int) -> None:
    """Student's t covers 87% for the coupling with 7 probes, 91% with 13, and 86% for rank one with 10."""
    a = hostile(kind)
    forms, _ = probe_forms(Dense(a), 1000 * probes, seeded(11))
    found = [estimate(values).ci95 for values in forms.split(probes)]
    assert sum(low - 1e-9 <= float(a.trace()) <= high + 1e-9 for low, high in found) / 1000 >= 0.92


def few_couplings(kind: str) -> Tensor:
    """Small matrices whose largest quadratic form of signs is rare: equal blocks, stars, a chain, a decaying vector."""
    name, _, number = kind.partition(" ")
    size = int(number)
    a = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    if name == "block":
        a[:size, :size] = 1.0
    elif name == "negative":
        a[:size, :size] = -1.0
    elif name == "star":
        a[0, 1:] = a[1:, 0] = 1.0
    elif name == "chain":
        a[range(size), range(1, size + 1)] = a[range(1, size + 1), range(size)] = 1.0
    else:
        u = 0.5 ** torch.arange(size + 1, dtype=torch.float64)
        a = torch.outer(u, u)
    return a


FEW = ["block 2", "block 3", "block 4", "negative 4", "block 6", "block 8", "star 4", "star 8", "chain 5", "decay 11"]


@pytest.mark.parametrize("probes", [10, 16, 32])
@pytest.mark.parametrize("kind", FEW)
def test_the_interval_of_the_trace_covers_few_equal_couplings(kind: str, probes: int) -> None:
    """From the values only, the interval covered 83 and 88% for a block of four with 10 and 16 probes."""
    op, generator = Dense(few_couplings(kind)), seeded(13)
    found = [trace(op, probes=probes, generator=generator).ci95 for _ in range(500)]
    assert sum(low - 1e-9 <= float(op.matrix.trace()) <= high + 1e-9 for low, high in found) / 500 >= 0.92


def test_from_their_values_only_forms_need_24_probes() -> None:
    a = hostile("block 4")
    for probes in (24, 32, 64):
        forms, _ = probe_forms(Dense(a), 1000 * probes, seeded(11))
        found = [estimate_forms(values).ci95 for values in forms.split(probes)]
        assert sum(low <= float(a.trace()) <= high for low, high in found) / 1000 >= 0.92
    assert all(map(math.isnan, estimate_forms(torch.arange(23).double()).ci95))


@pytest.mark.parametrize("kind", ["GOE", "block 4", "diagonal"])
def test_the_variance_of_a_form_is_that_of_the_matrix(kind: str) -> None:
    """2 (||A||_F^2 - sum A_ii^2): the mean of 2000 estimates from five probes each; exactly 0 for a diagonal matrix."""
    a = torch.randn(12, 12, dtype=torch.float64, generator=seeded(3))
    a = {"GOE": a + a.T, "block 4": few_couplings("block 4"), "diagonal": a.diag().diag()}[kind]
    exact = 2 * float(a.square().sum() - a.diagonal().square().sum())
    generator = seeded(4)
    found = [form_variance(*probe_moments(Dense(a), 5, generator)[1:]) for _ in range(2000)]
    assert sum(found) / 2000 == pytest.approx(exact, rel=0.05, abs=0)
    assert math.isnan(form_variance(torch.ones(1), torch.ones(3)))


def test_the_variance_of_a_form_is_that_of_the_complement() -> None:
    """With deflated vectors Q, z meets (I - QQ')A(I - QQ')."""
    a = torch.randn(12, 12, dtype=torch.float64, generator=seeded(5))
    op = Dense(a + a.T)
    pairs = certified(op, torch.linalg.eigh(op.matrix).eigenvectors[:, -3:], 1e-4)
    rest = op.matrix - pairs.vectors @ pairs.values.diag() @ pairs.vectors.T
    generator = seeded(6)
    found = [form_variance(*probe_moments(op, 8, generator, pairs)[1:]) for _ in range(1000)]
    exact = 2 * float(rest.square().sum() - rest.diagonal().square().sum())
    assert sum(found) / 1000 == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("probes", [2, 3, 4, 6, 9])
def test_few_probes_give_a_standard_error_and_no_interval(probes: int) -> None:
    """Two probes covered the trace of the coupled pair in 48%, four in 88%."""
    found = trace(Dense(hostile("coupling")), probes=probes, generator=seeded())
    assert math.isfinite(found.estimate)
    assert math.isfinite(found.stderr)
    assert all(map(math.isnan, found.ci95))
    assert all(map(math.isfinite, trace(Dense(hostile("coupling")), probes=10, generator=seeded()).ci95))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_trace_is_scale_equivariant(scale: float) -> None:
    op = Dense(torch.diag(torch.linspace(-1, 3, 50, dtype=torch.float64)) + 0.1)
    one, other = (trace(o, probes=8, generator=seeded()) for o in (op, scaled(op, scale)))
    assert other.estimate / scale == pytest.approx(one.estimate)
    assert other.stderr / scale == pytest.approx(one.stderr)


def test_bad_counts_are_refused() -> None:
    op = Dense(torch.eye(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 2 probes, not 1"):
        trace(op, probes=1, generator=seeded())
    with pytest.raises(ValueError, match="at least 2 probes, not 0"):
        trace(op, probes=0, generator=seeded())
    with pytest.raises(ValueError, match="not 1"):
        estimate(torch.ones(1))
    for counts in ({"probes": 0}, {"steps": 0}, {"accuracy": 0.1, "max_vectors": 0}):
        with pytest.raises(ValueError, match="at least one probe and one step"):
            density(op, **counts, generator=seeded())
    for accuracy in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="from 1e-12 to 1"):
            density(op, accuracy=accuracy, generator=seeded())
    assert op.products == 0


def test_probes_are_signs_and_independent_of_device_order() -> None:
    op = Dense(torch.eye(7, dtype=torch.float64))
    z = rademacher(op, 5, seeded())
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert torch.equal(z[:, :3], rademacher(op, 3, seeded()))
    one_by_one = seeded()
    assert torch.equal(z, torch.cat([rademacher(op, 1, one_by_one) for _ in range(5)], 1))


weighted = st.lists(st.tuples(st.integers(-20, 20), st.integers(1, 9)), min_size=1, max_size=12)


@given(weighted, weighted, st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=50)
def test_wasserstein_is_the_integral_between_the_distribution_functions(
    one: list[tuple[int, int]], other: list[tuple[int, int]], scale: float
) -> None:
    (x, u), (y, v) = (torch.tensor(part, dtype=torch.float64).T for part in (one, other))
    u, v = u / u.sum(), v / v.sum()
    expected = cdf_distance(scale * x, u, scale * y, v)
    assert wasserstein(scale * x, u, scale * y, v) == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)


@pytest.mark.parametrize("deflated", [False, True])
def test_accuracy_compares_all_steps_with_half_of_them(deflated: bool) -> None:
    op = spread()
    pairs = eigenpairs(op, 2, 1, generator=seeded(3)) if deflated else None
    before = op.products
    found = density(op, probes=3, steps=21, generator=seeded(1), deflate=pairs)
    assert op.products - before == 63
    half = density(op, probes=3, steps=10, generator=seeded(1), deflate=pairs)
    for one, other in zip(
        found.coarse_nodes + found.coarse_weights, half.nodes + half.weights, strict=True
    ):  # the same to the bit
        assert torch.equal(one, other)
    every = torch.cat(found.nodes + found.coarse_nodes)
    moved = [
        cdf_distance(*pair)
        for pair in zip(found.coarse_nodes, found.coarse_weights, found.nodes, found.weights, strict=True)
    ]
    assert found.accuracy == pytest.approx(max(moved) / float(every.max() - every.min()), rel=1e-9)
    assert 0 < found.accuracy < half.accuracy


def test_accuracy_is_zero_after_a_closed_step_and_unknown_after_one() -> None:
    zero = density(Dense(torch.zeros(6, 6, dtype=torch.float64)), generator=seeded())
    assert (zero.accuracy, zero.steps) == (0, 1)
    same = density(Dense(3 * torch.eye(6, dtype=torch.float64)), accuracy=0.1, generator=seeded())
    assert (same.accuracy, same.steps) == (0, 1)
    assert math.isnan(density(spread(), steps=1, generator=seeded()).accuracy)


@pytest.mark.parametrize("accuracy", [0.1, 0.02])
def test_a_wanted_accuracy_chooses_probes_and_steps(accuracy: float) -> None:
    op = spread()
    exact = torch.linalg.eigvalsh(op.matrix)
    pairs = eigenpairs(op, 3, 2, generator=seeded(3))
    before = op.products
    found = density(op, accuracy=accuracy, generator=seeded(1), deflate=pairs)
    # 4 ln(2 * 300 / .05) / (302 * t^2): 12.4 for t = .1; 311 for .02, more than are ever chosen
    assert found.probes == {0.1: 13, 0.02: 64}[accuracy]
    taken = [len(x) - found.atoms for x in found.nodes]
    assert op.products - before == sum(taken)
    assert found.steps == max(taken)
    for x, u, y, v, m in zip(found.coarse_nodes, found.coarse_weights, found.nodes, found.weights, taken, strict=True):
        assert m in (16, 32, 64, 128, 256)
        assert cdf_distance(x, u, y, v) <= accuracy / 2 * float(y.max() - y.min()) * (1 + 1e-9)
    if taken[0] > 16:  # half as many steps were not enough
        less = density(op, probes=1, steps=taken[0] // 2, generator=seeded(1), deflate=pairs)
        assert less.accuracy > accuracy / 2
    assert found.accuracy <= accuracy / 2
    pooled = wasserstein(torch.cat(found.nodes), torch.cat(found.weights), exact, torch.full_like(exact, 1 / 300))
    assert pooled <= accuracy * float(exact[-1] - exact[0])


def test_explicit_counts_win_over_chosen_ones_and_memory_bounds_them() -> None:
    op = spread()
    one = density(op, accuracy=0.1, steps=40, generator=seeded())
    assert (one.probes, one.steps) == (13, 40)
    other = density(op, accuracy=0.1, probes=2, generator=seeded())
    assert (other.probes, other.steps) == (2, 16)
    plain = density(op, generator=seeded())
    assert (plain.probes, plain.steps) == (4, 60)
    few = density(op, accuracy=0.02, probes=2, max_vectors=10, generator=seeded())
    assert few.steps == 10
    assert few.accuracy > 0.01  # says itself that it is not what was asked for
    before = op.products
    with pytest.raises(ValueError, match=r"^60 steps need 0.000134 GiB .*59 vectors .*more memory or fewer steps$"):
        density(op, max_vectors=59, generator=seeded())
    assert op.products == before
    assert density(op, max_vectors=60, generator=seeded()).steps == 60


def by_column(matrix: Tensor) -> tuple[Operator, list[int]]:
    """An operator that computes the columns of a block singly, as curvature does, and the widths asked for."""
    asked: list[int] = []

    def product(block: Tensor) -> Tensor:
        asked.append(block.shape[1])
        return torch.stack([matrix @ v for v in block.unbind(1)], 1)

    return Composed(len(matrix), torch.float64, torch.device("cpu"), product), asked


@pytest.mark.parametrize(("counts", "most"), [({"steps": 12}, 12), ({"accuracy": 0.05}, 97)])
def test_probes_together_and_one_by_one_agree_to_the_bit(counts: dict[str, float], most: int) -> None:
    matrix = spread(100).matrix
    pairs = eigenpairs(Dense(matrix), 2, 1, generator=seeded(3))
    widths, found = [], []
    for room in (None, most, 2 * most):
        op, asked = by_column(matrix)
        found.append(density(op, probes=3, **counts, max_vectors=room, generator=seeded(1), deflate=pairs))
        widths.append(asked)
    assert widths[0][:12] == [3] * 12
    assert set(widths[1]) == {1}
    assert set(widths[2]) == {1, 2}
    for other in found[1:]:
        assert other.accuracy == found[0].accuracy
        for name in ("nodes", "weights", "coarse_nodes", "coarse_weights", "quadratic", "squared"):
            for a, b in zip(getattr(other, name), getattr(found[0], name), strict=True):
                assert torch.equal(a, b)


def test_runs_of_different_lengths_share_blocks() -> None:
    op = Dense(torch.diag(torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0, 13.0], dtype=torch.float64)))
    starts = [torch.eye(6, dtype=torch.float64)[0], torch.ones(6), torch.zeros(6), torch.tensor([1.0, 1, 0, 0, 0, 0])]
    together = tridiagonals(op, starts, 6)
    assert [len(alpha) for alpha, _ in together] == [1, 6, 0, 2]
    assert [len(beta) for _, beta in together] == [1, 6, 0, 2]
    assert together[0][1].tolist() == [0]
    for start, (alpha, beta) in zip(starts, together, strict=True):
        alone = tridiagonal(op, start, 6)
        torch.testing.assert_close(alpha, alone[0])
        torch.testing.assert_close(beta[:-1], alone[1])
    torch.testing.assert_close(quadrature(*together[3])[0], torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_deflating_any_subspace_projects_the_operator() -> None:
    """Not eigenvectors: nodes of all steps are the eigenvalues of (I - QQ') A (I - QQ') on the complement of Q."""
    op = spread(40)
    q = torch.linalg.qr(torch.randn(40, 4, dtype=torch.float64, generator=seeded(5)))[0]
    alpha, beta = tridiagonal(op, torch.randn(40, dtype=torch.float64, generator=seeded(6)), 60, q)
    complement = torch.linalg.qr(torch.cat([q, torch.randn(40, 36, dtype=torch.float64, generator=seeded(7))], 1))[0]
    exact = torch.linalg.eigvalsh(complement[:, 4:].T @ op.matrix @ complement[:, 4:])
    assert len(alpha) == 36
    torch.testing.assert_close(quadrature(alpha, beta)[0], exact, rtol=0, atol=1e-10)
    other, _ = tridiagonal(projected(op, q), torch.randn(40, dtype=torch.float64, generator=seeded(6)), 10, q)
    torch.testing.assert_close(other, alpha[:10], rtol=0, atol=1e-10)


def test_progress_after_every_step_of_every_probe() -> None:
    calls: list[tuple[int, int, float]] = []
    density(spread(), probes=2, steps=5, generator=seeded(), progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(i, 10) for i in range(1, 11)]
    assert all(math.isnan(call[2]) for call in calls)


def test_a_density_survives_saving() -> None:
    found = density(spread(), probes=2, steps=9, generator=seeded())
    file = io.BytesIO()
    torch.save(vars(found), file)
    file.seek(0)
    loaded = DensityEstimate(**torch.load(file, weights_only=True))
    assert loaded.accuracy == found.accuracy
    assert all(torch.equal(a, b) for a, b in zip(loaded.coarse_nodes, found.coarse_nodes, strict=True))


def test_a_probe_without_a_part_outside_the_deflated_space_says_nothing() -> None:
    op = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    top = certified(op, torch.full((2, 1), 0.5**0.5, dtype=torch.float64), 1e-4)
    found = density(op, probes=8, generator=seeded(), deflate=top)
    assert {len(x) for x in found.nodes} == {1, 2}
    assert float(found.quadratic.mean()) == pytest.approx(
        float(found.quadratic.max()) * sum(len(x) - 1 for x in found.nodes) / 8
    )
    assert found.accuracy == 0


def test_products_that_are_not_finite_are_refused() -> None:
    broken = Composed(5, torch.float64, torch.device("cpu"), lambda v: v * math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        density(broken, generator=seeded())


@pytest.mark.parametrize("accuracy", [5e-324, 1e-200, 1e-13, 0.0, -1.0, 1.0])
def test_an_accuracy_that_cannot_be_reached_is_refused(accuracy: float) -> None:
    op = Dense(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="accuracy of a density must be from 1e-12 to 1"):
        density(op, accuracy=accuracy, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="accuracy must lie between 1e-12 and 1"):
        SpectrumSettings(accuracy=accuracy)


@pytest.mark.parametrize(("size", "probes"), [(10, 4), (100_000, 4), (250_000, 3), (500_000, 2), (10**9, 2)])
def test_large_operators_need_fewer_probes(size: int, probes: int) -> None:
    assert default_probes(size) == probes


def test_few_probes_of_a_large_operator_are_as_accurate_as_they_promise() -> None:
    """Coupled pairs, whose eigenvalues are 1 and -1: the signs of a probe decide between them."""
    size = 500_000

    def swap(block: Tensor) -> Tensor:
        return block.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    op = Composed(size, torch.float64, torch.device("cpu"), swap)
    found = density(op, probes=default_probes(size), steps=4, generator=seeded(), basis_dtype=torch.float32)
    nodes, weights = torch.cat(found.nodes), torch.cat(found.weights) / found.probes
    exact = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    assert wasserstein(nodes, weights, exact, torch.full((2,), 0.5)) < 0.01 * 2


def test_a_settled_density_makes_fewer_steps_and_is_the_same() -> None:
    op = spread()
    whole, settled = (
        density(op, probes=3, steps=60, settled=s, generator=torch.Generator().manual_seed(0)) for s in (0.0, 0.05)
    )
    assert (whole.steps, settled.steps) == (60, 16)
    assert settled.accuracy <= 0.05
    for i in range(3):
        moved = wasserstein(whole.nodes[i], whole.weights[i], settled.nodes[i], settled.weights[i])
        assert moved < 0.05 * 4  # the range of the spectrum
    torch.testing.assert_close(settled.quadratic, whole.quadratic)
