"""Surrogates with trained parameters of their own, with constants, and neurons that cannot be tried by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian
from ikun.adapters import AdapterError, adapt
from ikun.surrogates import Surrogate, spike

X, Y = torch.rand(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
ATAN = Surrogate.parse("atan:2")


class Slope(torch.autograd.Function):
    """A step; its derivatives by v and by the slope a are those of sigmoid(a v)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, a: Any) -> Tensor:
        ctx.save_for_backward(v, torch.as_tensor(a))
        return (v >= 0).to(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        v, a = ctx.saved_tensors
        s = torch.sigmoid(a * v)
        return g * a * s * (1 - s), (g * v * s * (1 - s)).sum().reshape(a.shape) if a.requires_grad else None


class NoGradient(Slope):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Slope.backward(ctx, g)[0], None


class Cut(Slope):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        first, by_a = Slope.backward(ctx, g)
        return first, by_a.detach()


class Width(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.alpha = (function,), nn.Parameter(torch.tensor(2.0))

    def forward(self, v: Tensor) -> Tensor:
        out: Tensor = self.function[0].apply(v, self.alpha)
        return out


class Layer(nn.Module):
    """Three steps of neurons. how: where the surrogate and its parameter are."""

    def __init__(self, how: str, function: Any, width: Any = 2.0) -> None:
        super().__init__()
        self.how, self.hidden = how, (function,)
        if how == "module":
            self.surrogate_function = Width(function)
        else:
            self.alpha = nn.Parameter(torch.tensor(2.0)) if width is None else width
            if how == "attribute":
                self.act = function.apply
            if how == "closure":
                vars(self)["surrogate_function"] = lambda v: function.apply(v, self.alpha)

    def fire(self, v: Tensor) -> Tensor:
        if self.how == "attribute":
            return self.act(v, self.alpha)  # type: ignore[no-any-return]
        if self.how == "name":
            return self.hidden[0].apply(v, self.alpha)  # type: ignore[no-any-return]
        out: Tensor = self.surrogate_function(v)
        return out

    def forward(self, x: Tensor) -> Tensor:
        membrane, total = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(3):
            membrane = 0.5 * membrane + x
            s = self.fire(membrane - 0.5)
            membrane = membrane * (1 - s)
            total = total + s
        return total / 3


def network(how: str, function: Any, width: Any = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), Layer(how, function, width), nn.Linear(6, 3))


def reference(net: nn.Module) -> Tensor:
    net = net.double()
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(nn.functional.cross_entropy(net(X.double()), Y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in flat]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def found(net: nn.Module, **options: Any) -> Any:
    adapted = adapt(net, X, **options)
    return make_objective(
        adapted.model, nn.functional.cross_entropy, (X, Y), dtype=torch.float64, batch_size=5, reset=adapted.reset
    )


@pytest.mark.parametrize("how", ["module", "attribute", "name"])
def test_a_trained_width_keeps_its_derivatives(how: str) -> None:
    objective = found(network(how, Slope))
    expected = reference(network(how, Slope))
    rows = objective.split(expected.abs().sum(1))
    (alpha,) = [r for n, r in zip(objective.parameters, rows, strict=True) if "alpha" in n]
    assert alpha > 1e-3
    torch.testing.assert_close(dense(hessian(objective)), expected, rtol=1e-8, atol=1e-12)


class PerChannel(Slope):
    """The slope a has any shape that broadcasts to that of v."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        v, a = ctx.saved_tensors
        s = torch.sigmoid(a * v)
        return g * a * s * (1 - s), (g * v * s * (1 - s)).sum_to_size(a.shape) if a.requires_grad else None


class PerChannelWrong(PerChannel):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        first, by_a = PerChannel.backward(ctx, g)
        return first, None if by_a is None else 1.5 * by_a


class Flat(PerChannel):
    """f'' is taken as 0."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        v, a = ctx.saved_tensors
        s = torch.sigmoid(a * v).detach()
        return g * a.detach() * s * (1 - s), None


def with_widths(how: str, function: Any, shape: tuple[int, ...], trained: bool = True) -> nn.Sequential:
    net = network(how, function)
    owner: Any = net[1].surrogate_function if how == "module" else net[1]
    widths = 1 + 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1))
    owner.alpha = nn.Parameter(widths, requires_grad=trained)
    if len(shape) == 4:  # a convolution: 2 channels of 3 x 1
        net[0] = nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3, 1)))
        net[2] = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    return net


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1), (1, 2, 1, 1), (1, 2, 3, 1)])
@pytest.mark.parametrize("how", ["module", "attribute", "name"])
def test_widths_per_channel_keep_their_derivatives(how: str, shape: tuple[int, ...], trained: bool) -> None:
    expected = reference(with_widths(how, PerChannel, shape, trained))
    adapted = adapt(with_widths(how, PerChannel, shape, trained), X)
    assert [f.verdict.kind for f in adapted.surrogates] == ["exact"] * (how != "name")
    assert not adapted.warnings
    objective = found(with_widths(how, PerChannel, shape, trained))
    torch.testing.assert_close(dense(hessian(objective)), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 1, 1)])
