"""Tests of the Fisher-Rao norm and relative flatness: closed forms, dense Hessian blocks, symmetries and coverage."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draws import normal
from objectives import filled, filled_objective
from torch import Tensor, nn

from hessian_tools.analysis.flatness.relative import fisher_rao, matrices, relative_flatness
from hessian_tools.linalg.trace import TraceEstimate
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import Dense, dense, scaled
from hessian_tools.operators.curvature import fisher, ggn, hessian
from ikun.checkpoint import load_checkpoint
from ikun.losses import LOSSES


def relu_network(bias: bool = False) -> nn.Module:
    """Two hidden layers of 7 and 6."""
    layers = (nn.Linear(5, 7, bias), nn.ReLU(), nn.Linear(7, 6, bias), nn.ReLU(), nn.Linear(6, 3, bias))
    return filled(nn.Sequential(*layers), 1.5).double()


def classes(model: nn.Module) -> Objective:
    x = normal(30, 5, seed=1)
    return make_objective(model, nn.functional.cross_entropy, (x, (x[:, :3] + normal(30, 3, seed=2)).argmax(1)))


def kappa(matrix: Tensor, objective: Objective, layer: str) -> float:
    """The definition, loop by loop, from the dense matrix [P, P] of the whole network."""
    start = 0
    for name, p in objective.parameters.items():
        if name == layer:
            break
        start += p.numel()
    w = p.detach().numpy().reshape(len(p), -1)
    d, m = w.shape
    total = 0.0
    for s in range(d):
        for t in range(d):
            block = matrix.numpy()[start + s * m : start + (s + 1) * m, start + t * m : start + (t + 1) * m]
            total += float(w[s] @ w[t]) * float(np.trace(block))
    return total


# --- Fisher-Rao


def test_fisher_rao_of_a_relu_network_is_its_closed_form() -> None:
    """Without biases and with L hidden layers, ||w||_fr^2 = (L + 1)^2 E <dl/df, f>^2 (Liang et al. 2019):
    over the labels of the data for the empirical Fisher, of the model for the GGN."""
    objective = classes(relu_network())
    ((x, y),) = objective.batches
    f = objective.model(x).detach().numpy()
    p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    each = ((p[:, None] - np.eye(3)) * f[:, None]).sum(2)  # <dl/df, f> of every sample for every label
    of_data = (each[np.arange(30), y.numpy()] ** 2).mean()
    of_model = (p * each**2).sum(1).mean()
    w = objective.weights()
    assert fisher_rao(fisher(objective), w) == pytest.approx(3 * math.sqrt(of_data), rel=1e-10)
    assert fisher_rao(ggn(objective), w) == pytest.approx(3 * math.sqrt(of_model), rel=1e-10)


def test_fisher_rao_does_not_see_the_scale_of_layers() -> None:
    model = relu_network()
    before = fisher_rao(fisher(classes(model)), classes(model).weights())
    first, _, last = model.parameters()
    with torch.no_grad():
        first.mul_(7)
        last.div_(7)
    op = fisher(classes(model))
    assert fisher_rao(op, classes(model).weights()) == pytest.approx(before, rel=1e-10)
    assert op.products == 1


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_fisher_rao_scales_as_a_root(scale: float) -> None:
    b, w = normal(6, 3, seed=3), normal(6, seed=4)
    op = Dense(b @ b.T)
    assert fisher_rao(scaled(op, scale), w) == pytest.approx(math.sqrt(scale) * float((b.T @ w).norm()), rel=1e-12)


def test_fisher_rao_refuses_bad_input() -> None:
    w = normal(4, seed=5)
    with pytest.raises(ValueError, match=r"w'Aw = -.* is negative: a Fisher-Rao norm needs a Fisher matrix"):
        fisher_rao(Dense(-torch.eye(4).double()), w)
    with pytest.raises(ValueError, match="weights have NaN"):
        fisher_rao(Dense(torch.eye(4).double()), w * math.nan)
    with pytest.raises(ValueError, match="the operator has size 3"):
        fisher_rao(Dense(torch.eye(3).double()), w)
    assert fisher_rao(Dense(torch.zeros(4, 4).double()), w) == 0


# --- relative flatness


class Convolutional(nn.Module):
    """Layers with fewer, and with more, rows than columns; biases and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.wide = nn.Linear(12, 2)
        self.tall = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tall(self.wide(torch.tanh(self.norm(self.conv(x))).flatten(1)).tanh())
        return y


