"""Curvature products of ikun's own networks against double backward of plain torch and the NumPy oracle."""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from objectives import firing_objective, plainly
from sampled import sampled
from torch import nn

from hessian_tools.engine.linearized import Linearized
from hessian_tools.engine.product import linearize_traced
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators import curvature as operators
from hessian_tools.operators.base import dense, symmetry_error
from ikun.kernels import dispatch
from ikun.networks import Network
from tests import jet_oracle

pytestmark = pytest.mark.usefixtures("one_thread")

AUTOGRAD = {kind: getattr(operators, f"_autograd_{kind}") for kind in ("hessian", "ggn", "fisher")}
CONFIGURATIONS = list(
    itertools.product(("if", "lif", "plif"), ("hard", "soft"), (False, True), ("none", "bn"), ("csnn", "mlp"))
)


def linearized(objective: Objective, kind: str, memory: float = float("inf")) -> Linearized:
    """The traced product of the first batch."""
    product = linearize_traced(objective, objective.batches[0], kind, memory)
    assert isinstance(product, Linearized), product
    return product


def error(kind: str, objective: Objective, memory: float = float("inf")) -> float:
    """Relative error of the product of the first batch."""
    v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(objective.dtype)
    exact = AUTOGRAD[kind](plainly(objective), objective.batches[0])(v)
    assert exact.norm() > 1e-6
    return float((linearized(objective, kind, memory)(v) - exact).norm() / exact.norm())


