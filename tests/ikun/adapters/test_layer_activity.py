"""Tests of the activity of adapted networks: that of the same network of ours, step by step or all steps at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ikun.adapters import adapt
from ikun.adapters.layer_activity import layer_activity
from ikun.layer_statistics import observe
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

functional, layer, neuron, surrogate = (
    pytest.importorskip(f"spikingjelly.activation_based.{name}")
    for name in ("functional", "layer", "neuron", "surrogate")
)
X = torch.rand(20, 1, 3, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(20) % 3


@pytest.fixture
def default_double() -> Iterator[None]:
    """Spikes of snnTorch in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def twins(mode: str) -> tuple[Network, nn.Sequential]:
    torch.manual_seed(1)
    ours = Network(Spec("mlp", (1, 3, 4), classes=3, hidden=(8, 7), norm="none", neuron="lif", tau=1.5)).double()
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(3).add_(0.1)

    def lif() -> nn.Module:
        found: nn.Module = neuron.LIFNode(tau=1.5, surrogate_function=surrogate.ATan(2.0))
        return found

    sizes = [(12, 8), (8, 7), (7, 3)]
    parts = [part for size in sizes for part in (layer.Linear(*size, bias=False), lif())]
    theirs = nn.Sequential(layer.Flatten(), *parts).double()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    functional.set_step_mode(theirs, mode)
    return ours, theirs


@pytest.mark.parametrize("mode", ["s", "m"])
def test_the_activity_is_that_of_the_same_network_of_ours(mode: str) -> None:
    ours, theirs = twins(mode)
    expected = observe(ours, X, Y, LOSSES["mse"])
    found = layer_activity(adapt(theirs, X, steps=4), X, Y, LOSSES["mse"])
    assert [s.name for s in found] == ["2", "4", "6"]
    for f, e in zip(found, expected, strict=True):
        assert 0 < f.firing_rate < 1
        for name in ("firing_rate", "dead", "derivative_square", "current_variance", "gradient_square"):
            if name == "current_variance" and f is found[0]:
                continue  # of 4 equal steps here, of one in ours: another divisor
            assert getattr(f, name) == pytest.approx(getattr(e, name), rel=1e-3), name
        for name in ("forward_gain", "backward_gain"):
            a, b = getattr(f, name), getattr(e, name)
            assert (math.isnan(a) and math.isnan(b)) or a == pytest.approx(b, rel=2e-3), name


class Own(neuron.LIFNode):
    """A user's neuron, with other equations."""

    def neuronal_fire(self, v: torch.Tensor | None = None) -> torch.Tensor:
        spikes: torch.Tensor = super().neuronal_fire(v)
        return spikes


def test_of_neurons_with_unknown_equations_the_slope_is_not_known() -> None:
    _, theirs = twins("s")
    theirs[4] = Own(tau=1.5, surrogate_function=surrogate.ATan(2.0))
    found = {s.name: s for s in layer_activity(adapt(theirs, X, steps=4), X, Y, LOSSES["mse"])}
    assert list(found) == ["2", "4", "6"]
    assert 0 < found["4"].firing_rate < 1
    assert found["4"].forward_gain > 0
    assert math.isnan(found["4"].derivative_square)
    assert found["6"].derivative_square > 0


class Steps(nn.Module):
    """A network of snnTorch with its own loop over time."""

    def __init__(self, cell: nn.Module, start: str) -> None:
        super().__init__()
        self.fc, self.cell, self.out, self.start = nn.Linear(12, 5), cell, nn.Linear(5, 3), start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, outputs = getattr(self.cell, self.start)(), []
        state = state if isinstance(state, tuple) else (state,)
        for _ in range(4):
            found = self.cell(self.fc(x.flatten(1)), *state)
            state = found if self.start.startswith("init_r") else found[1:]
            outputs.append(self.out(found[0].to(x.dtype)))
        return torch.stack(outputs)


class Residual(nn.Module):
    """Neurons whose input is also that of the other branch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.cell = nn.Linear(12, 5), neuron.LIFNode(surrogate_function=surrogate.ATan())
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.fc(x.flatten(1))
        found: torch.Tensor = self.out(h + self.cell(h * 1))
        return found


def stepping(kind: str, start: str, **settings: object) -> nn.Module:
    snntorch = pytest.importorskip("snntorch")
    atan = snntorch.surrogate.atan(2.0)
    return Steps(getattr(snntorch, kind)(beta=0.8, spike_grad=lambda v: atan(v).to(v.dtype), **settings), start)


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (lambda: stepping("Leaky", "init_leaky", learn_beta=True, learn_threshold=True), None),
        (lambda: stepping("RSynaptic", "init_rsynaptic", alpha=0.6, linear_features=5), None),
        (lambda: stepping("Alpha", "init_alpha", alpha=0.9), None),
        (Residual, 3),
    ],
    ids=["learned", "recurrent", "unknown equations", "residual"],
)
def test_the_currents_are_those_of_hooks_on_the_librarys_own_forward(
    build: Callable[[], nn.Module], steps: int | None, default_double: None
) -> None:
    torch.manual_seed(2)
    net = build().double()
    net.fc.weight.data.abs_().mul_(2)  # currents that make them fire
    (found,) = layer_activity(adapt(net, X, steps=steps), X, Y, F.cross_entropy)
    currents: list[torch.Tensor] = []
    spikes: list[torch.Tensor] = []

    def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].retain_grad()
        currents.append(args[0])

    net.cell.register_forward_pre_hook(enter)
    net.cell.register_forward_hook(lambda m, args, out: spikes.append(out[0] if isinstance(out, tuple) else out))
    out = net(X).mean(0) if steps is None else torch.stack([net(X) for _ in range(steps)]).mean(0)
    F.cross_entropy(out, Y).backward()
    fired = torch.stack(spikes).detach()
    grads = torch.stack([t.grad for t in currents if t.grad is not None])
    assert 0 < found.firing_rate == pytest.approx(float(fired.mean()))
    assert found.dead == pytest.approx(float((fired.sum((0, 1)) == 0).double().mean()))
    assert found.current_variance == pytest.approx(float(torch.stack(currents).detach().var()))
    assert found.gradient_square == pytest.approx(float(grads.square().mean()), rel=1e-6)
    assert math.isnan(found.derivative_square) == (type(net.cell).__name__ == "Alpha")
