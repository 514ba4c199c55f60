"""What an analysis found, as frozen dataclasses that save to JSON (what a person or jq reads) and npz (arrays).

Figures and comparisons are drawn from these alone, never from a model. Numbers that do not exist (the standard error
of one probe) are NaN here and null in the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

SCHEMA = "ikun-hessian/spectrum/1"


class ResultError(ValueError):
    """A result file that cannot be used: one line that names it and says why."""


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue lies within `residual` of `value` for the samples used; `data_stderr` is the standard error of
    `value` as an estimate over all data these samples were drawn from. layers: share of each parameter in the
    eigenvector's squared norm."""

    value: float
    residual: float
    data_stderr: float
    converged: bool
    layers: dict[str, float]


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
    deflated eigenvalues of weight 1/P."""

    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    probes: int
    steps: int
    atoms: int


@dataclass(frozen=True)
class Spectrum:
    """One operator's spectrum. scale_free_lambda_max: largest eigenvalue of D A D, D the norm of the filter (row of
    weights) that each weight belongs to, so that rescaling filters before a BatchNorm does not change it."""

    symmetry_error: float
    hessian_vector_products: int
    eigenvalues: tuple[Eigenvalue, ...]
    smallest_eigenvalues: tuple[Eigenvalue, ...]
    trace: Trace | None
    frobenius_norm: float
    scale_free_lambda_max: float
    density: Density | None


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

    @property
    def main(self) -> tuple[str, Spectrum]:
        """The first operator asked for, by name."""
        return next(iter(self.spectra.items()))


def to_json(result: SpectrumResult) -> dict[str, Any]:
    """A plain dict with null for what is not finite."""
    cleaned: dict[str, Any] = clean(dataclasses.asdict(result))
    return cleaned


def clean(value: Any) -> Any:
    """Plain values for JSON: null for what is not finite, lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of the annotated type from JSON; raises ResultError naming the field that does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(arguments[0], value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        if missing := [name for name in hints if name not in value]:
            raise ResultError(f"field '{where}' lacks {', '.join(missing)}")
        return kind(**{name: _build(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        return tuple(_build(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
        return math.nan if value is None else float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ResultError(f"field '{where}' is not {getattr(kind, '__name__', kind)}")


def load_spectrum(path: str | Path) -> SpectrumResult:
    """Read NAME.spectrum.json. Raises ResultError for a missing, foreign, damaged or newer file."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ResultError(f"{path}: not a JSON file: run `ikun-hessian spectrum` again") from None
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise ResultError(f"{path}: not a spectrum of this version (schema {schema!r}, expected {SCHEMA!r})")
    try:
        result: SpectrumResult = _build(SpectrumResult, values, "result")
    except ResultError as error:
        raise ResultError(f"{path}: {error}: run `ikun-hessian spectrum` again") from None
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
            arrays[f"{name}.{kind}.residual"] = np.array([p.residual for p in pairs])
            arrays[f"{name}.{kind}.data_stderr"] = np.array([p.data_stderr for p in pairs])
            arrays[f"{name}.{kind}.layers"] = np.array([list(p.layers.values()) for p in pairs])
        if spectrum.density is not None:
            for i, (x, w) in enumerate(zip(spectrum.density.nodes, spectrum.density.weights, strict=True)):
                arrays[f"{name}.density.{i}"] = np.array([x, w])
    text = json.dumps(to_json(result), indent=1, allow_nan=False) + "\n"
    paths = [Path(f"{stem}.json"), Path(f"{stem}.npz")]
    write_atomically(paths[1], lambda file: np.savez(file, **arrays))
    write_atomically(paths[0], lambda file: file.write(text.encode()))
    return paths


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write through a temporary file in the same folder, then rename: the file is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
