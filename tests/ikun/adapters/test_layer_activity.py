"""Tests of the activity of adapted networks: that of the same network of ours, step by step or all steps at once."""

from __future__ import annotations

import math

import pytest
import torch
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


def test_of_neurons_with_unknown_equations_only_the_firing_is_known() -> None:
    _, theirs = twins("s")
    theirs[4] = Own(tau=1.5, surrogate_function=surrogate.ATan(2.0))
    found = {s.name: s for s in layer_activity(adapt(theirs, X, steps=4), X, Y, LOSSES["mse"])}
    assert list(found) == ["2", "6", "4"]
    assert 0 < found["4"].firing_rate < 1
    assert math.isnan(found["4"].derivative_square)
    assert found["6"].derivative_square > 0
