"""The entries that max-pooling selects among spikes."""

from __future__ import annotations

import torch
from torch import Tensor


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
    kind = torch.int32 if s[0].numel() < 2**31 else torch.int64
    best = cut[..., ::2, ::2]
    beyond = torch.zeros_like(best, dtype=kind, memory_format=torch.contiguous_format)  # the window's first entry
    for i, j in ((0, 1), (1, 0), (1, 1)):
        entry = cut[..., i::2, j::2]
        better = entry > best if ties == "first" else entry >= best
        best = torch.where(better, entry, best)
        beyond.masked_fill_(better, i * s.shape[-1] + j)
    places = torch.arange(s[0].numel(), device=s.device, dtype=kind).view(s.shape[1:])
    return beyond.add_(places[..., : 2 * height : 2, : 2 * width : 2])
