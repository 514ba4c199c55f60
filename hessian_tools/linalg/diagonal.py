"""The diagonal of an operator: exactly by unit vectors, or from random signs with a standard error for every entry.

For a vector z of random signs, z_i (B z)_i has the mean B_ii and the variance sum_{j != i} B_ij^2 (Bekas, Kokiopoulou &
Saad 2007, An estimator for the diagonal of a matrix). Here B = A - Q L Q^T for known eigenpairs (Q, L), whose diagonal
sum_k L_k Q_ik^2 is added: the couplings of a few large eigenvalues are then no part of the variance. The estimate is
unbiased also where the pairs are not exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.linalg.lanczos import Eigenpairs
from hessian_tools.linalg.trace import LEAST_PROBES, rademacher
from hessian_tools.operators.base import Operator

BLOCK = 4  # products at a time


@dataclass(frozen=True)
class DiagonalEstimate:
    """Diagonal of an operator.

    Attributes:
        values: The entries [P], float64 on the CPU.
        stderr: Their standard errors [P] over the probes; 0 if the diagonal is exact.
        probes: Number of products.
        exact: Whether unit vectors were used, not random signs.
    """

    values: Tensor
    stderr: Tensor
    probes: int
    exact: bool


def diagonal(
    op: Operator,
    probes: int,
    generator: torch.Generator,
    deflate: Eigenpairs | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> DiagonalEstimate:
    """Compute the diagonal of an operator, exactly if this takes no more products than the estimate.

    Args:
        op: The operator A, symmetric.
        probes: Number of probes n of the estimate. Standard errors have a relative error of about 1 / sqrt(2 n).
        generator: Random generator of the probes. It must not be the one that drew the start vector of `deflate`.
        deflate: Eigenpairs to take out.
        progress: Called with (products done, products needed, NaN).

    Raises:
        ValueError: If `probes` is below LEAST_PROBES.
    """
    if probes < LEAST_PROBES:
        raise ValueError(f"a diagonal with standard errors needs at least {LEAST_PROBES} probes, not {probes}")
    size = op.shape[0]
    exact = size <= probes
    count, done = (size, 0) if exact else (probes, 0)
    known = None if deflate is None else deflate.values.to(op.device)  # eigenvalues are on the CPU
    values, centre, squares = (torch.zeros(size, dtype=torch.float64, device=op.device) for _ in range(3))
    while done < count:
        n = min(BLOCK, count - done)
        if exact:
            rows = torch.arange(done, done + n, device=op.device)
            columns = torch.zeros(size, n, dtype=torch.float64, device=op.device)
            columns[rows, torch.arange(n, device=op.device)] = 1
            values[rows] = (op @ columns).double()[rows, torch.arange(n, device=op.device)]
        else:
            signs = rademacher(op, n, generator)
            images = (op @ signs).double()
            if deflate is not None and known is not None:
                images -= deflate.vectors @ (known[:, None] * (deflate.vectors.T @ signs))
            entries = signs * images
            if not done:
                centre = entries.mean(1)  # a rough mean, so that the sum of squares does not cancel
            values += entries.sum(1)
            squares += (entries - centre[:, None]).square().sum(1)
        done += n
        if progress is not None:
            progress(done, count, float("nan"))
    if exact:
        return DiagonalEstimate(values.cpu(), torch.zeros(size, dtype=torch.float64), count, True)
    values /= count
    variance = (squares / count - (values - centre).square()).clamp_min(0) * count / (count - 1)
    if deflate is not None and known is not None:
        values += deflate.vectors.square() @ known
    return DiagonalEstimate(values.cpu(), (variance / count).sqrt().cpu(), count, False)
