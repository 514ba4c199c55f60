"""Layers of a network beside torch's own and the neurons: pooling, dropout over time, residual branches, recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaxPool(nn.Module):
    """2 x 2 max-pooling over the last two axes with a frozen tie rule.

    Spikes tie in most windows, where the maximum has no derivative; the entry selected at the current values, first
    (or last) in row-major order, is the one that carries all derivatives.
    """

    def __init__(self, ties: str = "first") -> None:
        super().__init__()
        self.ties = ties

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        x = x[..., : 2 * height, : 2 * width]
        entries = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]  # row-major order of the window
        if self.ties == "last":
            entries.reverse()
        best = entries[0]
        for entry in entries[1:]:  # torch.where passes derivatives to the selected entry alone
            best = torch.where(entry.detach() > best.detach(), entry, best)
        return best


class Dropout(nn.Dropout):
    """x [T, N, ...]: a unit of a sample is dropped at all steps or at none, as SpikingJelly's layer.Dropout does it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * F.dropout(torch.ones_like(x[0]), self.p) if self.training else x


class Branch(nn.Module):
    """Where a residual branch begins: what enters here is added to the outputs of the layers up to the next Add."""


class Add(nn.Module):
    """Where a residual branch ends."""


class Recurrent(nn.Linear):
    """V [M, M] of the M neurons behind it, without bias: V s[t-1] is added to their current at step t."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size, bias=False)
