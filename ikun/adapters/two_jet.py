"""A surrogate written as its own 2-jet, so that it can be differentiated in any way, in the dtype of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ikun.surrogate_check import Spike


class Jet(nn.Module):
    """The same spikes s(c), f'(c) and f''(c), as s(c) + e (f'(c) + e f''(c) / 2) with e = x - c at the constant c = x.

    Both derivatives come from the surrogate's own backward pass, on a graph beside the network's. What is gained:
    nothing of the network goes through an autograd function any more (which fails in torch.func and loses f'' in a jvp
    of a jvp), kernels that know only their own surrogates are not used, and a surrogate that returns float32 whatever
    it is given does not spoil a network in float64. With `derivatives`, a function differentiable twice, its f' and f''
    are taken instead: the spikes stay those of `spikes`. steeper: a f'(a x) takes the place of f'(x).
    """

    def __init__(self, spikes: Spike, derivatives: Spike | None = None, steeper: float = 1.0) -> None:
        super().__init__()
        self.spikes = spikes
        self.derivatives = derivatives
        self.steeper = steeper

    def forward(self, x: Tensor) -> Tensor:
        c = x.detach()
        with torch.no_grad():
            value = self.spikes(c).to(x.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        first, second = self._slopes(c)
        e = x - c
        return value + e * (first + 0.5 * e * second)

    def _slopes(self, c: Tensor) -> tuple[Tensor, Tensor]:
        c = c.detach().requires_grad_()
        (first,) = torch.autograd.grad((self.derivatives or self.spikes)(self.steeper * c).sum(), c, create_graph=True)
        second = None
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), c, allow_unused=True)
        return first.detach(), torch.zeros_like(first) if second is None else second

    def __getattr__(self, name: str) -> Any:
        """What neurons ask their surrogate for (`spiking`, `alpha`) is answered by the original."""
        own = name in ("spikes", "derivatives") or name.startswith("_")
        return super().__getattr__(name) if own else getattr(self.spikes, name)
