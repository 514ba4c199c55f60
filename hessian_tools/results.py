"""What an analysis found, as frozen dataclasses that save to JSON (what a person or jq reads) and npz (arrays).

Figures and comparisons are drawn from these alone, never from a model. Numbers that do not exist (the standard error
of one probe) are NaN here and null in the JSON.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import types
import typing
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

SCHEMA = "ikun-hessian/spectrum/1"
MOST_BYTES = 2**25  # of a text file: parsed, one of nothing but brackets takes 25 times as much memory
LONGEST = 1000  # characters of an error line
DEEPEST = 30  # lists and objects in one another


class ResultError(ValueError):
    """A result file that cannot be used: one line that names it and says why."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST else f"{message[:LONGEST]} ...")  # it quotes the file


class MissingError(ResultError):
    """There is no such file."""


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


class Analysed(typing.Protocol):
    """What every result says about the weights it was measured at."""

    @property
    def checkpoint(self) -> dict[str, Any]: ...
    @property
    def data(self) -> dict[str, Any]: ...
    @property
    def network(self) -> dict[str, Any]: ...
    @property
    def training(self) -> dict[str, Any]: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def seed(self) -> int: ...


class AnalysedParts(Analysed, typing.Protocol):
    """The same with the size of every parameter."""

    @property
    def parameters(self) -> dict[str, int]: ...


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
        optional = {f.name for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
        if missing := [name for name in hints if name not in value and name not in optional]:
            raise ResultError(f"field '{where}' lacks {', '.join(missing)}")
        known = {name: hint for name, hint in hints.items() if name in value and name != "vectors"}
        return kind(**{name: _build(hint, value[name], f"{where}.{name}") for name, hint in known.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        if Ellipsis not in arguments and len(value) != len(arguments):
            raise ResultError(f"field '{where}' has not {len(arguments)} entries")
        return tuple(_build(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
        return math.nan if value is None else float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ResultError(f"field '{where}' is not {getattr(kind, '__name__', kind)}")


R = typing.TypeVar("R")


def load(path: str | Path, kind: type[R], schema: str) -> R:
    """Read a result of the dataclass `kind` from JSON; schema: "ikun-hessian/COMMAND/VERSION", what the file must say.

    Raises ResultError for a missing, foreign, damaged or newer file.
    """
    text = read_text(path)
    try:
        values = parsed(text)
    except ResultError as error:
        raise ResultError(f"{path}: {error}: run `ikun-hessian {schema.split('/')[1]}` again") from None
    try:
        return from_plain(values, kind, schema)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None


def read_text(path: str | Path) -> str:
    """A text file of a sensible size. Raises ResultError, MissingError where there is none."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ResultError(f"{path}: cannot be read (a folder or device, and no file)")
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ResultError(f"{path}: cannot be read (more than {MOST_BYTES:,} bytes)")
        return data.decode("utf-8")
    except FileNotFoundError as error:
        raise MissingError(f"{path}: cannot be read ({error.strerror})") from None
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ResultError(f"{path}: no text file") from None


def parsed(text: str) -> Any:
    """What a JSON text holds, with numbers, names and depths that the rest can count on. Raises ResultError."""
    try:
        return _legal(json.loads(text, parse_constant=_no_number), 0)
    except ResultError:
        raise
    except (ValueError, RecursionError):  # int() refuses thousands of digits with a ValueError
        raise ResultError("not a JSON file") from None


def _no_number(word: str) -> Any:
    raise ResultError(f"not a JSON file ({word} in it)")


def _legal(value: Any, depth: int) -> Any:
    """The value, its texts without what is no character or commands a terminal."""
    if depth > DEEPEST:
        raise ResultError(f"more than {DEEPEST} lists and objects in one another")
    if isinstance(value, dict):
        return {_legal(k, depth + 1): _legal(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_legal(v, depth + 1) for v in value]
    if isinstance(value, str):
        return value if value.isprintable() else "".join(c if c.isprintable() or c == "\n" else "?" for c in value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ResultError("a whole number of more than 64 bits")
    if isinstance(value, float) and abs(value) > 1e150:  # whose square is no number
        raise ResultError("a number beyond 1e150")
    return value


def from_plain(values: Any, kind: type[R], schema: str) -> R:
    """A result of the dataclass `kind` from what its JSON holds. Raises ResultError for anything else."""
    command = schema.split("/")[1]
    found = values.get("schema") if isinstance(values, dict) else None
    if found != schema:
        raise ResultError(f"not a {command} of this version (schema {found!r}, expected {schema!r})")
    try:
        result: R = _build(kind, values, "result")
    except ValueError as error:  # a dataclass that checks its fields raises its own kind
        raise ResultError(f"{error}: run `ikun-hessian {command}` again") from None
    return result


def save(result: Any, path: Path) -> None:
    """Write a result, a dataclass with a field `schema`, as JSON: complete or not at all."""
    text = json.dumps(clean(dataclasses.asdict(result)), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_spectrum(path: str | Path) -> SpectrumResult:
    """Read NAME.spectrum.json. Raises ResultError for a missing, foreign, damaged or newer file."""
    result = load(path, SpectrumResult, SCHEMA)
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


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """CSV with one line a row; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write through a temporary file in the same folder, then rename: the file is whole or as it was. An OSError names
    `path`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An OSError names this file, where that of a full disk names none and that of a folder a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise
