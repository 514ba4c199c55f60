"""Tests of the autograd function that gives a surrogate exact first and second derivatives."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ikun.adapters.two_jet import Jet
from ikun.surrogates import Surrogate, spike


class Loose(torch.autograd.Function):
    """Fires above 0, float32 whatever it is given; f' of atan:2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g / (1 + (math.pi * ctx.saved_tensors[0]).square())


X = torch.tensor([-1.3, -0.4, 0.0, 0.2, 2.0], dtype=torch.float64)


def test_the_value_and_both_derivatives_are_exact() -> None:
    jet, ours = Jet(Loose.apply), Surrogate.parse("atan:2")
    x = X.clone().requires_grad_()
    y = jet(x)
    assert y.dtype == torch.float64
    assert y.tolist() == [0, 0, 0, 1, 1]
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first.detach(), ours.first(X), rtol=1e-7, atol=0)
    torch.testing.assert_close(second, ours.second(X), rtol=1e-7, atol=1e-12)


def test_derivatives_can_be_replaced_for_the_same_spikes() -> None:
    ours = Surrogate.parse("sigmoid:5")
    jet = Jet(Loose.apply, lambda x: spike(x, ours))
    x = X.clone().requires_grad_()
    y = jet(x)
    assert y.tolist() == [0, 0, 0, 1, 1]  # spike itself would fire at 0
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first.detach(), ours.first(X))
    torch.testing.assert_close(second, ours.second(X))


def test_no_graph_is_kept_without_gradients() -> None:
    jet = Jet(Loose.apply)
    assert not jet(X).requires_grad
    assert jet(X).dtype == torch.float64
    with torch.no_grad():
        assert jet(X.clone().requires_grad_()).tolist() == [0, 0, 0, 1, 1]


def test_neurons_can_ask_the_original() -> None:
    class Own(nn.Module):
        spiking, alpha = True, 3.0

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(Loose.apply(x))

    jet = copy.deepcopy(Jet(Own()))
    assert (jet.spiking, jet.alpha) == (True, 3.0)
    with pytest.raises(AttributeError):
        _ = jet.beta


def test_a_steeper_surrogate_is_the_same_function_of_a_multiple() -> None:
    """a f'(a x): atan:2 twice as steep is atan:4, and the spikes stay."""
    jet, ours = Jet(Loose.apply, steeper=2.0), Surrogate.parse("atan:4")
    x = X.clone().requires_grad_()
    y = jet(x)
    assert y.tolist() == [0, 0, 0, 1, 1]
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first.detach(), ours.first(X), rtol=1e-7, atol=0)
    torch.testing.assert_close(second, ours.second(X), rtol=1e-7, atol=1e-12)
