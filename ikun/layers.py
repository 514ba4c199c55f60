"""Network layers that torch does not provide: pooling of spikes, dropout over time, residual branches, recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaxPool(nn.Module):
    """2 x 2 max-pooling over the last two axes with a fixed tie rule.

    Spikes tie in most windows, and the maximum has no derivative at a tie. Here the entry that is selected at the
    current values carries all derivatives: the first (or last) of the largest entries in row-major order.

    Args:
        ties: "first" or "last", the entry of a window that is selected among equal ones.
    """

    def __init__(self, ties: str = "first") -> None:
        super().__init__()
        self.ties = ties

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled tensor [..., H // 2, W // 2] for x [..., H, W]."""
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        x = x[..., : 2 * height, : 2 * width]
        entries = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]  # row-major order of the window
        if self.ties == "last":
            entries.reverse()
        best = entries[0]
        for entry in entries[1:]:  # torch.where passes derivatives only to the selected entry
            best = torch.where(entry.detach() > best.detach(), entry, best)
        return best


class Dropout(nn.Dropout):
    """Dropout for x [T, N, ...] that drops a unit of a sample at all time steps or at none.

    This is the behaviour of SpikingJelly's layer.Dropout.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x with dropped units set to 0 in training mode, and x itself otherwise."""
        return x * F.dropout(torch.ones_like(x[0]), self.p) if self.training else x


class Branch(nn.Module):
    """Marks the start of a residual branch: its input is added to the output at the next `Add`."""


class Add(nn.Module):
    """Marks the end of a residual branch. See `Branch`."""


class Recurrent(nn.Linear):
    """The recurrent weights V [M, M] of the M neurons that follow this layer, without bias.

    At step t, V s[t-1] is added to the input current of the neurons.

    Args:
        size: The number of neurons M.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, size, bias=False)
