"""Functionals of a spectrum from its density: effective dimension, log determinant, share of the negative part.

tr f(A) is the sum of f over the deflated eigenvalues plus P - k times a probe's quadrature of f on the complement of
those k (Ubaru, Chen & Saad 2017). The intervals are over probes; what the number of Lanczos steps may still change is
given apart: the change from half of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hessian_tools.linalg.spectral_density import DensityEstimate
from hessian_tools.linalg.trace import TraceEstimate, estimate
from hessian_tools.results.spectrum import Functional


def effective_dimension(density: DensityEstimate, size: int, z: float, slack: float = 0.0) -> Functional:
    """sum of lambda / (lambda + z) over the `size` eigenvalues of A, for A + z I positive definite (MacKay 1992).

    The interval is clipped to what is possible: at most size, and at least 0 where no node is negative.
    slack: how far an eigenvalue may lie below the lowest node, such as the residual of lambda_min. Raises ValueError if
    A + z I is not sure to be positive definite, or for fewer probes than an interval takes.
    """
    found = _definite(lambda x: x / (x + z), density, size, z, slack)
    nodes = torch.cat(density.nodes)
    least = 0.0 if nodes.min() >= -1e-6 * nodes.abs().max() else -math.inf  # but for round-off
    return replace(found, ci95=(max(found.ci95[0], least), min(found.ci95[1], float(size))))


def log_determinant(density: DensityEstimate, size: int, z: float, slack: float = 0.0) -> Functional:
    """log det(A + z I) for A + z I positive definite; slack and errors as of `effective_dimension`."""
    return _definite(lambda x: (x + z).log(), density, size, z, slack)


def negative_share(density: DensityEstimate, size: int) -> Functional:
    """sum |negative eigenvalues| / sum |all eigenvalues|; 0 for the zero operator.

    A ratio of two means over probes: standard error by the delta method, interval clipped to [0, 1]. |x| has a kink, so
    the quadrature error falls slowly with the steps; no number of probes reduces it, and it is not in the interval.
    Raises ValueError for fewer probes than an interval takes.
    """

    def share(nodes: Sequence[Tensor], weights: Sequence[Tensor]) -> TraceEstimate:
        negative = _traces(lambda x: -x.clamp_max(0), nodes, weights, size)
        both = _traces(torch.abs, nodes, weights, size)
        mean = float(both.mean()) or 1.0
        ratio = float(negative.mean()) / mean
        return estimate((negative - ratio * both) / mean, ratio)

    fine, coarse = (share(*part) for part in _quadratures(density))
    low, high = (min(max(end, 0.0), 1.0) for end in fine.ci95)
    return _functional(density, fine, coarse, (low, high))


def _definite(f: Callable[[Tensor], Tensor], density: DensityEstimate, size: int, z: float, slack: float) -> Functional:
    lowest = float(torch.cat(density.nodes + density.coarse_nodes).min())
    if not z > slack - lowest:
        raise ValueError(
            f"A + zI is not sure to be positive definite: the lowest eigenvalue found is {lowest:.3g}, uncertain by "
            f"{slack:.3g}, so the damping z must exceed {slack - lowest:.3g}, not {z:.3g}"
        )
    fine, coarse = (estimate(_traces(f, *part, size)) for part in _quadratures(density))
    return _functional(density, fine, coarse, fine.ci95, z)


def _quadratures(density: DensityEstimate) -> tuple[tuple[Sequence[Tensor], Sequence[Tensor]], ...]:
    """(nodes, weights) of all steps, and of half of them."""
    return (density.nodes, density.weights), (density.coarse_nodes, density.coarse_weights)


def _traces(f: Callable[[Tensor], Tensor], nodes: Sequence[Tensor], weights: Sequence[Tensor], size: int) -> Tensor:
    """The estimates [probes] of tr f(A)."""
    return size * torch.stack([(w * f(x)).sum() for x, w in zip(nodes, weights, strict=True)])


def _functional(
    density: DensityEstimate,
    fine: TraceEstimate,
    coarse: TraceEstimate,
    ci95: tuple[float, float],
    damping: float = math.nan,
) -> Functional:
    error = math.nan if math.isnan(density.accuracy) else abs(fine.estimate - coarse.estimate)
    return Functional(fine.estimate, fine.stderr, ci95, fine.probes, error, damping)
