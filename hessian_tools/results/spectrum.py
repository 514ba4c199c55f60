"""Results of a spectrum analysis: frozen dataclasses that are saved as JSON (readable) and NPZ (arrays).

Figures and comparisons are drawn from these results, without the model. A number that does not exist, such as the
standard error of a single probe, is NaN here and null in the JSON file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hessian_tools.io.files import write_atomically
from hessian_tools.io.json import ARRAYS, ResultError, clean, load_result
from hessian_tools.results.text import brief, headline, with_error

SPECTRUM_SCHEMA = "ikun-hessian/spectrum/1"


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
class SamplePoint:
    """Eigenvalues and traces of the Hessian on subsets of a given size.

    Attributes:
        samples: Number of samples in each subset.
        disjoint: Whether the subsets are disjoint.
        eigenvalues: Eigenvalues in descending order, one tuple for each subset.
        traces: Trace on each subset.
    """

    samples: int
    disjoint: bool
    eigenvalues: tuple[tuple[float, ...], ...]
    traces: tuple[float, ...]

    __repr__ = brief


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
class StepTrace:
    """Trace of the GGN of the loss read out at one time step.

    Attributes:
        step: The step, from 1.
        loss: The loss of the outputs of this step.
        trace: The trace.
    """

    step: int
    loss: float
    trace: Trace

    __repr__ = brief


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


@dataclass(frozen=True)
class LossRise:
    """Adaptive average sharpness of the loss itself, E L(w + radius |w| z) - L(w), by forward passes only.

    The same metric as in a flatness analysis, usually from fewer draws (`analysis.flatness.average_sharpness`). It uses
    no surrogate.

    Attributes:
        estimate: Mean rise of the loss under weight noise.
        stderr: Standard error over the draws.
        data_stderr: Standard error over the data; NaN for a single sample, and where it is only known from below.
        radius: Noise of a weight, relative to its magnitude.
        draws: Number of draws.
        data_stderr_least: Lower limit in place of `data_stderr`, where a few samples carry the variance.
    """

    estimate: float
    stderr: float
    data_stderr: float
    radius: float
    draws: int
    data_stderr_least: float = math.nan


@dataclass(frozen=True)
class SpectrumResult:
    """Spectra of a spectrum analysis and the conditions under which they were measured.

    Attributes:
        schema: Name and version of the file format.
        checkpoint: Source of the weights, such as path and SHA-256.
        data: Data set, split, number of samples and loss.
        network: Network and its surrogate.
        training: Settings and outcome of the training.
        activity: Firing statistics, by layer of neurons.
        settings: Settings of the analysis.
        num_parameters: Number P of parameters.
        parameters: Number of elements of each parameter tensor, by name.
        weight_norms: Norm of each parameter tensor, by name.
        loss: Loss at the weights.
        accuracy: Accuracy at the weights; NaN if the targets are not class labels.
        gradient_norm: Norm of the surrogate gradient.
        dtype: Data type of the operator products.
        device: Device of the computation.
        seed: Random seed.
        sensitivity: lambda_max of the first operator under other conventions, such as another slope of the surrogate.
        spectra: Spectrum of each operator, by name.
        blocks: Spectrum of each layer's diagonal block of the first operator, by layer; empty unless requested.
        warnings: Warnings that follow from the numbers.
        seconds: Run time in seconds.
        versions: Versions of the libraries used.
        samples_curve: Spectrum against the number of samples; empty unless requested.
        loss_rise: How much weight noise raises the loss itself; None if it was not measured or does not exist.
        steps: Traces of the GGN of the loss at every time step; empty unless requested.
    """

    schema: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    activity: dict[str, Any]
    settings: dict[str, Any]
    num_parameters: int
    parameters: dict[str, int]
    weight_norms: dict[str, float]
    loss: float
    accuracy: float
    gradient_norm: float
    dtype: str
    device: str
    seed: int
    sensitivity: dict[str, float]
    spectra: dict[str, Spectrum]
    blocks: dict[str, Spectrum]
    warnings: tuple[str, ...]
    seconds: float
    versions: dict[str, str]
    samples_curve: tuple[SamplePoint, ...] = ()
    loss_rise: LossRise | None = None
    steps: tuple[StepTrace, ...] = ()

    @property
    def main(self) -> tuple[str, Spectrum]:
        """Name and spectrum of the first operator."""
        return next(iter(self.spectra.items()))

    def __repr__(self) -> str:
        lines = [headline(self)]
        for name, s in self.spectra.items():
            parts = [f"lambda_max {with_error(e.value, e)}" for e in s.eigenvalues[:1]]
            parts += [f"lambda_min {with_error(e.value, e)}" for e in s.smallest_eigenvalues[:1]]
            parts += [f"trace {with_error(s.trace.estimate, s.trace)}"] if s.trace else []
            lines.append(f"  {name}: {', '.join(parts)}")
        return "\n".join([*lines, *([f"  {len(self.warnings)} warnings, in .warnings"] if self.warnings else [])])


def to_json(result: SpectrumResult) -> dict[str, Any]:
    """Return the result as a plain dict, without eigenvectors and with None for numbers that are not finite."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if name not in ARRAYS}

    bare = {name: _without_arrays(s) for name, s in result.spectra.items()}
    cleaned: dict[str, Any] = clean(dataclasses.asdict(dataclasses.replace(result, spectra=bare), dict_factory=fields))
    return cleaned


