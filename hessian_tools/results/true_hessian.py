"""Results of an analysis of the smoothed loss's own Hessian, from values of the loss only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hessian_tools.io.json import load_result
from hessian_tools.results.text import brief, headline, rounded

TRUE_HESSIAN_SCHEMA = "ikun-hessian/true-hessian/1"


@dataclass(frozen=True)
class DrawMean:
    """A mean over independent observations, each from its own draws of the noise.

    Attributes:
        value: The mean.
        stderr: Its standard error over the draws. The error over the samples is not in it.
        ci95: Its 95% confidence interval over the draws; NaN for fewer than 10 observations, or if all are equal: then
            none of the draws changed what is measured, and nothing is known about rarer changes.
        observations: Number of observations.
        concentration: Largest share of one observation in the variance. Above 0.3 the mean hangs on a few draws, and
            the interval can be too short.
    """

    value: float
    stderr: float
    ci95: tuple[float, float]
    observations: int
    concentration: float = math.nan


@dataclass(frozen=True)
class TrueEigenvalue:
    """Curvature of the smoothed loss along an estimated eigenvector v (unit norm, in units of the noise).

    Attributes:
        form: v'Hv from draws that v does not depend on. It is unbiased for this v, and v'Hv is never above the largest
            eigenvalue of H and never below the smallest.
        layers: Share of each parameter tensor in the squared norm of v, by name.
        given: Share of the squared norm of v in the span of the given directions; 0 without any.
    """

    form: DrawMean
    layers: dict[str, float]
    given: float

    __repr__ = brief


@dataclass(frozen=True)
class GivenDirection:
    """Curvature of the smoothed loss along an eigenvector u of another operator A, in units of the noise.

    Attributes:
        operator: Name of A.
        rank: Rank of its eigenvalue: 1 for the largest, P for the smallest.
        predicted: Its eigenvalue u'DADu.
        form: The curvature u'Hu, unbiased.
    """

    operator: str
    rank: int
    predicted: float
    form: DrawMean

    __repr__ = brief


@dataclass(frozen=True)
class EigenvectorSearch:
    """The search for eigenvectors, by the eigenvectors of a sample estimate of H.

    Attributes:
        draws: Number K of its draws of noise for each group of samples, in pairs z and -z.
        spread: Standard deviation of an entry of the sample estimate off the diagonal, times sqrt(K).
        threshold: spread * sqrt(P / K). An eigenvalue below it cannot be found (the limit of a spiked random matrix).
            An eigenvector with eigenvalue l above it is found with a squared cosine of about 1 - (threshold / l)^2.
        largest: Largest eigenvalue of the sample estimate. On average it is at least the largest eigenvalue of H.
        smallest: Smallest eigenvalue of the sample estimate. On average it is at most the smallest eigenvalue of H.
        agreement: Squared cosines of the principal angles between the eigenvectors that the two halves of the draws
            find, in descending order. 1: both find this direction. Directions that are noise have about n / P, with n
            the number of eigenvectors.
    """

    draws: int
    spread: float
    threshold: float
    largest: float
    smallest: float
    agreement: tuple[float, ...]

    __repr__ = brief


@dataclass(frozen=True)
class TrueHessianResult:
    """The Hessian of the smoothed loss, and the conditions under which it was measured.

    L_s(w) = E L(w + s D z), z standard normal, has the Hessian H_s; D is the diagonal matrix of the root mean square of
    each weight's filter. All numbers are about H = D H_s D: curvature in units of the noise, per unit of s. No
    surrogate is involved.

    Attributes:
        schema: Name and version of the file format.
        checkpoint: Source of the weights, such as path and SHA-256.
        data: Data set, split, number of samples and loss.
        network: Network and its surrogate.
        training: Settings and outcome of the training.
        settings: Settings of the analysis.
        num_parameters: Number P of parameters.
        parameters: Number of elements of each parameter tensor, by name.
        fixed: Number of weights without noise, because their filter is zero.
        loss: Loss L at the weights.
        smoothed_loss: The smoothed loss L_s.
        trace: Trace of H. Unbiased.
        eigenvalues: Estimates for the largest eigenvalues, in the order of an earlier estimate from other draws. (To
            sort by these values would bias the first one upward.)
        smallest_eigenvalues: Estimates for the smallest eigenvalues, in the order of that earlier estimate.
        directions: Curvature along the eigenvectors of other operators; empty unless requested.
        search: The search for eigenvectors; None if there was none, because P is too large for the draws.
        passes: Number of forward passes over all samples, by stage.
        groups: Number of groups of samples, each with its own draws.
        dtype: Data type of the forward passes.
        device: Device of the computation.
        seed: Random seed.
        warnings: Warnings that follow from the numbers.
        seconds: Run time in seconds.
        versions: Versions of the libraries used.
    """

    schema: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    settings: dict[str, Any]
    num_parameters: int
    parameters: dict[str, int]
    fixed: int
    loss: float
    smoothed_loss: DrawMean
    trace: DrawMean
    eigenvalues: tuple[TrueEigenvalue, ...]
    smallest_eigenvalues: tuple[TrueEigenvalue, ...]
    directions: tuple[GivenDirection, ...]
    search: EigenvectorSearch | None
    passes: dict[str, int]
    groups: int
    dtype: str
    device: str
    seed: int
    warnings: tuple[str, ...]
    seconds: float
    versions: dict[str, str]

    @property
    def noise(self) -> float:
        """The noise scale s."""
        return float(self.settings["noise"])

    def __repr__(self) -> str:
        parts = [f"lambda_max {shown(e.form)} or more" for e in self.eigenvalues[:1]]
        parts += [f"trace {shown(self.trace)}"]
        return f"{headline(self)}\n  noise {self.noise:g}, in units of the noise: {', '.join(parts)}"


def shown(mean: DrawMean) -> str:
    """Format a mean and its standard error over the draws. "not seen": no draw changed the loss."""
    if mean.value == mean.stderr == 0:
        return "not seen"
    return f"{mean.value:.3g} +- {rounded(mean.stderr, 1)}"


def load_true_hessian(path: str | Path) -> TrueHessianResult:
    """Read NAME.true.json.

    Args:
        path: The file.

    Returns:
        The result.

    Raises:
        ResultError: If the file is missing, damaged, of another kind or from a newer version.
    """
    return load_result(path, TrueHessianResult, TRUE_HESSIAN_SCHEMA)
