"""Tests of the estimate of the Gauss-Newton matrix from a few rows per sample, against the dense matrix."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators import gram
from hessian_tools.operators.gram_estimate import GramEstimate, gram_estimate


def objective(samples: int = 12) -> tuple[Objective, Tensor]:
    """A small network and its Gauss-Newton matrix, from Jacobians and the softmax's second derivative."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = 3 * torch.randn(samples, 4, dtype=torch.float64), torch.randint(3, (samples,))
    parameters = list(net.parameters())
    exact = torch.zeros(43, 43, dtype=torch.float64)
    for sample in x:
        out = net(sample)
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(o, parameters, retain_graph=True)]) for o in out]
        p, j = out.detach().softmax(0), torch.stack(rows)
        exact += j.T @ (p.diag() - torch.outer(p, p)) @ j / samples
    return make_objective(net, F.cross_entropy, (x, y), check=False), exact


def draws(o: Objective, columns: int, count: int) -> list[GramEstimate]:
    generator = torch.Generator().manual_seed(1)
    return [gram_estimate(o, columns, generator=generator) for _ in range(count)]


def test_the_mean_over_draws_is_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    o, exact = objective()
    roots: list[Tensor] = []
    assembled = gram.assembled

    def note(*args: object) -> object:
        found = assembled(*args)  # type: ignore[arg-type]
        roots.append(found[1][0])
        return found

    monkeypatch.setattr("hessian_tools.operators.gram_estimate.assembled", note)
    draws(o, 2, 400)
    inner = torch.stack([r.mT @ r for r in roots])  # of every sample, [draws, n, C, C]
    probabilities = o.outputs(o.batches[0][0]).detach().softmax(1)
    second = (probabilities.diag_embed() - probabilities[:, :, None] * probabilities[:, None]) / 12
    error = (inner.mean(0) - second).abs()
    assert bool((error <= 4.5 * inner.std(0) / 20 + 1e-12).all())
    assert math.isclose(float(exact.trace()), sum(e.trace for e in draws(o, 3, 100)) / 100, rel_tol=0.05)


def test_intervals_of_the_trace_cover_and_the_largest_eigenvalue_lies_between() -> None:
    o, exact = objective()
    trace, largest = float(exact.trace()), float(torch.linalg.eigvalsh(exact)[-1])
    found = draws(o, 8, 100)
    quantile = 2.365  # of Student's t with 7 degrees of freedom
    covered = sum(abs(e.trace - trace) <= quantile * e.trace_stderr for e in found)
    assert covered >= 88
    mean = sum(float(e.values[0]) for e in found) / 100
    assert 0.8 * largest <= sum(e.below for e in found) / 100 <= largest <= mean <= 1.5 * largest
    assert all(float(e.values.sum()) == pytest.approx(e.trace, rel=1e-9) for e in found)


def test_one_row_has_no_error_and_many_rows_approach_the_matrix() -> None:
    o, exact = objective()
    (one,) = draws(o, 1, 1)
    assert len(one.values) == 12
    assert math.isnan(one.trace_stderr)
    assert math.isnan(one.below)
    (many,) = draws(o, 40, 1)
    assert float(many.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=0.2)
    assert many.trace_stderr < 0.1 * many.trace


def test_more_samples_than_rows_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    o, _ = objective()
    monkeypatch.setattr(gram, "ROWS", 30)
    with pytest.raises(gram.GramError, match="gram_estimate"):
        gram.gram_matrix(o)
    assert gram_estimate(o, 2).trace > 0
    with pytest.raises(ValueError, match="at least 1"):
        gram_estimate(o, 0)


def test_a_loss_that_does_not_depend_on_a_sample() -> None:
    o, _ = objective()
    flat = make_objective(o.model, lambda out, y: (out * 0).sum() + (out[:1] * 0).mean(), o.batches[0], check=False)
    assert gram_estimate(flat, 2).trace == 0
