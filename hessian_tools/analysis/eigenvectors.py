"""What an eigenvector of a network's curvature looks like: which layers and weights it moves, and the gradient in it.

Vectors are orthonormal columns [P, k] in float64. Nothing here holds a second array of that size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessian_tools.objective import Objective


def layer_shares(objective: Objective, vectors: Tensor) -> list[dict[str, float]]:
    """Share of every parameter in the squared norm of each column of [P, k]."""
    masses = torch.stack([_masses(objective, v) for v in vectors.unbind(1)])
    return [dict(zip(objective.parameters, row, strict=True)) for row in masses.tolist()]


def _masses(objective: Objective, v: Tensor) -> Tensor:
    """Squared norms [parameters] of a vector's parts, summing to 1."""
    masses = torch.stack([part.square().sum() for part in v.split([p.numel() for p in objective.parameters.values()])])
    return masses / masses.sum()


def participation(vectors: Tensor) -> Tensor:
    """1 / (P sum v_i^4) [k] for unit columns of [P, k]: 1 if all weights take part alike, 1/P for a single one.

    The inverse participation ratio, normalized by P (Bell & Dean, Discuss. Faraday Soc. 50, 1970).
    """
    fourth = torch.stack([v.square().square().sum() for v in vectors.unbind(1)])
    return 1 / (len(vectors) * fourth)


def gradient_shares(gradient: Tensor, vectors: Tensor) -> Tensor:
    """Squared cosine [k] of the gradient [P] with each unit column of [P, k]; 0 for a zero gradient."""
    g = gradient.to(vectors.device, vectors.dtype)
    scale = g.norm()
    if scale == 0:
        return torch.zeros(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    cosines: Tensor = vectors.T @ (g / scale)
    return cosines.square()
