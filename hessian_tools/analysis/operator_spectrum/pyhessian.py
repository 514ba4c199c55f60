"""PyHessian (Yao et al. 2020) on the same objective, as an independent reference.

Stopping rules, tolerances and random numbers are PyHessian's own. This module adds what its version 0.1 needs to run on
an arbitrary network, and counts the operator products, which PyHessian does not.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.linalg.lanczos import Eigenpairs, certified
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator
from hessian_tools.runtime.cuda import full_precision


class _Live(nn.Module):
    """Model that PyHessian sees.

    PyHessian calls `eval()`, which in some spiking libraries removes the surrogate, so `eval()` has no effect here.
    PyHessian uses every parameter that requires a gradient, so `parameters()` returns only those of the objective.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model = objective.model
        self.objective = objective
        self.forwards = 0

    def eval(self) -> _Live:
        return self

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self.objective.parameters.values())  # type: ignore[arg-type]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.model.zero_grad()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.objective.outputs(x)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Add 0 * sum p^2 to the loss.

        PyHessian 0.1 fails on a parameter without a gradient or without a second derivative.
        """
        unused = sum(p.square().sum() for p in self.objective.parameters.values())
        return self.objective.loss(outputs, targets) + 0 * unused


def _run(objective: Objective, seed: int, method: Callable[[Any], Any]) -> tuple[Any, int]:
    """Call `method` with PyHessian's class. Return its result and the number of operator products."""
    from pyhessian import hessian  # slow to import, and only needed here

    live = _Live(objective)
    cuda = objective.device.type == "cuda"
    dtype = torch.get_default_dtype()
    fork = torch.random.fork_rng([objective.device] if cuda else [])
    here = torch.cuda.device(objective.device) if cuda else contextlib.nullcontext()  # it uses the current device
    with here, fork, warnings.catch_warnings(), full_precision(objective.device):
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
        torch.manual_seed(seed)  # PyHessian uses the global generator and the default dtype
        torch.set_default_dtype(objective.dtype)
        try:
            found = method(hessian(live, live.loss, dataloader=objective.batches, cuda=cuda))
        finally:
            torch.set_default_dtype(dtype)
            live.zero_grad()
    return found, live.forwards // len(objective.batches)


def pyhessian_eigenpairs(
    objective: Objective, op: Operator, count: int, *, tol: float, seed: int, max_iterations: int = 100
) -> Eigenpairs:
    """Compute eigenpairs with PyHessian's power iteration, and residuals of its vectors.

    PyHessian stops when two successive values agree to 1e-3 (|value| + 1e-6). This is early if eigenvalues are close to
    each other, and immediate if all are tiny.

    Args:
        objective: The loss, its data and its weights.
        op: Hessian of the objective. It serves for the residuals.
        count: Number of eigenpairs.
        tol: Tolerance of `converged`: residual relative to the norm of the operator.
        seed: Random seed.
        max_iterations: Largest number of iterations for each eigenpair.

    Returns:
        The eigenpairs. Their `products` and those of `op` include the products of PyHessian.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    (_, vectors), products = _run(objective, seed, lambda h: h.eigenvalues(max_iterations, tol=1e-3, top_n=count))
    op.products += products
    columns = torch.stack([objective.flatten(v).double() for v in vectors], 1)
    if not torch.isfinite(columns).all():
        raise FloatingPointError("a product with the operator is not finite")
    norms = columns.norm(dim=0)
    columns[0, norms == 0] = 1  # PyHessian returns 0 if the product is 0; any vector will do
    pairs = certified(op, columns / columns.norm(dim=0), tol)
    return replace(pairs, products=pairs.products + products)


def pyhessian_trace(objective: Objective, *, seed: int, max_iterations: int = 100) -> Tensor:
    """Estimate the trace with PyHessian.

    PyHessian stops when two successive running means agree to 1e-3 of their signed value. After a negative mean it
    always stops, so n is 2 for most Hessians with a negative trace. Each probe takes one product.

    Args:
        objective: The loss, its data and its weights.
        seed: Random seed.
        max_iterations: Largest number of probes.

    Returns:
        z'Hz [n] of n <= max_iterations Rademacher probes. PyHessian's estimate is their mean.
    """
    values, _ = _run(objective, seed, lambda h: h.trace(max_iterations, tol=1e-3))
    return torch.tensor(values, dtype=torch.float64)