@pytest.mark.parametrize("index", sampled(range(len(CONFIGURATIONS)), 5))
def test_products_agree_with_double_backward(index: int) -> None:
    """Whole, and in segments."""
    neuron, reset, detach_reset, norm, model = CONFIGURATIONS[index]
    bits = index // 2 + index // 4 + index // 24  # the other axes, rotated
    fields = {
        "coding": ("direct", "poisson")[bits % 2],
        "ties": ("first", "last")[bits // 2 % 2],
        "surrogate": ("atan:2", "sigmoid:4", "triangle:1")[bits % 3],
    }
    loss = ("mse", "ce")[(bits + index) % 2]
    objective = firing_objective(
        loss, neuron=neuron, reset=reset, detach_reset=detach_reset, norm=norm, model=model, **fields
    )
    for kind in AUTOGRAD:
        assert error(kind, objective) < 1e-12
    assert error("hessian", objective, memory=1.0) < 1e-12


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("coding", ["direct", "poisson"])
def test_products_agree_for_all_losses_and_codings(loss: str, coding: str) -> None:
    for kind in AUTOGRAD:
        assert error(kind, firing_objective(loss, coding=coding, ties="last")) < 1e-12


@pytest.mark.parametrize(
    "params", ["fc*", "conv2.weight", "norm1.*", "norm*.bias", "*.logit", "spike3.logit", "conv1.weight,norm2.weight"]
)
def test_products_agree_for_a_part_of_the_parameters(params: str) -> None:
    objective = firing_objective(neuron="plif", params=params)
    for kind in AUTOGRAD:
        assert error(kind, objective) < 1e-12
    assert error("hessian", objective, memory=1.0) < 1e-12


def test_products_agree_for_relaxed_networks_and_single_steps() -> None:
    for memory in (1.0, 1e9):
        assert error("hessian", firing_objective(relaxed=True, neuron="lif"), memory) < 1e-12
        assert error("hessian", firing_objective(timesteps=1), memory) < 1e-12


@pytest.mark.parametrize("coding", ["direct", "poisson"])
@pytest.mark.parametrize("neuron", ["lif", "plif"])
def test_products_of_long_sequences_agree(neuron: str, coding: str) -> None:
    objective = firing_objective(timesteps=100, neuron=neuron, coding=coding)
    assert max(error(kind, objective, memory) for kind in AUTOGRAD for memory in (1.0, 1e9)) < 1e-12


def test_order_of_the_parameters_is_the_objectives() -> None:
    forward = firing_objective()
    names = list(forward.parameters)[::-1]
    backward = Objective(
        forward.model, forward.loss, forward.batches, {name: forward.parameters[name] for name in names}
    )
    assert error("hessian", backward) < 1e-12


def test_hooks_are_traced() -> None:
    objective = firing_objective()
    plain = linearized(objective, "hessian")(torch.ones(objective.size).double())
    objective.model.get_submodule("conv1").register_forward_hook(lambda m, i, o: 2 * o)
    objective.programs.clear()
    assert error("hessian", objective) < 1e-12
    found = linearized(objective, "hessian")(torch.ones(objective.size).double())
    assert not torch.allclose(found, plain)


def test_operators_use_it_over_ragged_batches_and_within_memory() -> None:
    objective = firing_objective().rebatched(2)
    block = torch.randn(objective.size, 2, dtype=torch.float64)
    for kind, factory in operators.OPERATORS.items():
        oracle = partial(operators._by_autograd, AUTOGRAD[kind], reason="the oracle")
        exact = operators.CurvatureOperator(plainly(objective), oracle) @ block
        size = linearized(objective, kind).nbytes
        assert size > 0
        for memory in (0.0, 1.5 * size, 1e9):
            op = factory(objective, memory)
            for _ in range(2):
                assert (op @ block - exact).norm() < 1e-12 * exact.norm()
            assert op.path == "traced"
            assert len(op._kept) == {0.0: 0, 1e9: 3}.get(memory, 1)


@pytest.mark.parametrize("neuron", ["if", "plif"])
def test_products_are_symmetric(neuron: str) -> None:
    objective = firing_objective(neuron=neuron)
    matrix = dense(operators.hessian(objective))
    assert (matrix - matrix.T).abs().max() < 1e-14 * matrix.abs().max() + 1e-16
    assert symmetry_error(operators.hessian(objective, 1.0), torch.Generator().manual_seed(0)) < 1e-13


@pytest.mark.parametrize("neuron", ["lif", "plif"])
@pytest.mark.parametrize("model", ["csnn", "mlp"])
def test_plain_torch_equals_numba(neuron: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    objective = firing_objective(neuron=neuron, model=model)
    v = torch.randn(objective.size, dtype=torch.float64)
    compiled = {kind: linearized(objective, kind)(v) for kind in AUTOGRAD}
    monkeypatch.setattr(dispatch, "kernels", lambda: None)
    for kind, expected in compiled.items():
        assert (linearized(objective, kind)(v) - expected).norm() < 1e-13 * expected.norm()


def test_failing_numba_warns_once_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> float:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(dispatch, "_state", {"broken": False})
    monkeypatch.setattr(dispatch, "_compiled", lambda: dict.fromkeys(dispatch.KERNELS, fail))
    with pytest.warns(UserWarning, match="no compiler"):
        assert error("hessian", firing_objective()) < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error("hessian", firing_objective()) < 1e-12


def test_float32_is_as_accurate_as_double_backward() -> None:
    """Over several directions and configurations: at most 1.5 times the error of eager float32."""
    for fields in ({"norm": "bn"}, {"norm": "none", "neuron": "plif"}):
        single = firing_objective(dtype=torch.float32, channels=6, input_shape=(1, 8, 8), **fields)
        double = make_objective(single.model, single.loss, list(single.batches), dtype=torch.float64)
        vs = torch.randn(6, single.size, generator=torch.Generator().manual_seed(0))
        exact = AUTOGRAD["hessian"](plainly(double), double.batches[0])
        eager = AUTOGRAD["hessian"](plainly(single), single.batches[0])
        fast = linearized(single, "hessian")
        errors = torch.tensor([[(f(v).double() - exact(v.double())).norm() for v in vs] for f in (fast, eager)])
        assert errors[0].mean() <= 1.5 * errors[1].mean()


ORACLE = [
    {"neuron": "if", "reset": "hard", "norm": "none", "ties": "first"},
    {"neuron": "lif", "reset": "soft", "norm": "bn", "ties": "last"},
    {"neuron": "plif", "reset": "hard", "norm": "bn", "ties": "first", "detach_reset": True},
    {"neuron": "plif", "reset": "hard", "norm": "none", "ties": "last"},
]


@pytest.mark.parametrize("memory", sampled([1e9, 1.0], 2))
@pytest.mark.parametrize("index", range(len(ORACLE)))
def test_the_dense_hessian_is_that_of_the_oracle(index: int, memory: float) -> None:
    fields, loss = ORACLE[index], ("mse", "ce")[index % 2]
    objective = firing_objective(loss, **fields, input_shape=(1, 4, 4), channels=1, classes=2)
    fast = dense(operators.hessian(objective, memory)).numpy()
    params = {name: p.detach().numpy() for name, p in objective.parameters.items()}
    layers: list[dict[str, Any]] = []
    net = objective.model
    assert isinstance(net, Network)
    for name, layer in net.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layers.append({"kind": "conv" if isinstance(layer, nn.Conv2d) else "linear", "weight": f"{name}.weight"})
        elif isinstance(layer, nn.BatchNorm2d):
            stats = {"mean": layer.running_mean.numpy(), "var": layer.running_var.numpy()}  # type: ignore[union-attr]
            layers.append({"kind": "norm", "weight": f"{name}.weight", "bias": f"{name}.bias", **stats})
        elif name.startswith("spike"):
            decay, gain = (float(torch.as_tensor(r).detach()) for r in layer.rates())  # type: ignore[operator]
            logit = {"logit": f"{name}.logit"} if net.spec.neuron == "plif" else {}
            spec = net.spec
            layers.append(
                {"kind": "neuron", "threshold": spec.threshold, "v_reset": spec.v_reset, "decay": decay, "gain": gain,
                 "reset": spec.reset, "detach_reset": spec.detach_reset, "spike": jet_oracle.surrogate("atan", 2.0),
                 **logit}
            )  # fmt: skip
        else:
            layers.append({"kind": "pool", "ties": net.spec.ties} if name.startswith("pool") else {"kind": "flatten"})
    x, y = objective.batches[0]
    _, _, exact = jet_oracle.hessian(layers, params, x.numpy(), y.numpy(), timesteps=net.spec.timesteps, loss=loss)
    assert np.abs(fast - exact).max() < 1e-10 * np.abs(exact).max()
