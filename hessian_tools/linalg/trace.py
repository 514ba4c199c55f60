"""Trace and Frobenius norm by Hutchinson's estimator with Rademacher probes and deflation of outliers.

Without deflation the variance is 2 (||A||_F^2 - sum A_ii^2), which the few large eigenvalues of a Hessian dominate. The
eigenvalues of converged pairs are therefore summed exactly, and the probes estimate the rest. This is the idea of
Hutch++ (Meyer, Musco, Musco & Woodruff 2021).

The variance is also estimated from the matrix itself, which takes no further products: z_i (Az)_i has the mean A_ii and
the variance sum_{j != i} A_ij^2, so twice the sum of the sample variances of these P numbers is an unbiased estimate.
It shows couplings that a few values z^T A z miss: a block of four equal couplings takes its largest value in one probe
of eight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hessian_tools.linalg.basis import orthogonalize
from hessian_tools.linalg.lanczos import Eigenpairs
from hessian_tools.linalg.mean_interval import mean_interval
from hessian_tools.operators.base import Operator

LEAST_PROBES = 2  # for a standard error; an interval needs more
LEAST_FORMS = 24  # probes for an interval from their values only, without the variance from the matrix
ROUND_OFF = 1e-12  # a smaller variance, relative to ||A||_F^2, is round-off
LEAST_ACCURACY = 1e-12  # of a density, relative to its range; smaller distances are round-off in float64


@dataclass(frozen=True)
class TraceEstimate:
    """A mean over random probes.

    Attributes:
        estimate: The mean.
        stderr: Its standard error.
        ci95: Its 95% confidence interval (see `mean_interval`). It is NaN for fewer than 10 probes, and for fewer than
            24 if only the values of the probes are known.
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


def estimate(values: Tensor, offset: float = 0.0, spread: float = 0.0) -> TraceEstimate:
    """Return offset + mean of `values` [n] with its standard error and its 95% confidence interval.

    Args:
        values: Independent values [n].
        offset: Known part of the result.
        spread: Another estimate of the standard deviation of a value. The larger one is used.

    Raises:
        ValueError: If n is below LEAST_PROBES.
    """
    n = len(values)
    _check(n)
    low, high = mean_interval(values, spread)
    stderr = max(float(values.std()), spread) / n**0.5
    return TraceEstimate(offset + float(values.mean()), stderr, (offset + low, offset + high), n)


def estimate_forms(values: Tensor, offset: float = 0.0, variance: float = math.nan) -> TraceEstimate:
    """Estimate a trace from quadratic forms of random signs.

    Args:
        values: Quadratic forms z^T A z [n] of Rademacher probes, or functions of the spectrum from such probes.
        offset: Known part of the trace.
        variance: Variance of a form (see `form_variance`). NaN if it is unknown: then there is no interval for fewer
            than `LEAST_FORMS` probes.

    Returns:
        The estimate.

    Raises:
        ValueError: If n is below LEAST_PROBES.
    """
    if not math.isnan(variance):
        return estimate(values, offset, math.sqrt(variance))
    found = estimate(values, offset)
    return found if len(values) >= LEAST_FORMS else replace(found, ci95=(math.nan, math.nan))


def _check(probes: int) -> None:
    """Raise ValueError for fewer probes than LEAST_PROBES."""
    if probes < LEAST_PROBES:
        raise ValueError(f"an estimate with a standard error needs at least {LEAST_PROBES} probes, not {probes}")


def form_variance(squared: Tensor, entries: Tensor) -> float:
    """Estimate the variance of z^T A z, 2 (||A||_F^2 - sum A_ii^2), from the products of n probes.

    Args:
        squared: ||A z||^2 [n] of the probes.
        entries: Sum over the probes of z_i (A z)_i [P].

    Returns:
        The unbiased estimate, at least 0; NaN for fewer than two probes.
    """
    n, total = len(squared), float(squared.sum())
    if n < 2:
        return math.nan
    rest = total - float(entries.square().sum()) / n
    return 2 * rest / (n - 1) if rest > ROUND_OFF * total else 0.0


def probe_forms(
    op: Operator, probes: int, generator: torch.Generator, deflate: Eigenpairs | None = None
) -> tuple[Tensor, Tensor]:
    """Return z^T A z [probes] and ||A z||^2 [probes] (see `probe_moments`)."""
    forms, squared, _ = probe_moments(op, probes, generator, deflate)
    return forms, squared


def probe_moments(
    op: Operator, probes: int, generator: torch.Generator, deflate: Eigenpairs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the quadratic forms of Rademacher probes z, projected on the complement of deflated eigenvectors.

    Args:
        op: The operator A.
        probes: Number of probes.
        generator: Random generator of the probes.
        deflate: Eigenpairs whose complement is used.

    Returns:
        z^T A z [probes], ||A z||^2 [probes], and the sum over the probes of z_i (A z)_i [P] (see `form_variance`),
        float64 on the CPU.
    """
    signs = z = rademacher(op, probes, generator)
    if deflate is not None:
        z, _ = orthogonalize(z, deflate.vectors)
    images = (op @ z).double()
    if deflate is not None:
        images = images - deflate.vectors @ (deflate.vectors.T @ images)
    return (z * images).sum(0).cpu(), images.square().sum(0).cpu(), (signs * images).sum(1).cpu()


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
    forms, squared, entries = probe_moments(op, probes, generator, deflate)
    known = 0.0 if deflate is None else float(deflate.values.sum())
    return estimate_forms(forms, known, form_variance(squared, entries))


def frobenius(squared: Tensor, deflate: Eigenpairs | None = None) -> float:
    """Estimate ||A||_F.

    Args:
        squared: ||A z||^2 [n] of the probes, from `probe_forms` with the same `deflate`.
        deflate: Eigenpairs that were taken out exactly.
    """
    known = 0.0 if deflate is None else float(deflate.values.square().sum())
    return float((known + squared.mean()).clamp_min(0).sqrt())
