"""The spectrum of one operator: eigenvalues, trace, density and functions of it, each with its errors.

A number that does not exist, such as the standard error of a single probe, is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from hessian_tools.results.text import brief


@dataclass(frozen=True)
class Eigenvalue:
    """One eigenvalue with its errors and the structure of its eigenvector v.

    Attributes:
        value: Ritz value. For the samples used, an eigenvalue lies within `residual` of it.
        residual: ||Av - value v||.
        data_stderr: Standard deviation of `value` over other sets of as many samples. It is NaN where it is only known
            from below (see `data_stderr_least`), and for a single sample. The bias of an extreme eigenvalue is not in
            it: those of few samples lie too far out on average.
        converged: Whether the residual meets the tolerance.
        layers: Share of each parameter tensor in the squared norm of v, by name.
        bound: Error bound by Kato and Temple, residual^2 / gap, if that is smaller than the residual. The gap is
            computed from the other Ritz values.
        gradient: Share of the squared norm of the gradient that lies along v.
        participation: Participation ratio 1 / (P sum v_i^4): 1 if all weights take part equally, 1/P for a single
            weight.
        data_concentration: Largest share of one group of samples in the variance behind `data_stderr`.
        data_stderr_least: The standard deviation over the data is at least about this. Given in place of `data_stderr`
            if the share is above 0.3, here or for the trace: a few samples carry the variance, and an interval would
            often miss.
    """

    value: float
    residual: float
    data_stderr: float
    converged: bool
    layers: dict[str, float]
    bound: float = math.nan
    gradient: float = math.nan
    participation: float = math.nan
    data_concentration: float = math.nan
    data_stderr_least: float = math.nan

    __repr__ = brief


@dataclass(frozen=True)
class Search:
    """How certain it is that no eigenvalue beyond the reported ones was missed.

    Attributes:
        steps: Dimension of the first Krylov space, from a random start.
        excess: With probability 95% over the start vector, no eigenvalue lies farther than this beyond the outermost
            ones found (Kuczynski & Wozniakowski 1992).
        starts: Number of other, independent random starts, on the complement of the converged eigenvectors.
        start_steps: Lanczos steps of each of these starts.
        largest: Largest Ritz value that they found.
        smallest: Smallest Ritz value that they found.
    """

    steps: int
    excess: float
    starts: int
    start_steps: int
    largest: float
    smallest: float


@dataclass(frozen=True)
class Functional:
    """A trace tr f(A), or a ratio of such traces, by stochastic Lanczos quadrature.

    Attributes:
        estimate: The value.
        stderr: Standard error over the probes.
        ci95: 95% confidence interval over the probes.
        probes: Number of probes; 0 if it is exact.
        quadrature_error: Change of the estimate if only half of the Lanczos steps are used.
        damping: Damping z in f; NaN if f has none.
    """

    estimate: float
    stderr: float
    ci95: tuple[float, float]
    probes: int
    quadrature_error: float
    damping: float = math.nan


@dataclass(frozen=True)
class Trace:
    """Hutchinson's estimate of a trace.

    Attributes:
        estimate: The value.
        stderr: Standard error over the probes.
        ci95: 95% confidence interval over the probes.
        probes: Number of probes; 0 if it is exact.
        data_stderr: Standard error over the data, NaN where it is only known from below.
        data_concentration: Largest share of one group of samples in the variance behind `data_stderr`.
        data_stderr_least: Lower limit in place of `data_stderr`, as for an eigenvalue.
    """

    estimate: float
    stderr: float
    ci95: tuple[float, float]
    probes: int
    data_stderr: float
    data_concentration: float = math.nan
    data_stderr_least: float = math.nan


@dataclass(frozen=True)
class Diagonal:
    """Diagonal of an operator.

    Attributes:
        method: "unit vectors" or "Jacobian" (both exact), or "probes" (estimated).
        products: Number of operator products, or of backward passes of single samples for "Jacobian".
        entries: For each parameter tensor of shape [...], an array [3, ...] with the entries, their standard errors
            over the probes (0 if exact) and over the data (only for "Jacobian", else NaN). They are saved in the NPZ
            file and never in the JSON file.
    """

    method: str
    products: int
    entries: dict[str, npt.NDArray[Any]] | None = field(default=None, compare=False, repr=False)

    __repr__ = brief


@dataclass(frozen=True)
class Density:
    """Spectral density: one quadrature for each probe, with weights that sum to 1.

    Attributes:
        nodes: Nodes of each probe. The first `atoms` nodes are deflated eigenvalues.
        weights: Weights of the nodes of each probe. A deflated eigenvalue has weight 1/P.
        probes: Number of probes; 0 if it is exact.
        steps: Number of Lanczos steps.
        atoms: Number of deflated eigenvalues.
        accuracy: Wasserstein-1 distance to the quadrature with half as many steps, relative to the range of the
            spectrum. It is the largest value over the probes.
    """

    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    probes: int
    steps: int
    atoms: int
    accuracy: float = math.nan

    __repr__ = brief


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of one operator A.

    Attributes:
        symmetry_error: Relative asymmetry |u'Av - v'Au| / ||Au||.
        hessian_vector_products: Number of products with the operator.
        eigenvalues: Largest eigenvalues, in descending order.
        smallest_eigenvalues: Smallest eigenvalues, in ascending order.
        trace: Trace.
        frobenius_norm: Frobenius norm.
        scale_free_lambda_max: Largest eigenvalue of D A D, where D holds for each weight the norm of its filter (its
            row of the weight matrix). It does not change if filters in front of a BatchNorm are rescaled.
        density: Spectral density.
        search: Evidence that no eigenvalue was missed.
        gradient_share: Share of the squared norm of the gradient in the span of the converged largest eigenvectors.
        effective_dimension: sum l / (l + z) over the eigenvalues l, if A + z I is positive definite.
        log_determinant: log det(A + z I), if A + z I is positive definite.
        negative_share: Sum of |negative eigenvalues| / sum of |all eigenvalues|.
        scale_free: Largest eigenvalues of D A D, in descending order, if more than one was requested. Eigenvalues that
            did not converge are left out.
        autograd: Why the products were computed by torch's double backward, which takes longer; "" if they were not.
        diagonal: The diagonal, if it was requested.
        vectors: Eigenvectors [P, k], the largest first, then the smallest. They are kept on request, saved in the NPZ
            file and never in the JSON file.
    """

    symmetry_error: float
    hessian_vector_products: int
    eigenvalues: tuple[Eigenvalue, ...]
    smallest_eigenvalues: tuple[Eigenvalue, ...]
    trace: Trace | None
    frobenius_norm: float
    scale_free_lambda_max: float
    density: Density | None
    search: Search | None = None
    gradient_share: float = math.nan
    effective_dimension: Functional | None = None
    log_determinant: Functional | None = None
    negative_share: Functional | None = None
    scale_free: tuple[float, ...] = ()
    autograd: str = ""
    diagonal: Diagonal | None = None
    vectors: npt.NDArray[Any] | None = field(default=None, compare=False, repr=False)

    __repr__ = brief
