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
