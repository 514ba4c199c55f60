"""Objectives on networks of other libraries, and products by which two of them are compared."""

from __future__ import annotations

from typing import Any

import torch
from draws import seeded
from torch import Tensor, nn

from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.curvature import hessian
from ikun.adapters import adapt
from ikun.losses import LOSSES

X = torch.rand(6, 5, generator=seeded())
Y = torch.randint(0, 3, (6,), generator=seeded())


def objective_of(
    net: nn.Module, x: Tensor = X, dtype: torch.dtype = torch.float64, library: str | None = None, **options: Any
) -> Objective:
    """The adapted network on six samples in two batches. library: the one that `adapt` must recognize."""
    adapted = adapt(net, x, **options)
    assert library is None or adapted.library == library
    return make_objective(adapted.model, LOSSES["mse"], (x, Y), dtype=dtype, batch_size=4, reset=adapted.reset)


def products(objective: Objective) -> Tensor:
    """Products of the Hessian with five random vectors [P, 5]; they are equal only if the Hessians are."""
    v = torch.randn(objective.size, 5, dtype=torch.float64, generator=seeded(3))
    return hessian(objective) @ v