@pytest.mark.parametrize("how", ["module", "attribute", "name"])
def test_wrong_derivatives_by_widths_per_channel_are_refused(how: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="second derivatives by its own parameters are not those of its gradient"):
        adapt(with_widths(how, PerChannelWrong, shape), X)
    with pytest.raises(AdapterError, match="f'' would be taken as 0"):
        adapt(with_widths(how, Flat, shape, trained=False), X)


@pytest.mark.parametrize("how", ["module", "attribute"])
def test_a_steeper_surrogate_keeps_the_names_and_derivatives_of_its_width(how: str) -> None:
    class Scaled(Slope):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            v, a = ctx.saved_tensors
            s = torch.sigmoid(2 * a * v)
            return g * 2 * a * s * (1 - s), (g * 2 * v * s * (1 - s)).sum()

    objective = found(network(how, Slope), steeper=2.0)
    assert list(objective.parameters) == [n for n, _ in network(how, Slope).named_parameters()]
    torch.testing.assert_close(dense(hessian(objective)), reference(network(how, Scaled)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("how", ["module", "attribute", "name"])
@pytest.mark.parametrize("function", [NoGradient, Cut])
def test_wrong_derivatives_by_a_width_are_refused(how: str, function: Any) -> None:
    with pytest.raises(AdapterError, match="second derivatives by its own parameters are not those of its gradient"):
        adapt(network(how, function), X)


def test_a_width_that_is_not_trained_is_a_constant() -> None:
    net = network("module", NoGradient)
    net[1].surrogate_function.alpha.requires_grad_(False)  # type: ignore[union-attr]
    assert [f.verdict.kind for f in adapt(net, X).surrogates] == ["exact"]


@pytest.mark.parametrize("how", ["attribute", "name"])
def test_a_surrogate_with_a_constant_has_the_hessian_of_the_network(how: str) -> None:
    net = network(how, Slope, 2.0)
    torch.testing.assert_close(dense(hessian(found(net))), reference(network(how, Slope, 2.0)), rtol=1e-8, atol=1e-12)


def test_a_surrogate_with_a_constant_can_be_replaced() -> None:
    other: Callable[[Tensor], Tensor] = lambda v: spike(v, ATAN)  # noqa: E731

    net = network("closure", Slope, 2.0)
    vars(net[1])["surrogate_function"] = other
    expected = reference(net)
    replaced = found(network("attribute", Slope, 2.0), surrogate=other)
    torch.testing.assert_close(dense(hessian(replaced)), expected, rtol=1e-8, atol=1e-12)


def test_a_network_with_binary_outputs_is_not_tried_as_a_neuron() -> None:
    class Net(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b = nn.Linear(5, hidden), nn.Linear(hidden, 5)

        def forward(self, x: Tensor) -> Tensor:
            return Slope.apply(self.b(Slope.apply(self.a(x) - 0.3, 2.0)) - 0.1, 2.0)  # type: ignore[no-any-return]

    for hidden in (5, 12):
        assert adapt(Net(hidden), X).warnings == ()


@pytest.mark.parametrize("seed", range(4))
def test_recurrent_cells_open_with_every_seed(seed: int) -> None:
    norse = pytest.importorskip("norse.torch")
    torch.manual_seed(seed)
    net = norse.SequentialState(norse.LIFRecurrentCell(5, 6), nn.Linear(6, 3), norse.LICell())
    with torch.no_grad():
        for p in net.parameters():
            p.abs_().mul_(30 if p.dim() > 1 else 1)
    assert [f.verdict.kind for f in adapt(net, X, steps=6).surrogates] == ["exact"]


def test_mixed_precision_is_named() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y: Tensor = self.fc(x)
            return y

    with pytest.raises(AdapterError, match=r"mixed precision \(torch.autocast, torch.bfloat16\)"):
        adapt(Cast(), X)


class Large(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (torch.nan if len(x) > 3 else 1)


class Complex(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.complex(y, y)


def test_complex_outputs_are_named() -> None:
    with pytest.raises(AdapterError, match=r"outputs are complex \(torch.complex64\)"):
        adapt(Complex(5, 3), X)


def test_nan_in_larger_batches_is_not_taken_for_coupling() -> None:
    adapt(Large(5, 3), X)  # the checks of the objective name it
