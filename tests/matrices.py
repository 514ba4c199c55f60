"""Matrices whose eigenvalues are known."""

from __future__ import annotations

import numpy as np
import torch

from hessian_tools.operators.base import Dense


def laplacian(n: int = 400) -> tuple[Dense, np.ndarray]:
    """The path Laplacian with fixed ends: eigenvalues 2 - 2 cos(k pi / (n + 1)), ascending; determinant n + 1."""
    side = -torch.ones(n - 1, dtype=torch.float64)
    matrix = 2 * torch.eye(n, dtype=torch.float64) + torch.diag(side, 1) + torch.diag(side, -1)
    return Dense(matrix), 2 - 2 * np.cos(np.arange(1, n + 1) * np.pi / (n + 1))
