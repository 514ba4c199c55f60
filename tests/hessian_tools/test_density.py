"""Densities and traces against dense spectra, and the coverage of the intervals on a real network's Hessian."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from hessian_tools.density import density, rademacher
from hessian_tools.lanczos import certified, eigenpairs
from hessian_tools.objective import make_objective
from hessian_tools.operators import Dense, dense, hessian, scaled
from hessian_tools.trace import estimate, frobenius, probe_forms, trace
from ikun.checkpoint import load_checkpoint
from ikun.networks import LOSSES

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "digits-csnn-ikun.pt"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def real_hessian() -> Dense:
    """The surrogate Hessian of a trained spiking network, convolutions and readout, on 128 digits: 2,008 x 2,008."""
    checkpoint = load_checkpoint(CHECKPOINT)
    data = checkpoint.data.load()
    objective = make_objective(
        checkpoint.build(),
        LOSSES[checkpoint.loss],
        (data.images[:128], data.labels[:128]),
        params="conv*,norm*,fc2*",
        dtype=torch.float32,
    )
    matrix = dense(hessian(objective)).double()
    return Dense((matrix + matrix.T) / 2)


def test_moments_cdf_and_weights_against_the_dense_spectrum() -> None:
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


def test_without_deflation_and_with_everything_deflated() -> None:
    op = Dense(torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)))
    plain = density(op, probes=2, steps=10, generator=seeded())
    assert plain.atoms == 0
    assert plain.moment(0).tolist() == pytest.approx([1, 1])
    everything = eigenpairs(op, 3, 0, generator=seeded(), tol=1e-12)
    whole = density(op, probes=2, steps=5, generator=seeded(), deflate=everything)
    assert whole.moment(1).tolist() == pytest.approx([8 / 3, 8 / 3])
    assert len(whole.nodes[0]) == 3


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_density_is_scale_equivariant(scale: float) -> None:
    op = Dense(torch.diag(torch.linspace(-1, 3, 50, dtype=torch.float64)))
    a = density(op, probes=2, steps=8, generator=seeded())
    b = density(scaled(op, scale), probes=2, steps=8, generator=seeded())
    for x, y in zip(a.nodes, b.nodes, strict=True):
        torch.testing.assert_close(y / scale, x)
    for x, y in zip(a.weights, b.weights, strict=True):
        torch.testing.assert_close(x, y)


def test_probes_give_trace_and_norm_forms() -> None:
    op = real_hessian()
    pairs = eigenpairs(op, 3, 2, generator=seeded(), tol=1e-6)
    found = density(op, probes=3, steps=4, generator=seeded(5), deflate=pairs)
    forms, squared = probe_forms(op, 3, seeded(5), pairs)  # the same seed draws the same probes
    torch.testing.assert_close(found.quadratic, forms, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.squared, squared, rtol=1e-6, atol=1e-10)


def test_trace_of_the_laplacian_and_its_norm() -> None:
    n = 400
    side = -torch.ones(n - 1, dtype=torch.float64)
    op = Dense(2 * torch.eye(n, dtype=torch.float64) + torch.diag(side, 1) + torch.diag(side, -1))
    found = trace(op, probes=64, generator=seeded())
    assert found.ci95[0] <= 800 <= found.ci95[1]
    # Var = 2 (||A||_F^2 - sum A_ii^2) = 2 (2398 - 1600) for one Rademacher probe
    assert found.stderr == pytest.approx(math.sqrt(2 * 798 / 64), rel=0.3)
    _, squared = probe_forms(op, 200, seeded(1))
    assert frobenius(squared) == pytest.approx(math.sqrt(2398), rel=0.02)


@pytest.mark.parametrize("probes", [4, 32])
def test_coverage_of_the_trace_interval_on_a_real_hessian(probes: int) -> None:
    """500 replicates: the 95% interval holds the true trace in 92 to 98% of them."""
    op = real_hessian()
    exact = float(op.matrix.trace())
    pairs = certified(op, eigenpairs(op, 10, 5, generator=seeded()).vectors, 1e-4)
    z = rademacher(op, 500 * probes, seeded(7))
    z = z - pairs.vectors @ (pairs.vectors.T @ z)
    forms = (z * (op @ z)).sum(0)
    hits = 0
    for values in forms.split(probes):
        found = estimate(values, float(pairs.values.sum()))
        hits += found.ci95[0] <= exact <= found.ci95[1]
    assert 0.92 <= hits / 500 <= 0.98


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_trace_is_scale_equivariant(scale: float) -> None:
    op = Dense(torch.diag(torch.linspace(-1, 3, 50, dtype=torch.float64)) + 0.1)
    one, other = (trace(o, probes=8, generator=seeded()) for o in (op, scaled(op, scale)))
    assert other.estimate / scale == pytest.approx(one.estimate)
    assert other.stderr / scale == pytest.approx(one.stderr)


def test_few_probes_and_bad_counts() -> None:
    op = Dense(torch.eye(5, dtype=torch.float64))
    single = trace(op, probes=1, generator=seeded())
    assert single.estimate == pytest.approx(5)
    assert single.ci95 == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        density(op, probes=0, generator=seeded())
    with pytest.raises(ValueError, match="at least one"):
        trace(op, probes=0, generator=seeded())


def test_probes_are_signs_and_independent_of_device_order() -> None:
    op = Dense(torch.eye(7, dtype=torch.float64))
    z = rademacher(op, 5, seeded())
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert torch.equal(z[:, :3], rademacher(op, 3, seeded()))
