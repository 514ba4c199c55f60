"""Error bounds of Ritz values: what a Krylov space from a random start says about eigenvalues that it has not found."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FAILURE = 0.05  # probability with which a gap may contain an eigenvalue that was not found


def random_start_bound(steps: int, size: int, failure: float = 0.05) -> float:
    """Bound the relative error of the largest Ritz value from a random start.

    With probability 1 - failure, the largest Ritz value is at most e (lambda_max - lambda_min) below lambda_max after
    `steps` Lanczos steps. The bound is failure = 1.648 sqrt(size) exp(-sqrt(e) (2 steps - 1)) (Kuczynski & Wozniakowski
    1992). It also holds for the smallest Ritz value; for both at once, the failure probabilities add up.

    Args:
        steps: Number of Lanczos steps (products).
        size: Size P of the matrix.
        failure: Failure probability.

    Returns:
        e, at most 1, and 0 if steps >= size.

    Raises:
        ValueError: If `failure` is not in (0, 1), `size` is not positive, or `steps` is negative.
    """
    if not 0 < failure < 1 or size < 1 or steps < 0:
        raise ValueError(
            f"the failure probability must lie between 0 and 1, size must be positive and steps not negative, but they "
            f"are {failure}, {size} and {steps}"
        )
    if steps >= size:
        return 0.0
    if steps == 0:
        return 1.0
    return min(1.0, (math.log(1.648 * math.sqrt(size) / failure) / (2 * steps - 1)) ** 2)


def temple_bounds(
    values: Tensor, residuals: Tensor, others: Tensor, radii: Tensor, steps: int = 1, size: int = 1
) -> Tensor:
    """Compute the error bounds min(residual, residual^2 / gap) of eigenpairs (Kato 1949, Temple 1928).

    The bound needs a gap on both sides of the value that contains no second eigenvalue. On one side the next Ritz value
    ends the gap, less its residual. On the other side, towards the inside of the spectrum, eigenvalues can lie above
    the next Ritz value, because the Ritz values have not converged to them. How far they can reach is bounded from the
    random start (see `_unseen`). If the spectrum piles up near the value, no gap remains, and the bound is the
    residual. The gap is computed from the upper and from the lower end of the spectrum, and the larger one counts.

    Args:
        values: Values [k].
        residuals: Their residuals [k].
        others: Other Ritz values [m].
        radii: Bounds on the residuals of `others` [m].
        steps: Dimension of the Krylov space built from a random start. If it is at least `size`, the Ritz values
            represent all eigenvalues.
        size: Size P of the operator.

    Returns:
        The bounds [k].
    """
    ritz, reach = torch.cat([values, others]), torch.cat([residuals, radii])
    if len(ritz) < 2:
        return residuals
    gap = _gaps(ritz, reach, steps, size).maximum(_gaps(-ritz, reach, steps, size))[: len(values)]
    return torch.where((gap > 0) & gap.isfinite(), residuals.minimum(residuals.square() / gap), residuals)


def _gaps(ritz: Tensor, reach: Tensor, steps: int, size: int) -> Tensor:
    """Return the gap [m] of every Ritz value, with eigenvalues counted from the upper end. It may be negative."""
    order = ritz.argsort(descending=True)
    x, r = ritz[order], reach[order]
    apart = (x[:, None] - x).abs() - r  # from row to column
    gap = apart.fill_diagonal_(math.inf).min(1).values
    if steps < size:
        below = torch.cat([x[:-1] - x[1:] - _unseen(x, steps, size)[1:], x.new_full((1,), -math.inf)])
        gap = gap.minimum(below)
    return torch.empty_like(gap).index_copy_(0, order, gap)


def _unseen(x: Tensor, steps: int, size: int) -> Tensor:
    """Bound how far the (i + 1)-th largest eigenvalue can lie above the (i + 1)-th largest Ritz value.

    This is the bound of Kuczynski & Wozniakowski (1992) for polynomials that vanish at the i larger Ritz values, as in
    Saad's (1980) bound for inner eigenvalues: they have i fewer degrees of freedom, and are larger by the product of
    (x_j - x_min) / (x_j - x_i) over the larger values x_j.

    Args:
        x: Ritz values [m] in descending order.
        steps: Dimension of the Krylov space from the random start, below `size`.
        size: Size P of the operator.

    Returns:
        The bounds [m], infinite where the Krylov space is too small for one.
    """
    rank = torch.arange(len(x), dtype=x.dtype)
    larger = torch.ones(len(x), len(x), dtype=torch.bool).tril(-1)
    ratios = ((x - x[-1]) / (x - x[:, None])).where(larger, x.new_ones(()))
    growth = ratios.abs().log().sum(1) + math.log(1.648 * math.sqrt(size) / FAILURE)
    freedom = 2 * (steps - rank) - 1
    e = (growth / freedom).square()
    bound = e / (1 - 2 * e) * (x[:1] - x[-1:])
    return bound.where((freedom > 0) & (e < 0.5), x.new_full((), math.inf))