def _without_arrays(spectrum: Spectrum) -> Spectrum:
    diagonal = spectrum.diagonal and dataclasses.replace(spectrum.diagonal, entries=None)
    return dataclasses.replace(spectrum, vectors=None, diagonal=diagonal)


def load_spectrum(path: str | Path) -> SpectrumResult:
    """Read NAME.spectrum.json.

    Args:
        path: The file.

    Returns:
        The result.

    Raises:
        ResultError: If the file is missing, damaged, of another kind or from a newer version.
    """
    result = load_result(path, SpectrumResult, SPECTRUM_SCHEMA)
    if not result.spectra:
        raise ResultError(f"{path}: contains no spectrum")
    for name, spectrum in (*result.spectra.items(), *result.blocks.items()):
        if not spectrum.eigenvalues:
            raise ResultError(f"{path}: the spectrum of {name} has no eigenvalues. Create the spectrum file again.")
    return result


def save_spectrum(result: SpectrumResult, stem: str | Path) -> list[Path]:
    """Write STEM.json and STEM.npz. Each file is written completely or not at all.

    Args:
        result: The result.
        stem: Path without the suffix.

    Returns:
        Paths of the two files.
    """
    arrays: dict[str, Any] = {}
    for name, spectrum in result.spectra.items():
        for kind in ("eigenvalues", "smallest_eigenvalues"):
            pairs: tuple[Eigenvalue, ...] = getattr(spectrum, kind)
            arrays[f"{name}.{kind}"] = np.array([p.value for p in pairs])
            for part in ("residual", "bound", "data_stderr", "data_stderr_least", "gradient", "participation"):
                arrays[f"{name}.{kind}.{part}"] = np.array([getattr(p, part) for p in pairs])
            arrays[f"{name}.{kind}.layers"] = np.array([list(p.layers.values()) for p in pairs])
        found = spectrum.diagonal.entries if spectrum.diagonal else None
        for parameter, entries in (found or {}).items():
            for part, values in zip(("", ".stderr", ".data_stderr"), entries, strict=True):
                arrays[f"{name}.diagonal.{parameter}{part}"] = values
        if spectrum.vectors is not None:
            arrays[f"{name}.vectors"] = spectrum.vectors
        if spectrum.density is not None:
            for i, (x, w) in enumerate(zip(spectrum.density.nodes, spectrum.density.weights, strict=True)):
                arrays[f"{name}.density.{i}"] = np.array([x, w])
    text = json.dumps(to_json(result), indent=1, allow_nan=False) + "\n"
    paths = [Path(f"{stem}.json"), Path(f"{stem}.npz")]
    write_atomically(paths[1], lambda file: np.savez(file, **arrays))
    write_atomically(paths[0], lambda file: file.write(text.encode()))
    return paths
