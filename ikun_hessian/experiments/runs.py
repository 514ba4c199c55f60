"""Training runs and what was measured of them, gathered from the files that the commands leave.

A run NAME is known by NAME.train.json, which `train` writes when it starts and again when it ends; beside it lie the
log NAME.train.jsonl (a line an epoch) and the results NAME[.MOMENT][.TAG].spectrum.json and .flatness.json. MOMENT is
empty for the final weights, epoch0005 for a snapshot and loss0.02 for the first epoch whose training loss was no
larger. A study leaves NAME.robustness.json, and NAME.failed.json, which says what step failed and why. A result
without a NAME.train.json is a run of its own, without a log.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, TypeVar

from hessian_tools.io import json as results
from hessian_tools.io.json import ResultError
from hessian_tools.results.flatness import FLATNESS_SCHEMA, FlatnessResult
from hessian_tools.results.robustness import ROBUSTNESS_SCHEMA, RobustnessResult
from hessian_tools.results.spectrum import SpectrumResult, load_spectrum
from ikun.training.log import TRAINING_SCHEMA

FAILED_SCHEMA = "ikun-hessian/failed/1"
TRAIN, SPECTRUM, FLATNESS = ".train.json", ".spectrum.json", ".flatness.json"
MOMENT = r"(epoch\d+|loss\d[\d.e+-]*)"  # as it stands in the name of a checkpoint on the way
# in a checkpoint's training, but found there and not asked for
OUTCOMES = ("epochs_run", "best_epoch", "failures", "data_sha256", "samples", "saved_at_loss")
R = TypeVar("R")
Report = Callable[[str], None]


@dataclass(frozen=True)
class TrainingRun:
    """One training run. training, network, data: what it was asked for, as the checkpoint has it.

    start: {"seconds", "forward_passes", "layers": [statistics of every layer at initialization, in order]}, None if
    not known. log: a dict an epoch, () without a log. spectra, flatness: by what stands between NAME and the command in
    the file's name ("" for the final weights, "loss0.02", "epoch0005", "loss0.02.ggn"). robustness: of the final
    weights. failures: names of what went wrong in training ("NaN: ...", "dead layer: ..."), and "failed: STEP: why"
    from NAME.failed.json. finished: whether the training came to its end. best_epoch: the one whose weights were kept,
    epochs_run: as many as were trained, None if not known.
    """

    name: str
    training: dict[str, Any]
    network: dict[str, Any]
    data: dict[str, Any]
    start: dict[str, Any] | None = None
    log: tuple[dict[str, Any], ...] = ()
    spectra: dict[str, SpectrumResult] = field(default_factory=dict)
    flatness: dict[str, FlatnessResult] = field(default_factory=dict)
    robustness: RobustnessResult | None = None
    failures: tuple[str, ...] = ()
    finished: bool = True
    best_epoch: int | None = None
    epochs_run: int | None = None

    def value(self, key: str) -> Any:
        """The condition `key` of training, network or data, the first that has it; None if none does."""
        for part in (self.training, self.network, self.data):
            if key in part:
                return part[key]
        return None

    @property
    def diverged(self) -> bool:
        """The training ended in NaN, or a step failed: what it did not reach is censored."""
        return any(f.startswith(("NaN", "failed")) for f in self.failures)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def gather(paths: Sequence[Path], report: Report = _warn) -> list[TrainingRun]:
    """The runs at these paths, by name.

    A path is a folder, searched with all below it; a result or NAME.train.json; or a checkpoint NAME.pt, which stands
    for all that lies beside it under its name. A named result brings its run's log along. Runs of one name from several
    folders get the folder before their names. report: called with one line for every file of a searched folder that is
    damaged or half-written, and for a log's half-written end; a warning by default. Raises ResultError for a path with
    nothing to gather, and for a named file that is missing or damaged.
    """
    files: dict[Path, bool] = {}  # whether the user named the file; in the order of the paths
    given: dict[Path, Path] = {}  # how
    for path in paths:
        named = not path.is_dir()
        for file in _named(path) if named else _searched(path):
            key = Path(os.path.realpath(file))  # Path.resolve raises in a loop of links
            files[key] = files.get(key, False) or named
            given.setdefault(key, file)
    parts: dict[tuple[Path, str], dict[str, Any]] = {}
    names: dict[Path, list[str]] = {}
    for file, named in files.items():
        if file.parent not in names:
            described = (p.name.removesuffix(TRAIN) for p in file.parent.glob(f"*{TRAIN}"))
            names[file.parent] = sorted(described, key=len, reverse=True)
        try:
            name, kind, value = _read(file, names[file.parent])
        except ResultError as error:
            line = str(error).replace(str(file), str(given[file]), 1)
            if named:
                raise ResultError(line) from None
            report(f"{line} (left out)")
            continue
        parts.setdefault((file.parent, name), {TRAIN: {}, SPECTRUM: {}, FLATNESS: {}})[kind].update(value)
    prefixes = _prefixes(list(parts))
    runs = [_run(folder, name, prefixes[folder, name], found, report) for (folder, name), found in parts.items()]
    return sorted(runs, key=lambda run: run.name)


def _searched(folder: Path) -> list[Path]:
    found = [p for p in sorted(folder.rglob("*.json")) if p.name.endswith((TRAIN, SPECTRUM, FLATNESS))]
    if not found:
        raise ResultError(
            f"{folder}: no *{SPECTRUM}, *{FLATNESS} or *{TRAIN} in this folder: run `ikun-hessian train` or `spectrum` "
            "first"
        )
    return found


def _named(path: Path) -> Iterator[Path]:
    """The files of a result, of a description, or of all that lies beside a checkpoint; its NAME.train.json last."""
    if path.suffix == ".pt":
        beside = path.parent.glob("*.json") if path.parent.is_dir() else []
        prefix, kinds = f"{path.stem}.", (TRAIN, SPECTRUM, FLATNESS)
        found = sorted(p for p in beside if p.name.startswith(prefix) and p.name.endswith(kinds))
        if not found:
            missing = path.with_suffix(SPECTRUM)
            raise ResultError(f"{missing}: cannot be read (nothing beside the checkpoint): run `ikun-hessian spectrum`")
        yield from found
    elif not path.name.endswith((TRAIN, SPECTRUM, FLATNESS)):
        raise ResultError(f"{path}: no folder, checkpoint (.pt) or result (*{SPECTRUM}, *{FLATNESS}, *{TRAIN})")
    else:
        yield path
    known = [p for p in path.parent.glob(f"*{TRAIN}") if path.name.startswith(f"{p.name.removesuffix(TRAIN)}.")]
    yield from sorted(known, key=lambda p: len(p.name))[-1:]


def _read(file: Path, names: Sequence[str]) -> tuple[str, str, dict[str, Any]]:
    """(run, kind of the file, what it holds by key). names: the runs described in its folder, longest first."""
    if file.name.endswith(TRAIN):
        return file.name.removesuffix(TRAIN), TRAIN, {"": results.load_result(file, _Described, TRAINING_SCHEMA)}
    found: SpectrumResult | FlatnessResult
    if file.name.endswith(SPECTRUM):
        kind, found = SPECTRUM, load_spectrum(file)
    else:
        kind, found = FLATNESS, results.load_result(file, FlatnessResult, FLATNESS_SCHEMA)
    whole = file.name.removesuffix(kind)
    checkpoint = PurePath(str(found.checkpoint.get("path", ""))).stem
    own = re.sub(rf"\.{MOMENT}$", "", checkpoint)
    name = next((n for n in (*names, own) if n and (whole == n or whole.startswith(f"{n}."))), whole)
    return name, kind, {whole[len(name) + 1 :]: found}


@dataclass(frozen=True)
class _Described:
    """NAME.train.json, as far as a run keeps it."""

    schema: str
    network: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    finished: bool
    best_epoch: int
    failures: tuple[str, ...]
    start: dict[str, Any] | None = None
    epochs_run: int | None = None


@dataclass(frozen=True)
class _Failed:
    schema: str
    step: str
    error: str


def _run(folder: Path, name: str, shown: str, found: dict[str, Any], report: Report) -> TrainingRun:
    spectra, sharpness = (dict(sorted(found[kind].items())) for kind in (SPECTRUM, FLATNESS))
    if described := found[TRAIN].get(""):
        kept = ("network", "data", "training", "start", "finished", "best_epoch", "epochs_run")
        known = {key: getattr(described, key) for key in kept}
        failures = described.failures
    else:
        known, failures = _from_result(next(iter((*spectra.values(), *sharpness.values()))))
    if failed := _beside(folder / f"{name}.failed.json", _Failed, FAILED_SCHEMA, report):
        failures = (*failures, f"failed: {failed.step}: {failed.error}")
    known["robustness"] = _beside(folder / f"{name}.robustness.json", RobustnessResult, ROBUSTNESS_SCHEMA, report)
    log = _log(folder / f"{name}.train.jsonl", report)
    return TrainingRun(shown, log=log, spectra=spectra, flatness=sharpness, failures=failures, **known)


def _beside(path: Path, kind: type[R], schema: str, report: Report) -> R | None:
    """What a study leaves beside a run; None where it did not, or where it is damaged."""
    if not path.is_file():
        return None
    try:
        return results.load_result(path, kind, schema)
    except ResultError as error:
        report(f"{error} (left out)")
        return None


def _from_result(result: SpectrumResult | FlatnessResult) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a result says of its run: the surrogate trained with, not that of the analysis."""
    training, network = result.training, result.network
    if "trained_surrogate" in network:
        network = {**network, "surrogate": network["trained_surrogate"]}
    data = {"name": result.data.get("name"), "sha256": training.get("data_sha256"), "samples": training.get("samples")}
    asked = {key: value for key, value in training.items() if key not in OUTCOMES}
    best, last = (v if isinstance(v := training.get(key), int) else None for key in ("best_epoch", "epochs_run"))
    known: dict[str, Any] = {"training": asked, "network": network, "data": data, "best_epoch": best}
    return {**known, "epochs_run": last}, tuple(map(str, training.get("failures", ())))


def _log(path: Path, report: Report) -> tuple[dict[str, Any], ...]:
    """The epochs of a log from the first on, () without one; a line that a running or killed training left half-written
    ends it, and so does one that is missing."""
    lines: list[dict[str, Any]] = []
    try:
        text = results.read_text(path)
    except results.MissingError:
        return ()
    except ResultError as error:
        report(f"{error} (left out)")
        return ()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = results.parse_json(line)
        except ResultError:
            value = None
        if not isinstance(value, dict) or type(value.get("epoch")) is not int or value["epoch"] != number:
            report(f"{path}: line {number} is not epoch {number} of a log (left out with all that follow)")
            break
        lines.append(value)
    return tuple(lines)


def _prefixes(keys: Sequence[tuple[Path, str]]) -> dict[tuple[Path, str], str]:
    """The name of every (folder, name), with as much of the folder before it as tells it from its namesakes."""
    shown = {}
    for folder, name in keys:
        others = [other for other, same in keys if same == name and other != folder]
        depth = 0
        while any(other.parts[-depth:] == folder.parts[-depth:] if depth else True for other in others):
            depth += 1
        shown[folder, name] = "/".join([*(folder.parts[-depth:] if depth else ()), name])
    return shown
