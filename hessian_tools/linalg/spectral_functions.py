"""Functionals of a spectrum from its density: effective dimension, log determinant, and share of the negative part.

tr f(A) is the sum of f over the k deflated eigenvalues plus P - k times the quadrature of f by a probe on the
complement (Ubaru, Chen & Saad 2017). Confidence intervals are over the probes. They do not contain the error from the
number of Lanczos steps, which is reported separately as the change from half of the steps. With fewer than 24 probes
there is a standard error but no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hessian_tools.linalg.spectral_density import DensityEstimate
from hessian_tools.linalg.trace import TraceEstimate, estimate_forms
from hessian_tools.results.operator_spectrum import Functional


def effective_dimension(density: DensityEstimate, size: int, z: float, slack: float = 0.0) -> Functional:
    """Estimate the effective dimension, the sum of lambda / (lambda + z) over all eigenvalues (MacKay 1992).

    A + z I must be positive definite. The confidence interval is clipped to the possible values: at most P, and at
    least 0 if no node is negative.

    Args:
        density: The density of A.
        size: P, the number of eigenvalues.
        z: The damping.
        slack: How far an eigenvalue can lie below the lowest node, such as the residual of lambda_min.

    Raises:
        ValueError: If A + z I may not be positive definite, or if there is only one probe.
    """
    found = _definite(lambda x: x / (x + z), density, size, z, slack)
    nodes = torch.cat(density.nodes)
    least = 0.0 if nodes.min() >= -1e-6 * nodes.abs().max() else -math.inf  # up to round-off
    return replace(found, ci95=_clipped(found.ci95, least, float(size)))


def log_determinant(density: DensityEstimate, size: int, z: float, slack: float = 0.0) -> Functional:
    """Estimate log det(A + z I) for positive definite A + z I.

    The arguments and errors are those of `effective_dimension`.
    """
    return _definite(lambda x: (x + z).log(), density, size, z, slack)


def negative_share(density: DensityEstimate, size: int) -> Functional:
    """Estimate sum |negative eigenvalues| / sum |all eigenvalues|. It is 0 for the zero operator.

    This is a ratio of two means over probes. The standard error is by the delta method, and the interval is clipped to
    [0, 1]. Since |x| has a kink, the quadrature error decreases slowly with the number of steps. More probes do not
    reduce it, and the interval does not contain it. Where the bulk is tiny beside eigenvalues that are not deflated,
    the nodes can miss the negative part, and the errors are then far too small.

    Args:
        density: The density of A.
        size: P, the number of eigenvalues.

    Raises:
        ValueError: If there is only one probe.
    """

    def share(nodes: Sequence[Tensor], weights: Sequence[Tensor]) -> TraceEstimate:
        negative = _traces(lambda x: -x.clamp_max(0), nodes, weights, size)
        both = _traces(torch.abs, nodes, weights, size)
        mean = float(both.mean()) or 1.0
        ratio = float(negative.mean()) / mean
        return estimate_forms((negative - ratio * both) / mean, ratio)

    fine, coarse = (share(*part) for part in _quadratures(density))
    return _functional(density, fine, coarse, _clipped(fine.ci95, 0.0, 1.0))


def _clipped(ci95: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    """Clip the ends of an interval to possible values. An end that is NaN stays NaN."""
    first, last = (end if math.isnan(end) else min(max(end, low), high) for end in ci95)
    return first, last


def _definite(f: Callable[[Tensor], Tensor], density: DensityEstimate, size: int, z: float, slack: float) -> Functional:
    """Estimate tr f(A). Raises ValueError if A + z I may not be positive definite."""
    lowest = float(torch.cat(density.nodes + density.coarse_nodes).min())
    if not z > slack - lowest:
        raise ValueError(
            f"A + zI may not be positive definite: the lowest eigenvalue found is {lowest:.3g}, with an uncertainty of "
            f"{slack:.3g}, so the damping z must exceed {slack - lowest:.3g}, but it is {z:.3g}"
        )
    fine, coarse = (estimate_forms(_traces(f, *part, size)) for part in _quadratures(density))
    return _functional(density, fine, coarse, fine.ci95, z)


def _quadratures(density: DensityEstimate) -> tuple[tuple[Sequence[Tensor], Sequence[Tensor]], ...]:
    """Return (nodes, weights) from all steps and from half of them."""
    return (density.nodes, density.weights), (density.coarse_nodes, density.coarse_weights)


def _traces(f: Callable[[Tensor], Tensor], nodes: Sequence[Tensor], weights: Sequence[Tensor], size: int) -> Tensor:
    """Return the estimates [probes] of tr f(A)."""
    return size * torch.stack([(w * f(x)).sum() for x, w in zip(nodes, weights, strict=True)])


def _functional(
    density: DensityEstimate,
    fine: TraceEstimate,
    coarse: TraceEstimate,
    ci95: tuple[float, float],
    damping: float = math.nan,
) -> Functional:
    """Build the result, with the change from half of the steps as the quadrature error."""
    error = math.nan if math.isnan(density.accuracy) else abs(fine.estimate - coarse.estimate)
    return Functional(fine.estimate, fine.stderr, ci95, fine.probes, error, damping)
