"""Lanczos tridiagonalization from given start vectors, and Gauss quadrature of their spectral measures.

Precision is as in `hessian_tools.linalg.lanczos`: float64 for all but the products, with full reorthogonalization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hessian_tools.linalg.basis import orthogonalize
from hessian_tools.linalg.lanczos import BREAKDOWN, power_of_two
from hessian_tools.operators.base import Operator


def tridiagonal(
    op: Operator,
    start: Tensor,
    steps: int,
    deflate: Tensor | None = None,
    basis_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return the Lanczos coefficients (alpha [m], beta [m - 1]) of A from one start vector [P] (see `tridiagonals`)."""
    alpha, beta = tridiagonals(op, [start], steps, deflate, basis_dtype=basis_dtype)[0]
    return alpha, beta[:-1]


def tridiagonals(
    op: Operator,
    starts: Iterable[Tensor],
    steps: int,
    deflate: Tensor | None = None,
    stop: Callable[[list[float], list[float]], bool] | None = None,
    basis_dtype: torch.dtype = torch.float64,
) -> list[tuple[Tensor, Tensor]]:
    """Run the Lanczos process from several start vectors.

    The runs are independent, but each step multiplies one block with a vector of every run, so an operator that keeps
    no primal recomputes it only once per step. The bases take `steps` vectors [P] per start, of `basis_dtype`.

    Args:
        op: The operator A.
        starts: Start vectors [P].
        steps: Largest number of steps.
        deflate: Orthonormal columns Q [P, k]. If given, the process is that of (I - Q Q^T) A (I - Q Q^T).
        stop: Called with (alpha, beta) after every step of every run. If it returns true, that run ends.
        basis_dtype: torch.float64, or torch.float32 for half of the memory (see `hessian_tools.linalg.basis`).

    Returns:
        For each start, the coefficients (alpha [m], beta [m]) with m <= steps, float64 on the CPU. The last beta leads
        to the step that was not taken. It is 0 if the Krylov space is invariant, which can happen at m < steps (m = 0
        for a start of zeros).

    Raises:
        FloatingPointError: If a product is not finite.
    """
    size, device = op.shape[0], op.device
    fixed = torch.empty(size, 0, dtype=torch.float64, device=device) if deflate is None else deflate
    steps = min(steps, size - fixed.shape[1])
    vectors = [orthogonalize(start.to(device, torch.float64), fixed)[0] for start in starts]
    active = [i for i, v in enumerate(vectors) if v.norm() > 0]
    vectors = [v / v.norm() for v in vectors]
    bases = [torch.empty(steps, size, dtype=basis_dtype, device=device) for _ in vectors]  # one vector per row
    alphas: list[list[float]] = [[] for _ in vectors]
    betas: list[list[float]] = [[] for _ in vectors]
    units = [1.0 for _ in vectors]
    for j in range(steps):
        if not active:
            break
        images = (op @ torch.stack([vectors[i] for i in active]).T).T
        going = []
        for i, image in zip(active, images, strict=True):
            bases[i][j] = vectors[i]
            image = image.contiguous().double()
            units[i] = units[i] if j else power_of_two(image)
            image = image if units[i] == 1 else image / units[i]
            w, coefficients = orthogonalize(image, bases[i][: j + 1].T)
            w, _ = orthogonalize(w, fixed)
            b = float(w.norm())
            if not math.isfinite(b):
                raise FloatingPointError("a product with the operator is not finite")
            alphas[i].append(float(coefficients[-1]) * units[i])
            scale = max(b * units[i], *map(abs, alphas[i]), *betas[i])
            betas[i].append(b * units[i] if b * units[i] > BREAKDOWN * scale else 0.0)
            stopped = stop is not None and stop(alphas[i], betas[i])
            if betas[i][-1] and not stopped:
                vectors[i] = w / b
                going.append(i)
        active = going
    return [
        (torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
        for a, b in zip(alphas, betas, strict=True)
    ]


def quadrature(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the Gauss quadrature of the spectral measure of a start vector (Golub & Welsch 1969).

    For the unit start vector v, the sum of weight * node^j equals v^T A^j v for j <= 2m - 1.

    Args:
        alpha: Lanczos coefficients [m].
        beta: Lanczos coefficients; the first m - 1 are used.

    Returns:
        Nodes [m] in ascending order, and weights [m].
    """
    side = beta[: len(alpha) - 1]
    nodes, vectors = torch.linalg.eigh(torch.diag(alpha) + torch.diag(side, 1) + torch.diag(side, -1))
    return nodes, vectors[0].square()
