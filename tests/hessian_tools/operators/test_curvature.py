"""Tests of the curvature operators against dense matrices that are computed in other ways."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import spiking_objective
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from hessian_tools.analysis.context import AnalysisError
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import (
    Composed,
    Dense,
    dense,
    from_scipy,
    projected,
    scaled,
    shifted,
    summed,
    symmetry_error,
    to_scipy,
)
from hessian_tools.operators.curvature import OPERATORS, CurvatureOperator, fisher, ggn, hessian
from ikun.losses import LOSSES


def smooth(samples: int = 9, loss: str = "mse") -> Objective:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    y = torch.randint(0, 3, (samples,))
    return make_objective(model, LOSSES[loss], (torch.randn(samples, 3).double(), y), batch_size=4)


spiking = functools.partial(spiking_objective, 2, hidden=(7, 6), input_shape=(1, 2, 3), norm="none")


def functional(objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, flat weights) of the whole set, and the network as a function of flat weights."""
    x, y = (torch.cat(part) for part in zip(*objective.batches, strict=True))
    return x, y, objective.weights()


def outputs_at(objective: Objective, x: Tensor, w: Tensor) -> Tensor:
    named = dict(zip(objective.parameters, objective.split(w), strict=True))
    out: Tensor = torch.func.functional_call(objective.model, named, (x,))
    return out


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_the_hessian_of_a_smooth_network_is_that_of_autograd(loss: str) -> None:
    objective = smooth(loss=loss)
    x, y, w = functional(objective)
    expected = torch.autograd.functional.hessian(lambda v: objective.loss(outputs_at(objective, x, v), y), w)
    torch.testing.assert_close(dense(hessian(objective)), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("build", [smooth, spiking], ids=["smooth", "spiking"])
def test_ggn_is_jacobian_transpose_curvature_jacobian(build: object, loss: str) -> None:
    objective = build(loss=loss)  # type: ignore[operator]
    x, y, w = functional(objective)
    jacobian = torch.autograd.functional.jacobian(lambda v: outputs_at(objective, x, v).reshape(-1), w)
    out = outputs_at(objective, x, w).detach()
    curvature = torch.autograd.functional.hessian(lambda o: objective.loss(o.reshape(out.shape), y), out.reshape(-1))
    expected = jacobian.T @ curvature @ jacobian
    found = dense(ggn(objective))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert torch.linalg.eigvalsh(found).min() >= -1e-13 * found.abs().max()


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("build", [smooth, spiking], ids=["smooth", "spiking"])
def test_fisher_is_the_mean_of_per_sample_gradients(build: object, loss: str) -> None:
    objective = build(loss=loss)  # type: ignore[operator]
    x, y, _ = functional(objective)
    expected = torch.zeros(objective.size, objective.size, dtype=torch.float64)
    for i in range(len(y)):
        value = objective.loss(objective.outputs(x[i : i + 1]), y[i : i + 1])
        g = objective.flatten(torch.autograd.grad(value, list(objective.parameters.values())))
        expected += torch.outer(g, g) / len(y)
    torch.testing.assert_close(dense(fisher(objective)), expected, rtol=1e-10, atol=1e-15)


def test_softmax_regression_at_zero_has_its_known_hessian() -> None:
    """At W = 0 the Hessian is (1/n) sum (I/K - 11'/K^2) kron xx': known eigenvalues, each K - 1 times."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 4).double(), torch.randint(0, 3, (20,))
    model = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    objective = make_objective(model, nn.functional.cross_entropy, (x, y))
    inner = torch.eye(3).double() / 3 - torch.ones(3, 3).double() / 9
    expected = torch.kron(inner, x.T @ x / 20)
    torch.testing.assert_close(dense(hessian(objective)), expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(dense(ggn(objective)), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_batching_memory_and_blocks_change_nothing(name: str) -> None:
    objective = spiking(samples=11)
    reference = dense(OPERATORS[name](objective.rebatched(11), 2**30))
    for size in (1, 4, 100):
        for memory in (0.0, 1e5, 1e10):
            torch.testing.assert_close(
                dense(OPERATORS[name](objective.rebatched(size), memory)), reference, rtol=1e-11, atol=1e-15
            )
    op = OPERATORS[name](objective, 1e10)
    v = torch.randn(objective.size, 3, dtype=torch.float64)
    torch.testing.assert_close(op @ v, torch.stack([op @ c for c in v.unbind(1)], 1))
    assert op.products == 6
    assert torch.equal(op @ v, op @ v)


@pytest.mark.parametrize("name", list(OPERATORS))
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_loss_scales_the_operator(name: str, scale: float) -> None:
    objective = spiking()
    scaled_loss = make_objective(
        objective.model, lambda o, t: scale * LOSSES["mse"](o, t), list(objective.batches), dtype=torch.float64
    )
    power = 2 if name == "fisher" else 1
    expected = dense(OPERATORS[name](objective, 1e9)) * scale**power
    found = dense(OPERATORS[name](scaled_loss, 1e9))
    assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_unused_and_frozen_parameters_are_zero_rows_or_absent() -> None:
    class WithUnused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(2, 2).double()
            self.unused = nn.Parameter(torch.ones(3).double())
            self.frozen = nn.Parameter(torch.ones(2).double(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.used(x) * self.frozen)

    objective = make_objective(WithUnused(), LOSSES["mse"], (torch.randn(5, 2).double(), torch.randint(0, 2, (5,))))
    assert list(objective.parameters) == ["unused", "used.weight", "used.bias"]
    for name in OPERATORS:
        matrix = dense(OPERATORS[name](objective, 1e9))
        assert matrix[:3].abs().max() == 0
        assert matrix[3:, 3:].abs().max() > 0


def test_constant_network_has_a_zero_hessian() -> None:
    objective = spiking(gain=0.0, surrogate="rect:0.1")
    for name in OPERATORS:
        assert dense(OPERATORS[name](objective, 1e9)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spiking_operators_are_symmetric(dtype: torch.dtype) -> None:
    objective = spiking()
    objective = make_objective(objective.model, LOSSES["mse"], list(objective.batches), dtype=dtype)
    for name in OPERATORS:
        error = symmetry_error(OPERATORS[name](objective, 1e9), torch.Generator().manual_seed(0))
        assert error <= (1e-5 if dtype == torch.float32 else 1e-13)


def test_finite_differences_of_the_surrogate_gradient_are_refused() -> None:
    objective = spiking()
    w = objective.weights()

    def gradient_at(v: Tensor) -> Tensor:
        with torch.no_grad():
            for p, part in zip(objective.parameters.values(), objective.split(v), strict=True):
                p.copy_(part)
        return objective.value_and_gradient()[1]

    def differences(block: Tensor) -> Tensor:
        step = 1e-6
        columns = [(gradient_at(w + step * v) - gradient_at(w - step * v)) / (2 * step) for v in block.unbind(1)]
        gradient_at(w)
        return torch.stack(columns, 1)

    op = Composed(objective.size, torch.float64, torch.device("cpu"), differences)
    assert symmetry_error(op, torch.Generator().manual_seed(0)) > 0.1
    exact = dense(hessian(objective))
    assert (dense(op) - exact).norm() > 0.3 * exact.norm()
    with pytest.raises(ValueError, match="finite differences of the surrogate gradient are not a Hessian"):
        SpectrumSettings(operators=("finite-differences",))
    for name, factory in OPERATORS.items():
        asymmetric: dict[str, object] = {name: lambda o, m, f=factory: _skewed(o)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hessian_tools.analysis.spectrum.OPERATORS", {**OPERATORS, **asymmetric})
            with pytest.raises(AnalysisError, match="not symmetric"):
                spectrum(objective, SpectrumSettings(operators=(name,)))


def _skewed(objective: Objective) -> CurvatureOperator:
    torch.manual_seed(0)
    matrix = torch.randn(objective.size, objective.size, dtype=torch.float64)
    return CurvatureOperator(objective, lambda o, b: lambda v: matrix @ v, 0)


def test_the_relaxed_hessian_is_the_finite_difference_of_the_loss() -> None:
    objective = spiking(relaxed=True, reset="soft", neuron="lif")
    x, y, w = functional(objective)
    exact = dense(hessian(objective))
    torch.manual_seed(3)
    for _ in range(3):
        v = torch.randn(objective.size, dtype=torch.float64)
        v /= v.norm()

        def value(t: float, v: Tensor = v) -> float:
            return objective.loss(outputs_at(objective, x, w + t * v), y).item()

        step = 1e-3
        second = (-value(2 * step) + 16 * value(step) - 30 * value(0) + 16 * value(-step) - value(-2 * step)) / (
            12 * step**2
        )
        assert second == pytest.approx(float(v @ exact @ v), rel=1e-5, abs=1e-8)


def test_batch_forms_average_to_the_whole() -> None:
    objective = spiking(samples=13)
    op = hessian(objective)
    v = torch.randn(objective.size, 2, dtype=torch.float64)
    (forms, single), counts = op.batch_forms(v, v[:, :1])
    assert counts.tolist() == [5, 5, 3]
    torch.testing.assert_close((counts[:, None, None] * forms).sum(0) / 13, v.T @ (op @ v))
    torch.testing.assert_close(single, forms[:, :1, :1])


@pytest.mark.parametrize(("make", "loss"), [(ggn, "ce"), (ggn, "mse"), (fisher, "ce")])
@pytest.mark.parametrize("objective_of", [spiking, smooth])
def test_sample_forms_are_those_of_the_dense_matrix_of_each_part(
    make: Callable[[Objective], CurvatureOperator], loss: str, objective_of: Callable[..., Objective]
) -> None:
    objective = objective_of(samples=13, loss=loss)
    parts = torch.randperm(13, generator=torch.Generator().manual_seed(3)).tensor_split([2, 3, 9])
    v = torch.randn(objective.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    op = make(objective)
    found = op.sample_forms(parts, v, v[:, 1:2])
    assert found is not None
    (forms, single), counts = found
    assert op.products == 4
    assert counts.tolist() == [2, 1, 6, 4]
    _, _, w = functional(objective)
    for part, form in zip(parts, forms, strict=True):
        x, y = (torch.cat(side)[part] for side in zip(*objective.batches, strict=True))
        jacobian = torch.autograd.functional.jacobian(lambda w, x=x: outputs_at(objective, x, w), w)
        each = []
        for i in range(len(part)):  # J^T B J and g g^T of every sample, by dense matrices of autograd
            o = outputs_at(objective, x[i : i + 1], w).detach()
            if make is ggn:
                middle = torch.autograd.functional.hessian(lambda o, t=y[i : i + 1]: objective.loss(o, t), o)
                middle = middle.reshape(o.numel(), o.numel())
            else:
                g = torch.autograd.functional.jacobian(lambda o, t=y[i : i + 1]: objective.loss(o, t), o).flatten()
                middle = torch.outer(g, g)
            image = jacobian[i].reshape(-1, len(w)) @ v
            each.append(image.T @ middle @ image)
        torch.testing.assert_close(form, torch.stack(each).mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(single, forms[:, 1:2, 1:2])


def test_sample_forms_of_a_hessian_and_of_a_product_by_autograd_are_not_known() -> None:
    objective = smooth()
    parts = torch.arange(9).split(3)
    v = torch.ones(objective.size, 1, dtype=torch.float64)
    assert hessian(objective).sample_forms(parts, v) is None
    assert ggn(dataclasses.replace(objective, traces=False)).sample_forms(parts, v) is None


# --- algebra

matrices = st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 2**32 - 1)))


@given(matrices, st.floats(-1e6, 1e6))
@settings(max_examples=30)
def test_operators_add_scale_shift_and_compose(shape: tuple[int, int], c: float) -> None:
    n, seed = shape
    rng = np.random.default_rng(seed)
    a, b = (m + m.T for m in rng.standard_normal((2, n, n)))
    d = rng.standard_normal(n)
    q = np.linalg.qr(rng.standard_normal((n, max(1, n // 2))))[0]
    first, second = Dense(torch.from_numpy(a)), Dense(torch.from_numpy(b))
    tight = {"rtol": 1e-12, "atol": 1e-9}
    torch.testing.assert_close(dense(scaled(first, c)), torch.from_numpy(c * a), **tight)
    torch.testing.assert_close(dense(scaled(first, torch.from_numpy(d))), torch.from_numpy(d[:, None] * a * d), **tight)
    torch.testing.assert_close(dense(shifted(first, c)), torch.from_numpy(a + c * np.eye(n)), **tight)
    torch.testing.assert_close(dense(summed(first, second, first)), torch.from_numpy(2 * a + b), **tight)
    p = np.eye(n) - q @ q.T
    torch.testing.assert_close(dense(projected(first, torch.from_numpy(q))), torch.from_numpy(p @ a @ p), **tight)


def test_operators_convert_to_scipy_and_back() -> None:
    objective = spiking()
    op = hessian(objective)
    exact = np.linalg.eigvalsh(dense(op).numpy())
    np.testing.assert_allclose(eigsh(to_scipy(op), k=3, which="LA")[0], exact[-3:], rtol=1e-9)
    again = from_scipy(to_scipy(op))
    torch.testing.assert_close(dense(again), dense(op))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="not symmetric"):
        Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="square"):
        Dense(torch.ones(2, 3))
    with pytest.raises(ValueError, match="size 2, the vector has shape"):
        Dense(torch.eye(2)) @ torch.ones(3)
    with pytest.raises(ValueError, match="cannot be added"):
        summed(Dense(torch.eye(2)), Dense(torch.eye(3)))
