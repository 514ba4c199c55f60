"""Samples taken for time steps, and a missing number of steps, are refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian
from ikun.adapters import AdapterError, adapt
from ikun.surrogates import Surrogate, spike

ATAN = Surrogate.parse("atan:2")
X, Y = torch.rand(8, 4, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Spiking(nn.Module):
    """A layer that runs its own loop over the axis of time, with a hard reset."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.surrogate_function = lambda v: spike(v, ATAN)

    def forward(self, x: Tensor) -> Tensor:
        membrane, out = torch.zeros_like(x.select(self.axis, 0)), []
        for current in x.unbind(self.axis):
            membrane = 0.5 * membrane + current
            s = self.surrogate_function(membrane - 1.0)
            membrane = membrane * (1 - s)
            out.append(s)
        return torch.stack(out, self.axis)


def network(axis: int, gain: float = 4.0) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), Spiking(axis), nn.Linear(6, 3))
    with torch.no_grad():
        net[0].weight.mul_(gain)  # type: ignore[operator]
    return net


def expected() -> Tensor:
    """The dense Hessian by double backward of the network itself."""
    net = network(0).double()
    parameters = list(net.parameters())
    outputs = net(X.double().transpose(0, 1)).mean(0)
    gradient = torch.autograd.grad(nn.functional.cross_entropy(outputs, Y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in flat]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def found(axis: int, **options: Any) -> Tensor:
    adapted = adapt(network(axis), X, steps=4, sequences=True, **options)
    objective = make_objective(
        adapted.model, nn.functional.cross_entropy, (X, Y), dtype=torch.float64, reset=adapted.reset, batch_size=3
    )
    return dense(hessian(objective))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("library", ["none", "spikingjelly"])
def test_layers_with_a_loop_of_their_own_have_the_hessian_of_the_network(axis: int, library: str) -> None:
    torch.testing.assert_close(found(axis, time_first=axis == 0, library=library), expected(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("gain", [4.0, 0.01])  # silent neurons too, whose outputs are all alike
def test_samples_taken_for_time_are_refused(gain: float) -> None:
    with pytest.raises(AdapterError, match=r"takes samples for time steps: give time_first=True"):
        adapt(network(0, gain), X, steps=4, sequences=True)
    with pytest.raises(AdapterError, match=r"takes samples for time steps: give time_first=True"):
        adapt(network(0, gain), X, steps=4, sequences=True, time_first=False)
    with pytest.raises(AdapterError, match=r"takes samples for time steps: give time_first=True"):
        adapt(network(0, gain), X, steps=4, sequences=True, reset=lambda model: None)


def test_without_a_number_of_steps() -> None:
    spikingjelly = pytest.importorskip("spikingjelly.activation_based")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")

    def net(mode: str) -> nn.Module:
        made = nn.Sequential(spikingjelly.layer.Linear(5, 3), spikingjelly.neuron.IFNode())
        functional.set_step_mode(made, mode)
        return made

    with pytest.raises(AdapterError, match="the layers take the samples for time steps: give steps="):
        adapt(net("m"), X[:, 0])
    with pytest.raises(AdapterError, match="one call of the network is one time step: give steps="):
        adapt(net("s"), X[:, 0])
    with pytest.raises(AdapterError, match=r"outputs of shape \[3, 4, 3\]: .*give steps= and sequences=True"):
        adapt(net("s"), X)
    assert adapt(net("s"), X[:, 0], steps=1).plan.steps == 1
