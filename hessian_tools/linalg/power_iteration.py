"""Power iteration with deflation, for comparison with earlier work. Lanczos is better in every respect.

Power iteration converges to the eigenvalue of largest magnitude. It is slow if several magnitudes are close, and does
not converge for a pair +a, -a. The results therefore include signs, explicit residuals, and convergence flags.
"""

from __future__ import annotations

import dataclasses

import torch

from hessian_tools.linalg.basis import orthogonalize
from hessian_tools.linalg.lanczos import (
    Eigenpairs,
    ProductProgress,
    certified,
    power_of_two,
    random_vector,
)
from hessian_tools.operators.base import Operator


def power_iteration(
    op: Operator,
    count: int = 10,
    *,
    generator: torch.Generator,
    tol: float = 1e-4,
    max_iterations: int = 100,
    progress: ProductProgress | None = None,
) -> Eigenpairs:
    """Compute the eigenpairs of largest magnitude by power iteration.

    Args:
        op: The operator.
        count: Number of eigenpairs.
        generator: Random generator of the start vectors.
        tol: A pair has converged if its residual is at most tol * ||A||, where ||A|| is estimated by the largest
            |value| so far.
        max_iterations: Largest number of products per pair.
        progress: Called after every product with (products done, most products, worst relative residual).

    Returns:
        The eigenpairs by decreasing magnitude.

    Raises:
        ValueError: If `count` does not fit the operator, or `max_iterations` is below 1.
        FloatingPointError: If a product is not finite.
    """
    if not 1 <= count <= op.shape[0] or max_iterations < 1:
        raise ValueError(f"cannot find {count} of {op.shape[0]} eigenvalues in {max_iterations} iterations each")
    before, norm, finished, unit = op.products, 0.0, 0.0, 1.0
    basis = torch.empty(op.shape[0], count, dtype=torch.float64, device=op.device)
    for i in range(count):
        v, _ = orthogonalize(random_vector(op, generator), basis[:, :i])
        v = v / v.norm()
        for _ in range(max_iterations):
            w = (op @ v).double()
            if not torch.isfinite(w).all():
                raise FloatingPointError("a product with the operator is not finite")
            unit = unit if norm else power_of_two(w)
            w = w if unit == 1 else w / unit
            value = float(v @ w)
            residual = float((w - value * v).norm())
            norm = max(norm, abs(value))
            if progress is not None:
                worst = max(finished, residual) / norm if norm else 0.0
                progress(op.products - before, count * (max_iterations + 1), worst)
            w, _ = orthogonalize(w, basis[:, :i])
            length = float(w.norm())
            if residual <= tol * norm or length == 0:
                break
            v = w / length
        basis[:, i] = v
        finished = max(finished, residual)
    pairs = dataclasses.replace(certified(op, basis, tol, norm * unit), products=op.products - before)
    return pairs.take(torch.argsort(pairs.values.abs(), descending=True))
