"""PyHessian (Yao et al. 2020) on the same objective: an independent reference, never on the main path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.lanczos import Eigenpairs, certified
from hessian_tools.objective import Objective
from hessian_tools.operators import Operator


class _Live(nn.Module):
    """PyHessian calls eval(), which in some spiking libraries removes the surrogate: the mode stays as it is here."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model = objective.model
        self.objective = objective

    def eval(self) -> _Live:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.objective.outputs(x)


def pyhessian_eigenpairs(
    objective: Objective, op: Operator, count: int, *, tol: float, seed: int, max_iterations: int = 100
) -> Eigenpairs:
    """PyHessian's own power iteration (its stopping rule, its tolerance 1e-3), with our residuals for its vectors.

    products counts our residual products alone; PyHessian does not count its own.
    """
    from pyhessian import hessian  # an import of its own: it is slow, and only this function needs it

    torch.manual_seed(seed)  # PyHessian draws from the global generator
    computation: Any = hessian(
        _Live(objective), objective.loss, dataloader=list(objective.batches), cuda=objective.device.type == "cuda"
    )
    _, vectors = computation.eigenvalues(maxIter=max_iterations, tol=1e-3, top_n=count)
    for p in objective.model.parameters():
        p.grad = None
    columns = torch.stack([objective.flatten(v).double() for v in vectors], 1)
    return certified(op, columns / columns.norm(dim=0), tol)
