"""Trace and Frobenius norm by Hutchinson's estimator with Rademacher probes, outliers deflated.

Undeflated, Var = 2 (||A||_F^2 - sum A_ii^2), which the few large eigenvalues of a Hessian dominate: their converged
pairs are summed exactly and the probes estimate the rest (Meyer, Musco, Musco & Woodruff 2021, the idea of Hutch++).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from hessian_tools.linalg.lanczos import Eigenpairs, orthogonalize
from hessian_tools.operators.base import Operator

# The least number at which the 95% interval covers in 92 to 98% of 500 replicates, on the Hessian and the GGN of a
# trained spiking network with both ends of the spectrum deflated: test_coverage_of_the_trace_interval in test_density.
# With the outliers left in, whose forms are skew, it is 90 to 93% for 3 to 32 probes alike: deflating is what helps.
LEAST_PROBES = 2


@dataclass(frozen=True)
class TraceEstimate:
    """A mean over random probes with its standard error and 95% t-interval."""

    estimate: float
    stderr: float
    ci95: tuple[float, float]
    probes: int


def rademacher(op: Operator, count: int, generator: torch.Generator) -> Tensor:
    """Probes [P, count] of independent signs, float64, drawn on the CPU."""
    draws = torch.randint(0, 2, (count, op.shape[0]), generator=generator, dtype=torch.int8)
    return (2.0 * draws.double() - 1).T.to(op.device)


def estimate(values: Tensor, offset: float = 0.0) -> TraceEstimate:
    """offset + mean of values [n], with Student's t interval. Raises ValueError for n below LEAST_PROBES."""
    n = len(values)
    _check(n)
    mean = offset + float(values.mean())
    stderr = float(values.std()) / n**0.5
    half = float(stats.t.ppf(0.975, n - 1)) * stderr
    return TraceEstimate(mean, stderr, (mean - half, mean + half), n)


def _check(probes: int) -> None:
    if probes < LEAST_PROBES:
        raise ValueError(f"an estimate with an interval needs at least {LEAST_PROBES} probes, not {probes}")


def probe_forms(
    op: Operator, probes: int, generator: torch.Generator, deflate: Eigenpairs | None = None
) -> tuple[Tensor, Tensor]:
    """(z'Az [probes], ||Az||^2 [probes]) for Rademacher probes projected on the complement of `deflate`."""
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
    """tr A: the deflated eigenvalues exactly, plus the mean of z'Az over probes on their complement.

    The generator must not be the one that made `deflate`'s start vector. Raises ValueError for fewer probes than
    LEAST_PROBES.
    """
    _check(probes)
    forms, _ = probe_forms(op, probes, generator, deflate)
    return estimate(forms, 0.0 if deflate is None else float(deflate.values.sum()))


def frobenius(squared: Tensor, deflate: Eigenpairs | None = None) -> float:
    """||A||_F from the probes' ||Az||^2 [n] and the deflated eigenvalues."""
    known = 0.0 if deflate is None else float(deflate.values.square().sum())
    return float((known + squared.mean()).clamp_min(0).sqrt())
