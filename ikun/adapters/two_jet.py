"""A surrogate written as its 2-jet, so that any differentiation of it is right and keeps the dtype of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ikun.surrogate_check import Spike


class _Step(torch.autograd.Function):
    """(x, value, f1, f2) -> value, with the derivatives f1 and f2 by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, f1: Tensor, f2: Tensor) -> Tensor:
        ctx.save_for_backward(x, f1, f2)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Slope.apply(g, *ctx.saved_tensors), None, None, None


class _Slope(torch.autograd.Function):
    """(g, x, f1, f2) -> g f1."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, f1: Tensor, f2: Tensor) -> Tensor:
        ctx.save_for_backward(g, f1, f2)
        return g * f1

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> Any:
        g, f1, f2 = ctx.saved_tensors
        return a * f1, a * g * f2 if ctx.needs_input_grad[1] else None, None, None


def two_jet(x: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return `value` with the derivatives `first` and `second` by x, which are constants."""
    y: Tensor = _Step.apply(x, value, first, second)
    return y


class Jet(nn.Module):
    """A surrogate as its spikes and the constants f' and f'' at each of its arguments.

    f' and f'' come from the surrogate's own backward pass, in a separate graph. The network's graph then contains only
    an autograd function that can be differentiated twice by reverse mode. Fused kernels that support only their
    library's surrogates are not used. A surrogate that always returns float32 does not reduce the precision of a
    float64 network.

    Args:
        spikes: The surrogate. Further arguments of a call are passed to it.
        derivatives: A function that can be differentiated twice, whose f' and f'' are used instead.
        steeper: Factor a > 0. The derivative is a f'(a x) instead of f'(x).
    """

    def __init__(self, spikes: Callable[..., Tensor], derivatives: Spike | None = None, steeper: float = 1.0) -> None:
        super().__init__()
        self.spikes = spikes
        self.derivatives = derivatives
        self.steeper = steeper
        self.heard: list[tuple[Tensor, Tensor]] | None = None  # if a list, arguments and spikes of calls are noted

    def forward(self, x: Tensor, *constants: Any) -> Tensor:
        c = x.detach()
        with torch.no_grad():
            value: Tensor = self.spikes(c, *constants).to(x.dtype)
        if self.heard is not None:
            self.heard.append((c, value))
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        return two_jet(x, value, *self.slopes(c, *constants))

    def slopes(self, c: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
        """Return f' and f'' at c."""
        with torch.enable_grad():
            c = c.detach().requires_grad_()
            scaled = self.steeper * c
            y = self.spikes(scaled, *constants) if self.derivatives is None else self.derivatives(scaled)
            (first,) = torch.autograd.grad(y.sum(), c, create_graph=True)
            second = None
            if first.requires_grad:
                (second,) = torch.autograd.grad(first.sum(), c, allow_unused=True)
        return first.detach(), torch.zeros_like(first) if second is None else second.detach()

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the original surrogate, such as `spiking` and `alpha`, which neurons may read."""
        own = name in ("spikes", "derivatives", "heard") or name.startswith("_")
        return super().__getattr__(name) if own else getattr(self.spikes, name)


class Steeper(nn.Module):
    """A surrogate with trained parameters of its own, with the derivatives of f(a x; p) in place of f(x; p).

    It is differentiated by autograd, so that the derivatives by p are kept. The parameters keep their names.

    Args:
        spikes: The surrogate. Further arguments of a call are passed to it.
        steeper: Factor a > 0.
    """

    def __init__(self, spikes: Callable[..., Tensor], steeper: float) -> None:
        super().__init__()
        vars(self)["spikes"] = spikes
        self.steeper = steeper
        if isinstance(spikes, nn.Module):  # not registered as a submodule, which would prefix the names
            self._parameters, self._buffers, self._modules = spikes._parameters, spikes._buffers, spikes._modules

    def forward(self, x: Tensor, *constants: Any) -> Tensor:
        spikes: Callable[..., Tensor] = vars(self)["spikes"]
        scaled = spikes(self.steeper * x, *constants)
        return spikes(x.detach(), *constants).detach() + (scaled - scaled.detach())

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the original surrogate, which neurons may read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(vars(self)["spikes"], name)
