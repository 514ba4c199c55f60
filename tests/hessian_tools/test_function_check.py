"""Second derivatives of custom autograd functions against differences of their backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hessian_tools.checks import ObjectiveError
from hessian_tools.function_check import check_functions
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(3))
Y = torch.arange(24) % 3


class Right(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def slope(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * Right.slope(x)


class Detached(Right):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * Right.slope(x.detach())


class HalfDetached(Right):
    """Only one of two factors is detached."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (Right.slope(x) * 0.5 + Right.slope(x.detach()) * 0.5)


class Stored(Right):
    """The derivative is computed in the forward pass, outside the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = Right.slope(x.detach())
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        slope: Tensor = ctx.slope
        return g * slope


class ThroughNumpy(Right):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(Right.slope(x.detach()).numpy())


class Once(Right):
    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * Right.slope(x)


class WithContext(torch.autograd.Function):
    """The other style of autograd functions, with a second argument and two outputs."""

    @staticmethod
    def forward(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return torch.tanh(scale * x), x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.scale = inputs[1]
        ctx.save_for_backward(output[0].detach() if inputs[1] < 0 else inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        y = x if ctx.scale < 0 else torch.tanh(ctx.scale * x)
        return g * ctx.scale * (1 - y.square()) + 2 * h, None


class Spike(torch.autograd.Function):
    """A step whose surrogate derivative is of one of several kinds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.kind == "straight":
            return g, None
        if ctx.kind == "rect":
            return g * (x.abs() < 0.5).to(x), None
        if ctx.kind == "triangle":
            return g * (1 - x.abs()).clamp_min(0), None
        return g / (1 + x.square()), None


class Net(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.function = nn.Linear(5, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.function(self.a(x)))
        return out


def objective(function: Any, dtype: torch.dtype = torch.float64) -> Objective:
    return make_objective(Net(function), F.cross_entropy, (X, Y), dtype=dtype)


WRONG = {
    "detached": Detached.apply,
    "half detached": HalfDetached.apply,
    "stored": Stored.apply,
    "numpy": ThroughNumpy.apply,
    "context": lambda x: -WithContext.apply(x, -1.0)[0],
    "two layers": lambda x: Detached.apply(Right.apply(x)),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_with_a_wrong_second_derivative_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ObjectiveError, match=r"second derivative of the autograd function \w+ is wrong"):
        objective(WRONG[name], dtype)


def test_functions_that_can_be_differentiated_once_are_refused() -> None:
    with pytest.raises(ObjectiveError, match="autograd function Once"):
        objective(Once.apply)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_functions_have_the_hessian_of_their_formula(dtype: torch.dtype) -> None:
    for function, formula in ((Right.apply, F.silu), (lambda x: WithContext.apply(x, 1.0)[0], torch.tanh)):
        found, wanted = (dense(hessian(objective(f, dtype))) for f in (function, formula))
        assert (found - wanted).norm() <= (1e-12 if dtype == torch.float64 else 1e-5) * wanted.norm()


@pytest.mark.parametrize("kind", ["straight", "rect", "triangle", "arctangent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_surrogate_derivatives_pass(kind: str, dtype: torch.dtype) -> None:
    made = objective(lambda x: Spike.apply(x, kind), dtype)
    assert made.value_and_gradient()[1].norm() > 0
    assert Spike.forward.__qualname__ == "Spike.forward"  # as before


def test_a_kink_at_an_input_does_not_refuse_a_surrogate() -> None:
    model = Net(lambda x: Spike.apply(x, "rect"))
    with torch.no_grad():
        model.a.weight.zero_()
        model.a.bias.fill_(0.5)  # every input lies on the jump of the derivative
    make_objective(model, F.cross_entropy, (X, Y), dtype=torch.float64)


def test_functions_are_found_in_graphs_of_many_steps() -> None:
    """Torch frees a graph whose nodes Python has seen by recursion, which is too deep here."""

    def forward(function: Any) -> Tensor:
        h = function(torch.ones(3, requires_grad=True))
        outputs = []
        for _ in range(40_000):
            h = h * 0.999 + 1e-3
            outputs.append(h)
        return torch.stack(outputs).mean(0)

    check_functions(lambda: forward(Right.apply))
    with pytest.raises(ObjectiveError, match="second derivative of the autograd function Detached"):
        check_functions(lambda: forward(Detached.apply))
