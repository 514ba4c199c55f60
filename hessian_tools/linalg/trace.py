"""Trace and Frobenius norm by Hutchinson's estimator with Rademacher probes and deflation of outliers.

Without deflation the variance is 2 (||A||_F^2 - sum A_ii^2), which the few large eigenvalues of a Hessian dominate. The
eigenvalues of converged pairs are therefore summed exactly, and the probes estimate the rest. This is the idea of
Hutch++ (Meyer, Musco, Musco & Woodruff 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.linalg.lanczos import Eigenpairs, orthogonalize
from hessian_tools.linalg.mean_interval import mean_interval
from hessian_tools.operators.base import Operator

LEAST_PROBES = 2  # for a standard error; an interval needs more (`mean_interval.LEAST_VALUES`)
LEAST_ACCURACY = 1e-12  # of a density, relative to its range; smaller distances are round-off in float64


@dataclass(frozen=True)
class TraceEstimate:
    """A mean over random probes.

    Attributes:
        estimate: The mean.
        stderr: Its standard error.
        ci95: Its 95% confidence interval (see `mean_interval`), NaN for fewer than 10 probes.
        probes: Number of probes.
    """

    estimate: float
    stderr: float
    ci95: tuple[float, float]
    probes: int


def rademacher(op: Operator, count: int, generator: torch.Generator) -> Tensor:
    """Draw probes of independent random signs.

    Args:
        op: The operator, for P and the device.
        count: Number of probes.
        generator: Random generator.

    Returns:
        The probes [P, count], float64. They are drawn on the CPU.
    """
    draws = torch.randint(0, 2, (count, op.shape[0]), generator=generator, dtype=torch.int8)
    return (2.0 * draws.double() - 1).T.to(op.device)


def estimate(values: Tensor, offset: float = 0.0) -> TraceEstimate:
    """Return offset + mean of `values` [n] with its standard error and its 95% confidence interval.

    Raises:
        ValueError: If n is below LEAST_PROBES.
    """
    n = len(values)
    _check(n)
    low, high = mean_interval(values)
    stderr = float(values.std()) / n**0.5
    return TraceEstimate(offset + float(values.mean()), stderr, (offset + low, offset + high), n)


def _check(probes: int) -> None:
    """Raise ValueError for fewer probes than LEAST_PROBES."""
    if probes < LEAST_PROBES:
        raise ValueError(f"an estimate with a standard error needs at least {LEAST_PROBES} probes, not {probes}")


def probe_forms(
    op: Operator, probes: int, generator: torch.Generator, deflate: Eigenpairs | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the quadratic forms of Rademacher probes z, projected on the complement of deflated eigenvectors.

    Args:
        op: The operator A.
        probes: Number of probes.
        generator: Random generator of the probes.
        deflate: Eigenpairs whose complement is used.

    Returns:
        z^T A z [probes] and ||A z||^2 [probes], float64 on the CPU.
    """
    z = rademacher(op, probes, generator)
    if deflate is not None:
        z, _ = orthogonalize(z, deflate.vectors)
    images = (op @ z).double()
    if deflate is not None:
        images = images - deflate.vectors @ (deflate.vectors.T @ images)
    return (z * images).sum(0).cpu(), images.square().sum(0).cpu()


def trace(
    op: Operator, *, probes: int = 32, generator: torch.Generator, deflate: Eigenpairs | None = None
) -> TraceEstimate:
    """Estimate tr A as the sum of the deflated eigenvalues plus the mean of z^T A z over probes on their complement.

    Args:
        op: The operator A.
        probes: Number of probes.
        generator: Random generator of the probes. It must not be the one that drew the start vector of `deflate`.
        deflate: Converged eigenpairs to take out exactly.

    Raises:
        ValueError: If `probes` is below LEAST_PROBES.
    """
    _check(probes)
    forms, _ = probe_forms(op, probes, generator, deflate)
    return estimate(forms, 0.0 if deflate is None else float(deflate.values.sum()))


def frobenius(squared: Tensor, deflate: Eigenpairs | None = None) -> float:
    """Estimate ||A||_F.

    Args:
        squared: ||A z||^2 [n] of the probes, from `probe_forms` with the same `deflate`.
        deflate: Eigenpairs that were taken out exactly.
    """
    known = 0.0 if deflate is None else float(deflate.values.square().sum())
    return float((known + squared.mean()).clamp_min(0).sqrt())
