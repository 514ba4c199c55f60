"""Tests of the checks that tell correct surrogates and neurons from wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ikun.surrogate_check import check_neuron, check_surrogate, is_step
from ikun.surrogates import FAMILIES, Surrogate, spike


class Atan(torch.autograd.Function):
    """A right one: f' = 1 / (1 + (pi x)^2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g / (1 + (math.pi * x).square())


class Cut(Atan):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g / (1 + (math.pi * x.detach()).square())


class Once(Atan):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g / (1 + (math.pi * x).square())


class Zero(Atan):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g / (1 + (math.pi * x.detach()).square()) + 0 * x


class Nan(Atan):
    """The unselected branch of a where, as in S2NN."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * torch.where(x < 0, torch.exp(4 * x), 1 / (x + 1))


class Overflow(Atan):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * 25 * torch.exp(-25 * x) / (1 + torch.exp(-25 * x)).square()


class Wrong(Atan):
    """A tensor of the forward pass that is saved is differentiated by the surrogate once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = (x >= 0).to(x.dtype)
        ctx.save_for_backward(s)
        return s

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (s,) = ctx.saved_tensors
        return g * s


class Random(Atan):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * torch.rand_like(x)


class Single(Atan):
    """Right, though it computes in single precision whatever it is given."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (g.float() / (1 + (math.pi * x.float()).square())).to(x.dtype)


KINDS = {
    Atan: "exact",
    Single: "exact",
    Cut: "opaque",
    Once: "opaque",
    Zero: "zero",
    Nan: "nan",
    Overflow: "nan",
    Wrong: "wrong",
    Random: "wrong",
}


@pytest.mark.parametrize(("function", "kind"), KINDS.items(), ids=lambda v: getattr(v, "__name__", v))
def test_every_kind_of_surrogate_gets_its_verdict(function: Any, kind: str) -> None:
    verdict = check_surrogate(function.apply)
    assert verdict.kind == kind
    assert verdict.exact == (not verdict.reason)
    assert is_step(function.apply)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("threshold", "gain"), [(1.0, 1.0), (0.0, 1.0), (0.5, 0.1), (-2.0, 1.0), (15.0, 20.0)])
@pytest.mark.parametrize(("function", "kind"), KINDS.items(), ids=lambda v: getattr(v, "__name__", v))
def test_verdicts_hold_for_a_neuron_of_unknown_threshold(
    function: Any, kind: str, threshold: float, gain: float, dtype: torch.dtype
) -> None:
    def neuron(c: Tensor) -> Tensor:
        return function.apply(gain * c - threshold)[:, None]

    if kind == "nan" and not (function is Nan and threshold == 1):
        return  # their NaN is not where this neuron goes
    assert check_neuron(neuron, dtype).kind == kind


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_ours_is_exact(name: str) -> None:
    for surrogate in (Surrogate.parse(name), Surrogate.parse(name).steeper(5)):
        verdict = check_surrogate(lambda x, s=surrogate: spike(x, s))
        assert verdict.exact
        assert verdict.error < 2e-3


def test_double_backward_is_the_path_that_is_checked() -> None:
    """A jvp of a jvp through an autograd function loses f'' without a word; double backward does not."""

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return (x >= 0).to(x.dtype)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return g / (1 + (math.pi * ctx.saved_tensors[0]).square())

        @staticmethod
        def jvp(ctx: Any, t: Tensor) -> Any:
            return t / (1 + (math.pi * ctx.saved_tensors[0]).square())

    x = torch.tensor(0.3, dtype=torch.float64)
    one = torch.ones_like(x)

    def second(f: Callable[[Tensor], Tensor]) -> float:
        return float(torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (one,))[1], (x,), (one,))[1])

    expected = float(Surrogate.parse("atan:2").second(x))
    assert check_surrogate(Forward.apply).exact
    assert second(Forward.apply) != pytest.approx(expected)
    assert second(lambda y: spike(y, Surrogate.parse("atan:2"))) == pytest.approx(expected)


def test_what_cannot_be_tried_is_unknown() -> None:
    assert check_neuron(lambda c: torch.zeros_like(c)[:, None]).kind == "unknown"
    assert check_neuron(lambda c: Atan.apply(c.cumsum(0) - 1)[:, None]).kind == "unknown"

    def refuses(c: Tensor) -> Tensor:
        raise ValueError("4 dimensions are needed")

    verdict = check_neuron(refuses)
    assert (verdict.kind, verdict.reason) == ("unknown", "it could not be run on its own (4 dimensions are needed)")


def test_a_switched_off_surrogate_is_opaque() -> None:
    verdict = check_surrogate(lambda x: (x >= 0).to(x.dtype))
    assert verdict.kind == "opaque"
    assert "switched off" in verdict.reason


def test_smooth_functions_are_not_taken_for_steps() -> None:
    assert check_surrogate(torch.sigmoid).exact
    assert not is_step(torch.sigmoid)
    assert not is_step(lambda x: torch.bernoulli(x))
