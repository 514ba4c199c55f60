"""A surrogate written as its 2-jet, so that any differentiation of it is right and keeps the dtype of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ikun.surrogate_check import Spike


class Jet(nn.Module):
    """A surrogate as s(c) + e (f'(c) + e f''(c) / 2), where c is the value of x as a constant and e = x - c.

    It has the spikes s and the derivatives f' and f'' of the surrogate. f' and f'' come from the surrogate's own
    backward pass, in a separate graph. This has three advantages. The network's graph contains no autograd functions,
    which fail in torch.func and lose f'' in a jvp of a jvp. Fused kernels that support only their library's surrogates
    are not used. A surrogate that always returns float32 does not reduce the precision of a float64 network.

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

    def forward(self, x: Tensor, *constants: Any) -> Tensor:
        c = x.detach()
        with torch.no_grad():
            value: Tensor = self.spikes(c, *constants).to(x.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        first, second = self._slopes(c, constants)
        e = x - c
        return value + e * (first + 0.5 * e * second)

    def _slopes(self, c: Tensor, constants: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Return f' and f'' at c."""
        c = c.detach().requires_grad_()
        scaled = self.steeper * c
        y = self.spikes(scaled, *constants) if self.derivatives is None else self.derivatives(scaled)
        (first,) = torch.autograd.grad(y.sum(), c, create_graph=True)
        second = None
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), c, allow_unused=True)
        return first.detach(), torch.zeros_like(first) if second is None else second

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the original surrogate, such as `spiking` and `alpha`, which neurons may read."""
        own = name in ("spikes", "derivatives") or name.startswith("_")
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
