"""Tests of the hand-written curvature products against double backward and the NumPy oracle."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from objectives import firing_objective
from torch import Tensor, nn

from hessian_tools.chain import second_order, segments
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators import curvature as operators
from hessian_tools.operators.base import dense
from ikun.kernels import dispatch
from ikun.kernels.scan import Scan, torch_adjoint, torch_adjoint_tangent, torch_tangent
from ikun.losses import LOSSES
from ikun.networks import Network
from ikun.pooling import selection
from tests import jet_oracle

pytestmark = pytest.mark.usefixtures("one_thread")

AUTOGRAD = {kind: getattr(operators, f"_autograd_{kind}") for kind in ("hessian", "ggn", "fisher")}


def error(kind: str, objective: Objective) -> float:
    """Relative error of the hand-written product of the first batch."""
    v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(objective.dtype)
    product = second_order.linearize(objective, objective.batches[0], kind)
    assert product is not None
    exact = AUTOGRAD[kind](objective, objective.batches[0])(v)
    assert exact.norm() > 1e-6
    return float((product(v) - exact).norm() / exact.norm())


CONFIGURATIONS = list(
    itertools.product(("if", "lif", "plif"), ("hard", "soft"), (False, True), ("none", "bn"), ("csnn", "mlp"))
)


@pytest.mark.parametrize("index", range(len(CONFIGURATIONS)))
def test_products_agree_with_double_backward(index: int) -> None:
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


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("coding", ["direct", "poisson"])
@pytest.mark.parametrize("ties", ["first", "last"])
def test_products_agree_for_all_losses_codings_and_tie_rules(loss: str, coding: str, ties: str) -> None:
    objective = firing_objective(loss, coding=coding, ties=ties)
    for kind in AUTOGRAD:
        assert error(kind, objective) < 1e-12


@pytest.mark.parametrize(
    "params", ["fc*", "conv2.weight", "norm1.*", "norm*.bias", "*.logit", "spike3.logit", "conv1.weight,norm2.weight"]
)
def test_products_agree_for_a_part_of_the_parameters(params: str) -> None:
    objective = firing_objective(neuron="plif", params=params)
    for kind in AUTOGRAD:
        assert error(kind, objective) < 1e-12


def test_products_agree_for_relaxed_networks_and_single_steps() -> None:
    assert error("hessian", firing_objective(relaxed=True, neuron="lif")) < 1e-12
    assert error("hessian", firing_objective(timesteps=1)) < 1e-12


def test_order_of_the_parameters_is_the_objectives() -> None:
    forward = firing_objective()
    names = list(forward.parameters)[::-1]
    backward = Objective(
        forward.model, forward.loss, forward.batches, {name: forward.parameters[name] for name in names}
    )
    assert error("hessian", backward) < 1e-12


def torch_networks() -> Iterator[nn.Module]:
    shape = nn.Flatten(), nn.Linear(2 * 3 * 3, 4)
    yield nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Tanh(), *shape)
    yield nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=2, dilation=2), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 2, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(2, affine=False), nn.ReLU(), *shape,
    )  # fmt: skip
    yield nn.Sequential(nn.Flatten(), nn.BatchNorm1d(30), nn.Sequential(nn.Linear(30, 6), nn.BatchNorm1d(6), nn.GELU()),
                        nn.Identity(), nn.BatchNorm1d(6), nn.Linear(6, 4, bias=False), nn.Sigmoid())  # fmt: skip


@pytest.mark.parametrize("which", range(3))
def test_products_agree_for_networks_of_plain_torch(which: int) -> None:
    torch.manual_seed(0)
    net = list(torch_networks())[which]
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_()  # type: ignore[union-attr, operator]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    data = torch.randn(7, 1, 5, 6, dtype=torch.float64), torch.arange(7) % 4
    objective = make_objective(net.double(), LOSSES["ce"], data)
    for kind in AUTOGRAD:
        assert error(kind, objective) < 1e-12


class Offers(nn.Sequential):
    def second_order_chain(self, x: Tensor) -> None:
        return None


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(30, 4), nn.LayerNorm(4)),
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(60, 4)),
        nn.Sequential(nn.Flatten(2), nn.Linear(30, 4), nn.BatchNorm1d(1), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(30, 4))),
        Offers(nn.Flatten(), nn.Linear(30, 4)),
    ],
)
def test_unknown_layers_fall_back(net: nn.Module) -> None:
    data = torch.randn(7, 1, 5, 6, dtype=torch.float64), torch.arange(7) % 4
    objective = make_objective(net.double(), LOSSES["ce"], data)
    assert second_order.linearize(objective, objective.batches[0], "hessian") is None
    v = torch.randn(objective.size, dtype=torch.float64)
    exact = AUTOGRAD["hessian"](objective, objective.batches[0])(v)
    assert torch.allclose(operators.hessian(objective) @ v, exact)


def test_hooks_resets_and_changed_networks_fall_back() -> None:
    objective = firing_objective()
    batch = objective.batches[0]
    assert second_order.linearize(objective, batch, "hessian") is not None
    with_reset = Objective(objective.model, objective.loss, objective.batches, objective.parameters, lambda m: None)
    assert second_order.linearize(with_reset, batch, "hessian") is None
    objective.model.get_submodule("conv1").register_forward_hook(lambda m, i, o: 2 * o)
    assert second_order.linearize(objective, batch, "hessian") is None


def test_operators_use_it_over_ragged_batches_and_within_memory() -> None:
    objective = firing_objective().rebatched(2)
    block = torch.randn(objective.size, 2, dtype=torch.float64)
    for kind, factory in operators.OPERATORS.items():
        oracle = partial(operators._by_autograd, AUTOGRAD[kind], reason="the oracle")
        exact = operators.CurvatureOperator(objective, oracle) @ block
        size = second_order.linearize(objective, objective.batches[0], kind)
        assert size is not None
        assert size.nbytes > 0
        for memory in (0.0, 1.5 * size.nbytes, 1e9):
            op = factory(objective, memory)
            for _ in range(2):
                assert (op @ block - exact).norm() < 1e-12 * exact.norm()
            assert len(op._kept) == {0.0: 0, 1e9: 3}.get(memory, 1)


@pytest.mark.parametrize("neuron", ["if", "plif"])
def test_products_are_symmetric(neuron: str) -> None:
    matrix = dense(operators.hessian(firing_objective(neuron=neuron)))
    assert (matrix - matrix.T).abs().max() < 1e-14 * matrix.abs().max() + 1e-16


@pytest.mark.parametrize("neuron", ["lif", "plif"])
@pytest.mark.parametrize("model", ["csnn", "mlp"])
def test_torch_fallback_equals_numba(neuron: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    objective = firing_objective(neuron=neuron, model=model)
    v = torch.randn(objective.size, dtype=torch.float64)
    compiled = {}
    for kind in AUTOGRAD:
        product = second_order.linearize(objective, objective.batches[0], kind)
        assert product is not None
        compiled[kind] = product(v)
    monkeypatch.setattr(dispatch, "kernels", lambda: None)
    for kind, expected in compiled.items():
        product = second_order.linearize(objective, objective.batches[0], kind)
        assert product is not None
        assert (product(v) - expected).norm() < 1e-13 * expected.norm()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_kernels_give_the_same_over_several_blocks_and_threads(learned: bool, pooled: bool, static: bool) -> None:
    if dispatch.kernels() is None:
        pytest.skip("numba is missing")
    torch.set_num_threads(3)
    torch.manual_seed(0)
    steps, planes, height, width = 3, 401, 7, 9
    size = planes * height * width

    def array() -> Tensor:
        return torch.randn(steps, size, dtype=torch.float64)

    index = selection(torch.randn(steps, 1, planes, height, width).sign(), "first").flatten(1) if pooled else None
    scan = Scan(array(), array(), 0.4, 0.6, static, index, height * width if pooled else 1, array())
    if learned:
        scan.u, scan.gh = array(), array()
    dx, g = array()[: 1 if static else steps], array()
    g = g if index is None else g[:, : index.shape[1]]
    assert torch.allclose(dispatch.tangent(scan, dx, 0.3), torch_tangent(scan, dx, 0.3), rtol=1e-12)
    for fast, slow in (
        (dispatch.adjoint(scan, g), torch_adjoint(scan, g)),
        (dispatch.adjoint_tangent(scan, g, dx, 0.3), torch_adjoint_tangent(scan, g, dx, 0.3)),
    ):
        assert torch.allclose(fast[0], slow[0], rtol=1e-12)
        assert fast[1] == pytest.approx(slow[1], rel=1e-9)


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
        exact = AUTOGRAD["hessian"](double, double.batches[0])
        eager = AUTOGRAD["hessian"](single, single.batches[0])
        fast = second_order.linearize(single, single.batches[0], "hessian")
        assert fast is not None
        errors = torch.tensor([[(f(v).double() - exact(v.double())).norm() for v in vs] for f in (fast, eager)])
        assert errors[0].mean() <= 1.5 * errors[1].mean()


ORACLE = [
    {"neuron": "if", "reset": "hard", "norm": "none", "ties": "first"},
    {"neuron": "lif", "reset": "soft", "norm": "bn", "ties": "last"},
    {"neuron": "plif", "reset": "hard", "norm": "bn", "ties": "first", "detach_reset": True},
    {"neuron": "plif", "reset": "hard", "norm": "none", "ties": "last"},
]


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("index", range(len(ORACLE)))
def test_the_dense_hessian_is_that_of_the_oracle(index: int, segmented: bool) -> None:
    fields, loss = ORACLE[index], ("mse", "ce")[index % 2]
    objective = firing_objective(loss, **fields, input_shape=(1, 4, 4), channels=1, classes=2)
    objective = replace(objective, segmentation=segments if segmented else None)  # two steps and one
    fast = dense(operators.hessian(objective)).numpy()
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
