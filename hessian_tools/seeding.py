"""Independent streams of random numbers, one per key."""

from __future__ import annotations

import numpy as np
import torch


def stream(*key: int) -> torch.Generator:
    """An independent stream of random numbers for every key."""
    words = np.random.SeedSequence(key).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))
