"""PyHessian (Yao et al. 2020) on the same objective: an independent reference, never on the main path.

What it computes is its own: stopping rules, tolerance, random numbers. Around it stands what its version 0.1 needs to
run on any network at all, and the count of products, which it does not take itself.
"""

from __future__ import annotations

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
    """PyHessian calls eval(), which in some spiking libraries removes the surrogate: the mode stays as it is here.

    It takes every parameter that requires a gradient: here those of the objective, a layer's for instance.
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
        """Plus 0 sum p^2: PyHessian 0.1 fails on a parameter that has no gradient, or one without a second."""
        unused = sum(p.square().sum() for p in self.objective.parameters.values())
        return self.objective.loss(outputs, targets) + 0 * unused


def _run(objective: Objective, seed: int, method: Callable[[Any], Any]) -> tuple[Any, int]:
    """(what `method` of PyHessian's class returns, products that it took)."""
    from pyhessian import hessian  # an import of its own: it is slow, and only this function needs it

    live = _Live(objective)
    cuda = objective.device.type == "cuda"
    dtype = torch.get_default_dtype()
    fork = torch.random.fork_rng([objective.device] if cuda else [])
    with fork, warnings.catch_warnings(), full_precision(objective.device):
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
        torch.manual_seed(seed)  # PyHessian draws from the global generator, in the default dtype
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
    """PyHessian's own power iteration (its stopping rule, its tolerance 1e-3), with our residuals for its vectors.

    Its products are added to those of `op`, and to `products` of the pairs. It stops when two values in a row agree to
    1e-3 (|value| + 1e-6), so early where eigenvalues are close, and at once where all are tiny.
    Raises FloatingPointError if a product is not finite.
    """
    (_, vectors), products = _run(objective, seed, lambda h: h.eigenvalues(max_iterations, tol=1e-3, top_n=count))
    op.products += products
    columns = torch.stack([objective.flatten(v).double() for v in vectors], 1)
    if not torch.isfinite(columns).all():
        raise FloatingPointError("a product with the operator is not finite")
    norms = columns.norm(dim=0)
    columns[0, norms == 0] = 1  # where the product vanishes it returns 0, and any vector will do
    pairs = certified(op, columns / columns.norm(dim=0), tol)
    return replace(pairs, products=pairs.products + products)


def pyhessian_trace(objective: Objective, *, seed: int, max_iterations: int = 100) -> Tensor:
    """z'Hz [n] of PyHessian's own trace estimator, n <= max_iterations Rademacher probes: their mean is its trace.

    It stops when two running means in a row agree to 1e-3, relative to their signed value: behind a negative one it
    always stops, so that n is 2 for most Hessians of negative trace. One product a probe.
    """
    values, _ = _run(objective, seed, lambda h: h.trace(max_iterations, tol=1e-3))
    return torch.tensor(values, dtype=torch.float64)
