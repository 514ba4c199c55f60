"""Random numbers and inputs from seeds of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def images(count: int = 64, shape: tuple[int, int, int] = (1, 8, 8)) -> Tensor:
    """Uniform pixels [count, *shape]."""
    return torch.rand(count, *shape, generator=seeded(9))
