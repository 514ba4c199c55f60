"""Tests of the variants of adapted networks: relaxed spikes against finite differences, ties against copied pooling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from node_oracle import STEPS, X, objective
from torch import Tensor, nn

from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import ggn, hessian
from ikun.adapters import AdapterError, adapt
from ikun.adapters.variants import max_pools, relaxed_network, ties_reversed
from ikun.nodes.variants import ReversingTies

functional, layer, neuron, surrogate = (
    pytest.importorskip(f"spikingjelly.activation_based.{name}")
    for name in ("functional", "layer", "neuron", "surrogate")
)
ATAN = surrogate.ATan()


def mlp(cls: Any, mode: str, **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(5, 6), cls(**settings), layer.Linear(6, 3), cls(**settings))
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(3)
    functional.set_step_mode(net, mode)
    return net


def jacobian(gradient: Any, w: Tensor, step: float = 1e-5) -> Tensor:
    columns = [(gradient(w + step * e) - gradient(w - step * e)) / (2 * step) for e in torch.eye(len(w)).to(w)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("IFNode", {"v_reset": None, "surrogate_function": ATAN}),
        ("LIFNode", {"v_reset": 0.1, "tau": 1.7, "v_threshold": 0.4, "surrogate_function": surrogate.SoftSign()}),
        ("ParametricLIFNode", {"v_reset": 0.1, "v_threshold": 0.5}),
    ],
)
def test_the_relaxed_hessian_is_that_of_the_relaxed_loss(kind: str, settings: dict[str, Any], mode: str) -> None:
    adapted = adapt(mlp(getattr(neuron, kind), mode, **settings), X, steps=STEPS)
    o = objective(relaxed_network(adapted, X[:3]))
    (x, y), values = o.batches[0], list(o.parameters.values())
    start = o.weights()

    def set_to(w: Tensor) -> None:
        with torch.no_grad():
            for p, part in zip(values, o.split(w), strict=True):
                p.copy_(part)

    def gradient(w: Tensor) -> Tensor:
        set_to(w)
        return o.flatten(torch.autograd.grad(o.loss(o.outputs(x), y), values))

    def outputs(w: Tensor) -> Tensor:
        set_to(w)
        return o.outputs(x).detach().flatten()

    exact, outer = jacobian(gradient, start), jacobian(outputs, start)
    set_to(start)
    out = o.outputs(x).detach()
    assert ((out - out.round()).abs() > 1e-3).all()  # no counts of spikes
    # squared error: H_out = 2 / (N K) I
    for found, expected in ((dense(hessian(o)), exact), (dense(ggn(o)), 2 / out.numel() * outer.T @ outer)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-8 * float(expected.abs().max()))
    assert not [p for p in o.programs.values() if isinstance(p, str)]
    functional.reset_net(adapted.model)
    assert (adapted.model(X) * STEPS).frac().abs().max() < 1e-5  # the network itself still spikes


class Steps(nn.Module):
    """A network of snnTorch without a reset, which has a relaxed form."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        snntorch = pytest.importorskip("snntorch")
        settings = {"beta": 0.8, "reset_mechanism": "none", "spike_grad": snntorch.surrogate.atan(2.0)}
        self.recurrent, self.fc, self.out = recurrent, nn.Linear(5, 6), nn.Linear(6, 3)
        self.cell = snntorch.RLeaky(linear_features=6, **settings) if recurrent else snntorch.Leaky(**settings)

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell.init_rleaky() if self.recurrent else (self.cell.init_leaky(),)
        outputs = []
        for _ in range(STEPS):
            found = self.cell(self.fc(x), *state)
            state = found if self.recurrent else found[1:]
            outputs.append(self.out(found[0]))
        return torch.stack(outputs)


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_relaxed_network_is_that_of_the_librarys_own_forward(recurrent: bool) -> None:
    torch.manual_seed(0)
    net = Steps(recurrent)
    x = X.float()
    found = relaxed_network(adapt(net, x), x[:3]).model(x)

    def fire(memory: Tensor) -> Tensor:
        return torch.atan(torch.pi * (memory - net.cell.threshold)) / torch.pi + 0.5  # the integral of ATan's slope

    net.cell.fire = fire
    expected = net(x).mean(0)
    assert ((expected - found).abs() < 1e-5).all()


class Own(neuron.LIFNode):
    """A user's neuron, with other equations."""

    def neuronal_fire(self, v: Any) -> Any:
        return super().neuronal_fire(1.1 * v)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (mlp(neuron.LIFNode, "m", detach_reset=True, v_threshold=0.4), "a detached reset"),
        (mlp(neuron.LIFNode, "m", surrogate_function=surrogate.SuperSpike(), v_threshold=0.4), "has area"),
        (mlp(Own, "s", v_threshold=0.4), "neuron '1': its class replaces"),
        (nn.Sequential(nn.Linear(5, 3)), "no spiking neurons of a library"),
    ],
)
def test_what_has_no_relaxed_form_is_refused_in_one_line(net: nn.Module, reason: str) -> None:
    adapted = adapt(net, X, steps=STEPS if len(net) > 1 else None)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="no relaxed form") as caught:
        relaxed_network(adapted, X[:3])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- ties
GEOMETRIES = [(2, None, 0, 1, False), (3, 2, 1, 1, False), (2, 3, 0, 1, True), (3, 1, 1, 2, False), (2, 2, 1, 1, True)]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_last_of_equal_entries_carries_the_derivative(axes: int, geometry: Any) -> None:
    size, stride, padding, dilation, ceil = geometry
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
    shape = (7, 8, 6)[:axes]
    spikes = (torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    at = torch.arange(spikes[0, 0].numel()).double().view(shape)
    later = spikes + 1e-6 * at  # the oracle: the later of equal entries is larger
    expected, found = later.requires_grad_(), spikes.clone().requires_grad_()
    arguments = (size, stride, padding, dilation, ceil)
    y = pool(expected, *arguments)
    with ReversingTies():
        z = pool(found, *arguments)
    assert torch.equal(z, pool(spikes, *arguments))
    g = torch.rand(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (a,), (b,) = torch.autograd.grad(y, expected, g), torch.autograd.grad(z, found, g)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class Pooled(nn.Module):
    """Convolution, neurons and pooling, with pooling as it is or of the input whose later entries are larger."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = last
        self.conv, self.fc = layer.Conv2d(1, 2, 3, padding=1, step_mode="m"), layer.Linear(18, 3, step_mode="m")
        self.one, self.two = (neuron.IFNode(step_mode="m", surrogate_function=ATAN, v_threshold=0.4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(2 * self.conv(x)).flatten(0, 1)
        if self.last:
            y = y + (1e-12 * torch.arange(36.0).view(6, 6)).to(y)
        return self.two(self.fc(F.max_pool2d(y, 2).view(*x.shape[:2], -1)))


def test_reversed_ties_of_a_network() -> None:
    x = torch.rand(9, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    plain, expected = (adapt(Pooled(last), x, steps=STEPS) for last in (False, True))
    assert max_pools(plain, x[:2]) == 1
    first, found, exact = (dense(hessian(objective(a, x))) for a in (plain, ties_reversed(plain), expected))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8 * float(exact.abs().max()))
    assert (first - exact).abs().max() > 0.01 * exact.abs().max()