def convolutional() -> Objective:
    x = normal(12, 2, 3, 3, seed=6)
    return make_objective(filled(Convolutional()).double(), nn.functional.cross_entropy, (x, torch.arange(12) % 5))


spiking = functools.partial(
    filled_objective, 10, 2.0, samples=10, inputs_seed=7, classes=3, input_shape=(1, 3, 3), hidden=(5,)
)


@pytest.mark.parametrize("operator", [hessian, ggn])
@pytest.mark.parametrize("make", [convolutional, spiking], ids=["convolutional", "spiking"])
def test_with_everything_deflated_it_is_the_definition(
    make: Callable[[], Objective], operator: Callable[[Objective], Any]
) -> None:
    objective = make()
    matrix = dense(operator(objective))
    assert len(matrices(objective)) > 1
    for layer in matrices(objective):
        found = relative_flatness(operator(objective), objective, layer, deflate=1000, probes=2)
        assert found.estimate == pytest.approx(kappa(matrix, objective, layer), rel=1e-9)
        assert found.stderr < 1e-9 * abs(found.estimate)


@pytest.mark.parametrize("deflate", [0, 2])
@pytest.mark.parametrize("layer", ["conv.weight", "wide.weight", "tall.weight"])
def test_the_estimate_is_unbiased(layer: str, deflate: int) -> None:
    """250 estimates, converged eigenvectors or not: their mean is the definition's within 4 standard errors, and their
    own standard errors are right."""
    objective = convolutional()
    op = Dense(dense(hessian(objective)))
    found = [relative_flatness(op, objective, layer, probes=4, deflate=deflate, seed=s) for s in range(250)]
    estimates = np.array([e.estimate for e in found])
    error = estimates.std() / 250**0.5
    assert abs(estimates.mean() - kappa(op.matrix, objective, layer)) < 4 * error
    assert np.sqrt(np.mean([e.stderr**2 for e in found])) == pytest.approx(estimates.std(), rel=0.3)


def test_linear_regression_has_the_closed_form() -> None:
    """Mean square over d outputs: H_{s,t} = (2 / d) E xx' for s = t, else 0, so kappa = (2 / d) ||W||_F^2 E ||x||^2,
    ridge regression's penalty (Petzka et al. 2021)."""
    x = normal(40, 6, seed=8)
    model = filled(nn.Linear(6, 4)).double()
    objective = make_objective(model, lambda o, y: (o - y).square().mean(), (x, normal(40, 4, seed=9)))
    exact = 2 / 4 * float(objective.parameters["weight"].detach().square().sum() * x.square().sum(1).mean())
    found = relative_flatness(hessian(objective), objective, "weight", deflate=1000, probes=2)
    assert found.estimate == pytest.approx(exact, rel=1e-10)


def exact(model: nn.Module, layer: str) -> float:
    objective = classes(model)
    return relative_flatness(hessian(objective), objective, layer, deflate=1000, probes=2).estimate


