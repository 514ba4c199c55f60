"""Results of a spectrum analysis: frozen dataclasses that are saved as JSON (readable) and NPZ (arrays).

Figures and comparisons are drawn from these results, without the model. A number that does not exist, such as the
standard error of a single probe, is NaN here and null in the JSON file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hessian_tools.io.files import write_atomically
from hessian_tools.io.json import ARRAYS, ResultError, clean, load_result
from hessian_tools.results.operator_spectrum import Eigenvalue, Spectrum, Trace
from hessian_tools.results.text import brief, headline, with_error

SPECTRUM_SCHEMA = "ikun-hessian/spectrum/1"


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
