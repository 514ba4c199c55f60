"""Tests of the description of an adapted network, and of replacing and scaling its surrogates."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessian_tools.objective import make_objective
from hessian_tools.operators.curvature import hessian
from ikun.adapters import AdapterError, adapt
from ikun.adapters.base import nothing
from ikun.adapters.summary import described, firing_rates
from ikun.adapters.time.loop import InTime, TimePlan
from ikun.losses import LOSSES
from ikun.surrogates import Surrogate, spike

X = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(0))


def ours(name: str) -> Any:
    surrogate = Surrogate.parse(name)
    return lambda x: spike(x, surrogate)


class Cut(torch.autograd.Function):
    """f' of atan:2, cut off from the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g / (1 + (torch.pi * ctx.saved_tensors[0].detach()).square())


class Neuron(nn.Module):
    """One spike at most; reset is not needed."""

    v_threshold, v_reset, detach_reset = 0.5, None, False

    def __init__(self, surrogate: Any) -> None:
        super().__init__()
        self.surrogate_function = surrogate

    def forward(self, x: Tensor) -> Tensor:
        s: Tensor = self.surrogate_function(x - 0.5)
        return s


def network(first: Any, second: Any, bias: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), Neuron(first), nn.Linear(8, 3), Neuron(second))
    with torch.no_grad():
        net[0].bias.add_(torch.linspace(-2, 2, 8) + bias)
    return net


def product(net: nn.Module, **options: Any) -> Tensor:
    adapted = adapt(net, X, **options)
    objective = make_objective(adapted.model, LOSSES["mse"], (X, Y), dtype=torch.float64, reset=adapted.reset)
    v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return hessian(objective) @ v


def test_only_surrogates_that_cannot_be_used_are_replaced() -> None:
    mixed = network(Cut.apply, ours("sigmoid:4"))
    with pytest.raises(AdapterError, match=r"surrogate Cut .*cut off from the graph"):
        adapt(mixed, X)
    found = adapt(mixed, X, replacement=ours("tanh:2")).surrogates
    assert [(f.replaced, f.verdict.kind) for f in found] == [(True, "opaque"), (False, "exact")]
    torch.testing.assert_close(
        product(mixed, replacement=ours("tanh:2")), product(network(ours("tanh:2"), ours("sigmoid:4")))
    )
    torch.testing.assert_close(
        product(mixed, replacement=ours("tanh:2"), surrogate=ours("erf:1")),
        product(network(ours("erf:1"), ours("erf:1"))),
    )
    with pytest.raises(AdapterError, match="replacement= cannot be used"):
        adapt(mixed, X, replacement=Cut.apply)


def test_slopes_of_the_remaining_surrogates_are_scaled() -> None:
    mixed = network(Cut.apply, ours("sigmoid:4"))
    found = product(mixed, replacement=ours("tanh:2"), steeper=2.0)
    expected = product(network(ours("tanh:2"), ours("sigmoid:8")))
    assert expected.norm() > 0
    torch.testing.assert_close(found, expected)


def test_the_summary_describes_the_network() -> None:
    adapted = adapt(network(ours("atan:2"), ours("atan:2")), X, steps=3)
    said = described(adapted, X)
    expected = {"neuron": "Neuron", "reset": "soft", "detach_reset": False, "threshold": 0.5, "norm": "bn"}
    expected |= {"library": "none", "timesteps": 3, "readout": "mean", "output": "spikes", "coding": "direct"}
    assert {key: said[key] for key in expected} == expected
    assert [(s["name"], s["kind"], s["replaced"]) for s in said["surrogates"]] == [
        ("2.surrogate_function", "exact", False),
        ("4.surrogate_function", "exact", False),
    ]
    plain = described(adapt(nn.Linear(5, 3), X), X)
    assert (plain["neuron"], plain["surrogates"], plain["timesteps"], plain["norm"]) == (None, [], None, "none")


def test_firing_is_counted_by_hand() -> None:
    net = network(ours("atan:2"), ours("atan:2"))
    adapted = adapt(net, X, steps=3)
    net.eval()
    with torch.no_grad():
        first = (net[1](net[0](X)) >= 0.5).double()
        second = (net[3](first.float()) >= 0.5).double()
    found = firing_rates(adapted, X)
    assert list(found) == ["2", "4"]
    for name, spikes in (("2", first), ("4", second)):
        assert found[name]["firing_rate"] == pytest.approx(float(spikes.mean()), rel=1e-12)
        assert found[name]["dead"] == float((spikes.sum(0) == 0).double().mean())
    assert 0 < found["2"]["dead"] < 1
    silent = firing_rates(adapt(network(ours("atan:2"), ours("atan:2"), 9.0), X), X)
    assert silent["2"] == {"firing_rate": 1.0, "dead": 0.0}


def test_the_default_dtype_is_put_back_when_the_last_thread_is_out() -> None:
    inside, leave = threading.Event(), threading.Event()
    seen: list[torch.dtype] = []

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is thread:
                inside.set()
                leave.wait(10)
            else:  # the second in: the first leaves now
                leave.set()
                thread.join(10)
            seen.append(torch.zeros(1).dtype)
            return x

    wrapped = InTime(Waits(), TimePlan(), nothing, None)
    thread = threading.Thread(target=wrapped, args=(X.double(),))
    thread.start()
    inside.wait(10)
    wrapped(X.double())
    assert seen == [torch.float64] * 2
    assert torch.get_default_dtype() == torch.float32
