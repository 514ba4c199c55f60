"""Tests of the comparison with PyHessian, on dense Hessians of small networks."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from objectives import spiking_objective, trained_smooth
from torch import Tensor, nn

from hessian_tools.analysis.operator_spectrum.pyhessian import pyhessian_eigenpairs, pyhessian_trace
from hessian_tools.linalg.lanczos import eigenpairs
from hessian_tools.linalg.trace import estimate
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian

# 156 parameters, 64 samples in batches of 24, 24 and 16
spiking = functools.partial(
    spiking_objective,
    samples=64,
    batch_size=24,
    dtype=torch.float32,
    hidden=(8,),
    input_shape=(1, 4, 4),
    norm="none",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_three_eigenvalues_of_largest_size_are_the_dense_ones(dtype: torch.dtype) -> None:
    target = spiking(dtype=dtype)
    op = hessian(target)
    exact = torch.linalg.eigvalsh(dense(hessian(target)).double())
    exact = exact[exact.abs().argsort(descending=True)]
    pairs = pyhessian_eigenpairs(target, op, 3, tol=1e-2, seed=0)
    torch.testing.assert_close(pairs.values, exact[:3], rtol=0.03, atol=0)
    assert ((pairs.values[:, None] - exact).abs().min(1).values <= pairs.residuals + 1e-6).all()
    assert op.products == pairs.products >= 3 * 3  # for each, at least two by PyHessian and one by us
    assert all(p.grad is None for p in target.model.parameters())


def test_it_agrees_on_the_top_eigenvalue_of_a_larger_network() -> None:
    target = trained_smooth()
    assert target.size >= 10_000
    theirs = pyhessian_eigenpairs(target, hessian(target), 1, tol=1e-2, seed=0, max_iterations=500)
    ours = eigenpairs(hessian(target), 1, generator=torch.Generator())
    residual = float(theirs.residuals[0])
    assert residual <= 0.05 * float(theirs.values[0])  # both meet this
    assert ours.residuals[0] <= residual
    assert abs(float(theirs.values[0] - ours.values[0])) <= residual**2 / (0.1 * float(ours.values[0]))


def test_the_dense_trace_lies_in_the_interval_of_its_values() -> None:
    target = spiking()
    exact = float(dense(hessian(target)).trace())
    found = [pyhessian_trace(target, seed=seed) for seed in range(12)]
    low, high = estimate(torch.cat(found)).ci95  # one run stops after too few values for an interval
    assert low <= exact <= high
    assert all(p.grad is None for p in target.model.parameters())
    assert sum(len(v) == 2 for v in found) >= 6  # it stops after a negative trace
    positive = spiking(norm="bn")
    values = pyhessian_trace(positive, seed=1)
    low, high = estimate(torch.cat([pyhessian_trace(positive, seed=seed) for seed in range(1, 7)])).ci95
    assert 3 <= len(values) <= 100
    assert low <= float(dense(hessian(positive)).trace()) <= high
    assert len(pyhessian_trace(positive, seed=1, max_iterations=2)) <= 2


def test_the_same_seed_gives_the_same_values_and_leaves_the_global_generator() -> None:
    target = spiking()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two = (pyhessian_trace(target, seed=3, max_iterations=3) for _ in range(2))
    pairs = pyhessian_eigenpairs(target, hessian(target), 1, tol=1e-2, seed=3)
    assert one.equal(two)
    assert not one.equal(pyhessian_trace(target, seed=4, max_iterations=3))
    assert pairs.values.equal(pyhessian_eigenpairs(target, hessian(target), 1, tol=1e-2, seed=3).values)
    assert torch.get_rng_state().equal(before)
    assert torch.get_default_dtype() == torch.float32


class Partly(nn.Module):
    """One layer in use, one parameter that enters linearly, one that does not enter at all."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.linear = nn.Parameter(torch.ones(2))
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x)) + self.linear


def linear_and_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean() + (outputs[:, 0] - targets).square().mean()


def test_parameters_without_a_gradient_count_as_zeros() -> None:
    torch.manual_seed(0)
    target = make_objective(Partly(), linear_and_square, (torch.randn(20, 3), torch.randn(20)), batch_size=8)
    matrix = dense(hessian(target)).double()
    exact = torch.linalg.eigvalsh(matrix)
    pairs = pyhessian_eigenpairs(target, hessian(target), 1, tol=1e-2, seed=0)
    assert float(pairs.values[0]) == pytest.approx(float(exact[exact.abs().argmax()]), rel=1e-2)
    parts = dict(zip(target.parameters, target.split(pairs.vectors[:, 0]), strict=True))
    assert parts["unused"].abs().max() == 0
    low, high = estimate(pyhessian_trace(target, seed=0, max_iterations=20)).ci95
    assert low <= float(matrix.trace()) <= high


def test_layers_are_measured_one_at_a_time() -> None:
    """Only the objective's parameters are used, though others of the model require gradients too."""
    target = spiking()
    part = dataclasses.replace(target, parameters={"fc1.weight": target.parameters["fc1.weight"]})
    exact = torch.linalg.eigvalsh(dense(hessian(part)).double())
    pairs = pyhessian_eigenpairs(part, hessian(part), 1, tol=1e-2, seed=0)
    assert float(pairs.values[0]) == pytest.approx(float(exact[exact.abs().argmax()]), rel=1e-2)
    assert all(p.grad is None for p in target.model.parameters())


def test_a_zero_hessian_gives_zeros_and_one_that_is_not_finite_is_refused() -> None:
    target = spiking()
    flat = dataclasses.replace(target, loss=lambda outputs, _: outputs.sum() * 0)
    pairs = pyhessian_eigenpairs(flat, hessian(flat), 2, tol=1e-2, seed=0)
    assert pairs.values.tolist() == pairs.residuals.tolist() == [0, 0]
    assert pyhessian_trace(flat, seed=0).tolist() == [0]
    broken = dataclasses.replace(target, loss=lambda outputs, _: outputs.square().mean() * torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        pyhessian_eigenpairs(broken, hessian(broken), 1, tol=1e-2, seed=0)
    assert all(p.grad is None for p in target.model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_it_runs_on_the_device_of_the_objective_and_not_on_the_current_one() -> None:
    here = spiking()
    there = make_objective(here.model, here.loss, list(here.batches), device="cuda:1")
    expected, found = (pyhessian_eigenpairs(o, hessian(o), 1, tol=1e-2, seed=0) for o in (here, there))
    assert found.vectors.device == torch.device("cuda", 1)
    torch.testing.assert_close(found.values.cpu(), expected.values, rtol=1e-2, atol=0)
    assert len(pyhessian_trace(there, seed=0, max_iterations=5)) > 0
    assert torch.cuda.current_device() == 0
