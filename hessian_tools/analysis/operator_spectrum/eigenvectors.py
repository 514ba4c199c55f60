"""Structure of eigenvectors: the layers and weights that they move, and their overlap with the gradient.

Vectors are orthonormal columns [P, k] in float64. No function allocates a second array of that size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessian_tools.objective import Objective


def layer_shares(objective: Objective, vectors: Tensor) -> list[dict[str, float]]:
    """Return the share of every parameter tensor in the squared norm of each eigenvector.

    Args:
        objective: Objective with the parameters.
        vectors: Eigenvectors [P, k].

    Returns:
        Share by parameter name, one dict for each eigenvector.
    """
    masses = torch.stack([_masses(objective, v) for v in vectors.unbind(1)])
    return [dict(zip(objective.parameters, row, strict=True)) for row in masses.tolist()]


def _masses(objective: Objective, v: Tensor) -> Tensor:
    """Squared norms [parameters] of the parts of a vector, normalized to sum 1."""
    masses = torch.stack([part.square().sum() for part in v.split([p.numel() for p in objective.parameters.values()])])
    return masses / masses.sum()


def participation(vectors: Tensor) -> Tensor:
    """Return the participation ratio 1 / (P sum v_i^4) [k] of unit columns [P, k].

    It is 1 if all weights take part equally, and 1/P for a single weight. It is the inverse of the inverse
    participation ratio, normalized by P (Bell & Dean, Discuss. Faraday Soc. 50, 1970).
    """
    fourth = torch.stack([v.square().square().sum() for v in vectors.unbind(1)])
    return 1 / (len(vectors) * fourth)


def gradient_shares(gradient: Tensor, vectors: Tensor) -> Tensor:
    """Return the squared cosine [k] of the gradient [P] with each unit column [P, k]; 0 if the gradient is zero."""
    g = gradient.to(vectors.device, vectors.dtype)
    scale = g.norm()
    if scale == 0:
        return torch.zeros(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    cosines: Tensor = vectors.T @ (g / scale)
    return cosines.square()