def test_rescaled_layers_of_a_relu_network_are_as_flat() -> None:
    """a -> ca, b -> b / c changes the trace of either block, not kappa; nor does rescaling each neuron apart change
    that of the layer before it."""
    model = relu_network()
    names = ("0.weight", "2.weight", "4.weight")
    before = [exact(model, name) for name in names]
    trace = float(dense(hessian(classes(model))).diagonal()[:35].sum())
    first, second, _ = model.parameters()
    with torch.no_grad():
        first.mul_(5)
        second.div_(5)
    assert [exact(model, name) for name in names] == pytest.approx(before, rel=1e-9)
    assert abs(float(dense(hessian(classes(model))).diagonal()[:35].sum())) < 0.1 * abs(trace)
    with torch.no_grad():
        factors = torch.linspace(0.1, 3, 7, dtype=torch.float64)
        first.mul_(factors[:, None])
        second.div_(factors)
    assert exact(model, names[0]) == pytest.approx(before[0], rel=1e-9)


def test_products_are_counted_and_seeds_repeat() -> None:
    objective = convolutional()
    op = hessian(objective)

    def found(**options: Any) -> TraceEstimate:
        return relative_flatness(op, objective, "conv.weight", **options)

    assert found(probes=5, deflate=0).probes == op.products == 5
    first = found(seed=3)
    assert first == found(seed=3)
    assert first.estimate != found(seed=4).estimate
    assert first.ci95[0] < first.estimate < first.ci95[1]


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_loss_scales_relative_flatness(scale: float) -> None:
    objective = convolutional()
    op = Dense(dense(hessian(objective)))
    one, other = (relative_flatness(o, objective, "conv.weight", deflate=3) for o in (op, scaled(op, scale)))
    assert other.estimate == pytest.approx(scale * one.estimate, rel=1e-9)
    assert other.ci95 == pytest.approx((scale * one.ci95[0], scale * one.ci95[1]), rel=1e-9)


def test_a_network_that_never_spikes_is_flat() -> None:
    dead = spiking(surrogate="triangle:1", threshold=1e6)
    found = relative_flatness(hessian(dead), dead, matrices(dead)[0])
    assert (found.estimate, found.stderr, found.ci95) == (0, 0, (0, 0))
    assert fisher_rao(fisher(dead), dead.weights()) == 0


def test_bad_input_is_refused() -> None:
    objective = convolutional()
    op = hessian(objective)
    for layer in ("conv.bias", "fc9"):
        with pytest.raises(ValueError, match=f"'{layer}' is not a weight matrix: choose from conv.weight, wide.weight"):
            relative_flatness(op, objective, layer)
    with pytest.raises(ValueError, match="the operator has size 3, the objective 74 parameters"):
        relative_flatness(Dense(torch.eye(3).double()), objective, "conv.weight")
    with pytest.raises(ValueError, match="at least 2 probes, not 1"):
        relative_flatness(op, objective, "conv.weight", probes=1)
    with pytest.raises(ValueError, match="deflate must be at least 0, not -1"):
        relative_flatness(op, objective, "conv.weight", deflate=-1)
    with torch.no_grad():
        objective.parameters["wide.weight"][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'wide\.weight' has NaN"):
        relative_flatness(op, objective, "wide.weight")


# --- coverage


@pytest.mark.parametrize("operator", [hessian, ggn])
def test_intervals_cover_the_exact_value_on_a_real_network(operator: Callable[[Objective], Any]) -> None:
    """Default probes and deflation: in 92 to 98% of 500 replicates the interval holds the definition's value."""
    checkpoint = load_checkpoint(Path(__file__).parents[4] / "checkpoints" / "digits-csnn-ikun.pt")
    data = checkpoint.data.load()
    objective = make_objective(
        checkpoint.build(),
        LOSSES[checkpoint.loss],
        (data.images[:64], data.labels[:64]),
        params="conv1.weight",
        dtype=torch.float64,
    )
    op = Dense(dense(operator(objective)))
    value = kappa(op.matrix, objective, "conv1.weight")
    found = [relative_flatness(op, objective, "conv1.weight", seed=s) for s in range(500)]
    assert 0.92 <= np.mean([e.ci95[0] <= value <= e.ci95[1] for e in found]) <= 0.99
