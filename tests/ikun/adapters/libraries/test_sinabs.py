"""Tests of Sinabs' layers: outputs to the last bit, Hessian products against double backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from node_oracle import X, Y, compare, double_backward, objective
from torch import Tensor, nn

from hessian_tools.operators.curvature import hessian
from ikun.adapters import adapt
from ikun.surrogates import Surrogate, spike

layers, activation = pytest.importorskip("sinabs.layers"), pytest.importorskip("sinabs.activation")
SMOOTH = activation.SingleExponential(grad_width=0.5, grad_scale=0.5)  # piecewise_exp:1 / (0.5 threshold)
NODE = "its equations are not those of the kernels"


def network(cls: Any, **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    settings = {"surrogate_grad_fn": SMOOTH, "spike_fn": activation.SingleSpike, **settings}
    more = [{}, {}]
    if cls.__name__.endswith("Recurrent"):
        more = [{"rec_connect": nn.Linear(n, n)} for n in (6, 3)]
    net = nn.Sequential(nn.Linear(5, 6), cls(**settings, **more[0]), nn.Linear(6, 3), cls(**settings, **more[1]))
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(2)
    return net


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("IAF", {}, ""),
    ("IAF", {"tau_syn": 3.0, "reset_fn": activation.MembraneReset(0.0)}, ""),
    ("LIF", {"tau_mem": 4.0, "spike_threshold": torch.tensor(0.4)}, ""),
    ("LIF", {"tau_mem": 4.0, "tau_syn": 3.0, "norm_input": False, "train_alphas": True}, ""),
    ("LIF", {"tau_mem": 4.0, "surrogate_grad_fn": activation.Gaussian(), "spike_threshold": torch.tensor(0.3)}, ""),
    (
        "LIF",
        {"tau_mem": 4.0, "spike_fn": activation.MultiSpike, "norm_input": False},
        "it fires several spikes in a step",
    ),
    ("LIF", {"tau_mem": 4.0, "norm_input": False, "min_v_mem": -1.0}, "its potential is bounded, or recorded"),
    ("LIFRecurrent", {"tau_mem": 4.0, "norm_input": False}, NODE),
    ("ALIF", {"tau_mem": 4.0, "tau_adapt": 4.0, "spike_threshold": 0.2}, NODE),
]


@pytest.mark.parametrize(("kind", "settings", "reason"), CASES)
def test_the_derivatives_are_those_of_the_equations(kind: str, settings: dict[str, Any], reason: str) -> None:
    error = 1e-6 if kind == "ALIF" else 1e-10  # ALIF computes in single precision in between
    net = network(getattr(layers, kind), **settings)
    assert compare(net, rates=(0.005, 3), error=error) == {"1": reason, "3": reason}


class ByHand(nn.Module):
    """The equations of a network of LIF layers, with a surrogate that can be differentiated twice."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Any = [x] * 4
        for linear, layer in ((self.net[0], self.net[1]), (self.net[2], self.net[3])):
            a = torch.exp(-1 / layer.tau_mem)  # type: ignore[operator]
            v: Any = 0.0
            spikes = []
            for current in y:
                v = a * v + (1 - a) * linear(current)
                s = spike(v - 0.4, Surrogate("piecewise_exp", 5.0))
                v = v - 0.4 * s
                spikes.append(s)
            y = spikes
        return torch.stack(y).mean(0)


def test_a_leaky_layer_has_the_derivatives_of_its_equations() -> None:
    """The library's own double backward loses f''."""
    net = network(layers.LIF, tau_mem=4.0, spike_threshold=torch.tensor(0.4, dtype=torch.float64)).double()
    a = objective(adapt(net, X.double(), steps=4))
    b = objective(adapt(ByHand(net), X.double(), library="none"))
    assert a.size == b.size
    torch.testing.assert_close(a.outputs(X.double()), b.outputs(X.double()))
    v = torch.randn(a.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = double_backward(b, v)
    assert (hessian(a) @ v - expected).norm() < 1e-10 * expected.norm()
    assert len(Y) == 9


def test_another_batch_size_starts_from_rest() -> None:
    model = adapt(network(layers.IAF), X, steps=4).model
    torch.testing.assert_close(torch.cat([model(X[:4]), model(X[4:])]), model(X))
