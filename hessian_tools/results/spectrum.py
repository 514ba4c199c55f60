"""What an analysis found, as frozen dataclasses that save to JSON (what a person or jq reads) and npz (arrays).

Figures and comparisons are drawn from these alone, never from a model. Numbers that do not exist (the standard error
of one probe) are NaN here and null in the JSON.
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
from hessian_tools.io.json import ResultError, clean, load_result

SPECTRUM_SCHEMA = "ikun-hessian/spectrum/1"


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue lies within `residual` of `value` for the samples used; `data_stderr` is the standard error of
    `value` as an estimate over all data these samples were drawn from. layers: share of each parameter in the
    eigenvector's squared norm. bound: Kato and Temple's residual^2 / gap where that is smaller than the residual, the
    gap taken from the other Ritz values. gradient: share of the gradient's squared norm along the eigenvector.
    participation: 1 / (P sum v_i^4), the share of the weights that takes part: 1 if all alike, 1/P for a single one.
    """

    value: float
    residual: float
    data_stderr: float
    converged: bool
    layers: dict[str, float]
    bound: float = math.nan
    gradient: float = math.nan
    participation: float = math.nan


@dataclass(frozen=True)
class Search:
    """How sure we are that no eigenvalue beyond the printed ones was missed.

    steps: dimension of the first Krylov space, from a random start. excess: with 95% probability over the start no
    eigenvalue lies farther than this beyond the outermost ones found (Kuczynski & Wozniakowski 1992). starts: other,
    independent random starts of `start_steps` steps on the complement of the converged pairs; largest and smallest:
    the outermost values that they found there.
    """

    steps: int
    excess: float
    starts: int
    start_steps: int
    largest: float
    smallest: float


@dataclass(frozen=True)
class Functional:
    """tr f(A), or a ratio of such traces, by stochastic quadrature: stderr and ci95 from the probes; quadrature_error:
    change from half as many Lanczos steps. damping: the z in f, NaN where f has none."""

    estimate: float
    stderr: float
    ci95: tuple[float, float]
    probes: int
    quadrature_error: float
    damping: float = math.nan


@dataclass(frozen=True)
class SamplePoint:
    """Eigenvalues (largest first, one tuple a resample) and traces of the Hessian on `samples` samples."""

    samples: int
    disjoint: bool
    eigenvalues: tuple[tuple[float, ...], ...]
    traces: tuple[float, ...]


@dataclass(frozen=True)
class Trace:
    """Hutchinson estimate: stderr and ci95 from the probes, data_stderr from the spread over the data."""

    estimate: float
    stderr: float
    ci95: tuple[float, float]
    probes: int
    data_stderr: float


@dataclass(frozen=True)
class Density:
    """One quadrature of the spectral density per probe, weights summing to 1. The first `atoms` nodes of each are
    deflated eigenvalues of weight 1/P. accuracy: Wasserstein distance to the quadrature of half as many steps, over the
    range of the spectrum, largest of the probes."""

    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    probes: int
    steps: int
    atoms: int
    accuracy: float = math.nan


@dataclass(frozen=True)
class Spectrum:
    """One operator's spectrum. scale_free_lambda_max: largest eigenvalue of D A D, D the norm of the filter (row of
    weights) that each weight belongs to, so that rescaling filters before a BatchNorm does not change it. scale_free:
    the largest of these, descending, where more than one was asked for; those that did not converge are left out.

    gradient_share: share of the gradient's squared norm in the span of the converged largest eigenvectors.
    effective_dimension: sum l / (l + z); log_determinant: log det(A + z I); both where A + z I is positive definite.
    negative_share: sum of |negative eigenvalues| / sum of |all|. vectors: eigenvectors [P, k], the largest then the
    smallest, saved in the npz on request and never in the JSON.
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
    vectors: npt.NDArray[Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class SpectrumResult:
    """Everything that `spectrum` measured, and what it was measured on.

    spectra: by operator. blocks: by layer, of the first operator's diagonal blocks; empty unless asked for.
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

    @property
    def main(self) -> tuple[str, Spectrum]:
        """The first operator asked for, by name."""
        return next(iter(self.spectra.items()))


def to_json(result: SpectrumResult) -> dict[str, Any]:
    """A plain dict with null for what is not finite, without the eigenvectors."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if name != "vectors"}

    bare = {name: dataclasses.replace(s, vectors=None) for name, s in result.spectra.items()}
    cleaned: dict[str, Any] = clean(dataclasses.asdict(dataclasses.replace(result, spectra=bare), dict_factory=fields))
    return cleaned


def load_spectrum(path: str | Path) -> SpectrumResult:
    """Read NAME.spectrum.json. Raises ResultError for a missing, foreign, damaged or newer file."""
    result = load_result(path, SpectrumResult, SPECTRUM_SCHEMA)
    if not result.spectra:
        raise ResultError(f"{path}: holds no spectrum")
    return result


def save_spectrum(result: SpectrumResult, stem: str | Path) -> list[Path]:
    """Write STEM.json and STEM.npz, each complete or not at all; returns the paths."""
    arrays: dict[str, Any] = {}
    for name, spectrum in result.spectra.items():
        for kind in ("eigenvalues", "smallest_eigenvalues"):
            pairs: tuple[Eigenvalue, ...] = getattr(spectrum, kind)
            arrays[f"{name}.{kind}"] = np.array([p.value for p in pairs])
            for part in ("residual", "bound", "data_stderr", "gradient", "participation"):
                arrays[f"{name}.{kind}.{part}"] = np.array([getattr(p, part) for p in pairs])
            arrays[f"{name}.{kind}.layers"] = np.array([list(p.layers.values()) for p in pairs])
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
