"""Max-pooling of spikes and the mean over time, as layers of a curvature product.

`Selection` and `TimeMean` implement `hessian_tools.chain.layers.Layer`. Both are linear, so the tangent of the
adjoint is the adjoint itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ikun.layers import MaxPool


def selection(s: Tensor, ties: str) -> Tensor:
    """Return the positions of the entries that MaxPool selects.

    Args:
        s: Spikes [T, N, C, H, W].
        ties: Tie rule of the pooling, "first" or "last".

    Returns:
        Positions in the flattened [N C H W] of each step.
    """
    height, width = s.shape[-2] // 2, s.shape[-1] // 2
    cut = s[..., : 2 * height, : 2 * width]
    windows = torch.stack([cut[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
    best, chosen = windows[0], torch.zeros_like(windows[0], dtype=torch.int32)
    for k in range(1, 4):
        better = windows[k] > best if ties == "first" else windows[k] >= best
        best = torch.where(better, windows[k], best)
        chosen.masked_fill_(better, k)
    kind = torch.int32 if s[0].numel() < 2**31 else torch.int64
    places = torch.arange(s[0].numel(), device=s.device, dtype=kind).view(s.shape[1:])
    corners = places[..., : 2 * height : 2, : 2 * width : 2]
    return corners + (chosen // 2) * s.shape[-1] + chosen % 2


@dataclass(frozen=True)
class Selection:
    """Max-pooling as a layer of its own, which selects fixed entries of its input.

    Attributes:
        places: Positions of the selected entries in the flattened input [Q].
        shapes: Shapes of input and output, [T N, C, H, W].
        parameters: Always empty.
    """

    places: Tensor
    shapes: tuple[torch.Size, torch.Size]
    parameters: tuple[Tensor, ...] = ()

    def tangent(self, dx: Tensor, dp: object) -> Tensor:
        return dx.flatten()[self.places].view(self.shapes[1])

    def adjoint(self, g: Tensor, want: object, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        return g.new_zeros(self.shapes[0].numel()).scatter_(0, self.places, g.flatten()).view(self.shapes[0]), ()

    def adjoint_tangent(self, dg: Tensor, dx: object, dp: object, want: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.adjoint(dg, want, False)


def select(pool: MaxPool, x: Tensor) -> tuple[Tensor, Selection]:
    """Max-pool an input that does not come directly from spiking neurons.

    Args:
        pool: The pooling.
        x: Input [T N, C, H, W].

    Returns:
        The pooled input and the layer at x.
    """
    y = pool(x)
    return y, Selection(selection(x[None], pool.ties).flatten().long(), (x.shape, y.shape))


def time_mean(steps: int, total: int, s: Tensor) -> tuple[Tensor, TimeMean]:
    """Return the contribution of some time steps to the mean over time.

    Args:
        steps: Number of these time steps.
        total: Number of all time steps.
        s: Spikes at these steps [steps N, K].

    Returns:
        The contribution [N, K] and the layer.
    """
    mean = TimeMean(steps, total)
    return mean.tangent(s, ()), mean


@dataclass(frozen=True)
class TimeMean:
    """The mean over time as a layer, or the contribution of a time segment to it.

    Attributes:
        steps: Number of time steps of the segment.
        total: Number of all time steps.
        parameters: Always empty.
    """

    steps: int
    total: int
    parameters: tuple[Tensor, ...] = ()

    def tangent(self, dx: Tensor, dp: object) -> Tensor:
        return dx.reshape(self.steps, -1, *dx.shape[1:]).sum(0) / self.total

    def adjoint(self, g: Tensor, want: object, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        return (g / self.total).repeat(self.steps, *(1,) * (g.dim() - 1)), ()

    def adjoint_tangent(self, dg: Tensor, dx: object, dp: object, want: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.adjoint(dg, want, False)
