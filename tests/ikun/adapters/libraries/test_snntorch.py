"""Tests of networks of snnTorch against ours where the dynamics are the same."""

from __future__ import annotations

import functools
from typing import Any

import adapted_networks
import pytest
import torch
from adapted_networks import X, Y, products
from torch import Tensor, nn

from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense, symmetry_error
from hessian_tools.operators.curvature import ggn, hessian
from ikun.adapters import AdapterError, adapt
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.surrogates import Surrogate, spike

snn = pytest.importorskip("snntorch")
surrogate = pytest.importorskip("snntorch.surrogate")

STEPS = 5


def small(beta: float = 1.0, **settings: Any) -> nn.Sequential:
    """Input currents below the threshold, so that no neuron is above it still after its reset."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 8, bias=False),
        snn.Leaky(beta, init_hidden=True, **settings),
        nn.Linear(8, 3, bias=False),
        snn.Leaky(beta, init_hidden=True, output=True, **settings),
    )
    with torch.no_grad():
        net[0].weight.abs_().mul_(1.2)
        net[2].weight.abs_().mul_(0.8)
    return net


objective_of = functools.partial(adapted_networks.objective_of, library="snntorch")


@pytest.mark.parametrize("mechanism", ["subtract", "zero"])
@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("beta", [1.0, 0.75])
def test_leaky_agrees_with_our_lif(mechanism: str, delay: bool, beta: float) -> None:
    """A delayed reset carries no derivative, a prompt one does. Ours divides the input by tau = 1 / (1 - beta), so that
    its weights are tau times theirs and its Hessian is theirs over tau squared."""
    if beta < 1 and mechanism == "subtract" and delay:
        return  # what is subtracted does not leak: no neuron of ours does that, see the next test
    theirs = small(beta, reset_mechanism=mechanism, reset_delay=delay)
    spec: dict[str, Any] = {"reset": "soft" if mechanism == "subtract" else "hard", "detach_reset": delay}
    if beta < 1:
        spec |= {"neuron": "lif", "tau": 1 / (1 - beta)}
    tau = 1 / (1 - beta) if beta < 1 else 1.0
    ours = Network(
        Spec(model="mlp", input_shape=(1, 1, 5), hidden=(8,), classes=3, norm="none", timesteps=STEPS, **spec)
    )
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.data.copy_(tau * q.data)
    expected = make_objective(ours, LOSSES["mse"], (X.view(6, 1, 1, 5), Y), dtype=torch.float64)
    found = objective_of(theirs, steps=STEPS)
    rates = found.outputs(X.double())
    torch.testing.assert_close(rates, expected.outputs(X.view(6, 1, 1, 5).double()))
    assert 0.05 < rates.mean() < 0.9
    for operator in (hessian, ggn):
        v = torch.randn(found.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        image = operator(expected) @ v * tau**2
        assert (operator(found) @ v - image).norm() < 1e-11 * image.norm()


def test_the_default_neuron_agrees_with_its_equations() -> None:
    """U[t] = beta U[t-1] + I[t] - S[t-1] threshold, the last S without a derivative; beta and threshold learned."""
    theirs = small(0.9, learn_beta=True, learn_threshold=True)
    found = objective_of(theirs, steps=STEPS)
    atan = Surrogate.parse("atan:2")
    order = ["0.weight", "1.threshold", "1.beta", "2.weight", "3.threshold", "3.beta"]
    assert list(found.parameters) == order

    def loss(w: Tensor) -> Tensor:
        p = dict(zip(order, found.split(w), strict=True))
        u1, u2, rates = torch.zeros(6, 8).double(), torch.zeros(6, 3).double(), torch.zeros(6, 3).double()
        s1, s2 = torch.zeros_like(u1), torch.zeros_like(u2)
        for _ in range(STEPS):
            u1 = p["1.beta"] * u1 + X.double() @ p["0.weight"].T - s1.detach() * p["1.threshold"]
            s1 = spike(u1 - p["1.threshold"], atan)
            u2 = p["3.beta"] * u2 + s1 @ p["2.weight"].T - s2.detach() * p["3.threshold"]
            s2 = spike(u2 - p["3.threshold"], atan)
            rates = rates + s2 / STEPS
        return LOSSES["mse"](rates, Y)

    expected = torch.autograd.functional.hessian(loss, found.weights())
    assert found.value_and_gradient()[0] == pytest.approx(float(loss(found.weights())), rel=1e-12)
    assert all(part.norm() > 0 for part in found.split(expected.abs().sum(1)))
    torch.testing.assert_close(dense(hessian(found)), expected, rtol=1e-9, atol=1e-13)


class Tutorial(nn.Module):
    """As in snnTorch's tutorials: the model loops over time itself and returns (spikes, membranes)."""

    def __init__(self, lists: bool = False) -> None:
        super().__init__()
        inner = small(0.9, learn_beta=True, learn_threshold=True)
        self.fc1, self.fc2, self.lists = inner[0], inner[2], lists
        self.lif1, self.lif2 = (snn.Leaky(0.9, learn_beta=True, learn_threshold=True) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        one, two = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, membranes = [], []
        for _ in range(STEPS):
            hidden, one = self.lif1(self.fc1(x), one)
            out, two = self.lif2(self.fc2(hidden), two)
            spikes.append(out)
            membranes.append(two)
        return (spikes, membranes) if self.lists else (torch.stack(spikes), torch.stack(membranes))


def test_a_model_with_its_own_loop_agrees() -> None:
    model = Tutorial()
    model(X)  # leaves a state that hangs on a graph
    found = objective_of(model)
    assert set(found.parameters) == {f"lif{i}.{n}" for i in (1, 2) for n in ("beta", "threshold")} | {
        "fc1.weight",
        "fc2.weight",
    }  # and no state
    by_step = objective_of(small(0.9, learn_beta=True, learn_threshold=True), steps=STEPS)
    torch.testing.assert_close(found.outputs(X.double()), by_step.outputs(X.double()))
    matrix = dense(hessian(found))
    assert (matrix - matrix.T).abs().max() < 1e-13 * matrix.abs().max()
    order = ["fc1.weight", "lif1.beta", "lif1.threshold", "fc2.weight", "lif2.beta", "lif2.threshold"]
    names = dict(zip(["0.weight", "1.beta", "1.threshold", "2.weight", "3.beta", "3.threshold"], order, strict=True))
    place = dict(zip(found.parameters, found.split(torch.arange(found.size)), strict=True))
    index = torch.cat([place[names[n]].reshape(-1) for n in by_step.parameters])
    torch.testing.assert_close(matrix[index][:, index], dense(hessian(by_step)))


@pytest.mark.parametrize("readout", ["mean", "sum", "last", "max"])
@pytest.mark.parametrize("output", ["spikes", "membrane"])
@pytest.mark.parametrize("lists", [False, True])
def test_outputs_and_readouts_are_those_asked_for(output: str, readout: str, lists: bool) -> None:
    model = Tutorial(lists)
    raw = model(X)[0 if output == "spikes" else 1]
    series = torch.stack(raw) if lists else raw
    expected = {"mean": series.mean(0), "sum": series.sum(0), "last": series[-1], "max": series.amax(0)}[readout]
    adapted = adapt(model, X, output=output, readout=readout)
    torch.testing.assert_close(adapted.model(X), expected)


def test_double_precision_in_spite_of_float_spikes() -> None:
    op = hessian(objective_of(small(0.9), steps=STEPS))
    assert op.dtype == torch.float64
    assert symmetry_error(op, torch.Generator().manual_seed(0)) < 1e-14


def test_nested_neurons_are_cleared() -> None:
    """snntorch.utils.reset sees only direct children."""
    inner = small()
    nested = nn.Sequential(nn.Sequential(*inner[:2]), nn.Sequential(*inner[2:]))
    torch.testing.assert_close(products(objective_of(nested, steps=STEPS)), products(objective_of(inner, steps=STEPS)))


@pytest.mark.parametrize("name", ["Synaptic", "Alpha", "Lapicque", "RLeaky", "RSynaptic", "SLSTM"])
def test_other_neurons_give_a_symmetric_hessian(name: str) -> None:
    torch.manual_seed(0)
    arguments: dict[str, tuple[Any, ...]] = {"Synaptic": (0.5, 0.9), "Alpha": (0.9, 0.8), "RSynaptic": (0.5, 0.9)}

    def made(size: int, **more: Any) -> nn.Module:
        settings = {"linear_features": size} if name in ("RLeaky", "RSynaptic") else {}
        rates = (size, size) if name == "SLSTM" else arguments.get(name, (0.9,))
        built: nn.Module = getattr(snn, name)(*rates, init_hidden=True, **settings, **more)
        return built

    net = nn.Sequential(nn.Linear(5, 8), made(8), nn.Linear(8, 3), made(3, output=True))
    with torch.no_grad():
        net[0].weight.abs_().mul_(3)
    op = hessian(objective_of(net, steps=STEPS))
    assert symmetry_error(op, torch.Generator().manual_seed(0)) < 1e-12
    assert (op @ torch.ones(op.shape[0])).abs().max() > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heaviside", "heaviside .*f'' differs from the derivative of f'.*give replacement="),
        ("sigmoid", r"sigmoid\(slope=25\) .*not finite at -5 in float32"),
        ("SSO", "SSO.*its derivative is random"),
    ],
)
def test_surrogates_that_cannot_be_used_are_refused(name: str, message: str) -> None:
    net = small(0.9, spike_grad=getattr(surrogate, name)())
    with pytest.raises(AdapterError, match=message):
        adapt(net, X, steps=STEPS)
    cured = objective_of(net, steps=STEPS, surrogate=lambda x: spike(x, Surrogate.parse("atan:2")))
    torch.testing.assert_close(products(cured), products(objective_of(small(0.9), steps=STEPS)))


def test_slopes_of_one_function_are_told_apart() -> None:
    net = small(0.9)
    net[1].spike_grad, net[3].spike_grad = surrogate.fast_sigmoid(25), surrogate.fast_sigmoid(5)
    labels = [found.label for found in adapt(net, X, steps=STEPS).surrogates]
    assert labels == ["fast_sigmoid(slope=25)", "fast_sigmoid(slope=5)"]


def test_a_disabled_surrogate_says_so() -> None:
    with pytest.raises(AdapterError, match="is the surrogate switched off"):
        adapt(small(0.9, surrogate_disable=True), X, steps=STEPS)


def test_a_forward_that_wants_the_membrane_is_explained() -> None:
    class Handed(Tutorial):
        def forward(self, x: Tensor, membrane: Tensor) -> Tensor:
            return x + membrane

    with pytest.raises(AdapterError, match=r"fails on inputs of shape \[2, 5\].*missing 1 required.*'membrane'"):
        adapt(Handed(), X, steps=STEPS)
