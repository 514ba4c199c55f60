"""Independent random generators, one per key."""

from __future__ import annotations

import numpy as np
import torch


def stream(*key: int) -> torch.Generator:
    """Return a CPU generator seeded by the integers of `key`. Different keys give independent streams."""
    words = np.random.SeedSequence(key).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))
