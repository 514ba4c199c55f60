"""Collect training runs and their measurements from the files that the commands write.

A run called NAME is identified by `NAME.train.json`, which `train` writes when it starts and again when it ends. The
same folder holds its log `NAME.train.jsonl` (one line per epoch) and the results `NAME[.MOMENT][.TAG].spectrum.json`
and `NAME[.MOMENT][.TAG].flatness.json`. MOMENT is empty for the final weights, `epoch0005` for a snapshot, and
`loss0.02` for the first epoch whose training loss was at most 0.02. A study also writes `NAME.robustness.json`, and
`NAME.failed.json` if a step failed. A result without a `NAME.train.json` is treated as a run without a log.
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
from ikun_hessian.experiments.staleness import StaleError, refuse_stale

FAILED_SCHEMA = "ikun-hessian/failed/1"
TRAIN, SPECTRUM, FLATNESS = ".train.json", ".spectrum.json", ".flatness.json"
MOMENT = r"(epoch\d+|loss\d[\d.e+-]*)"  # as written in the name of a checkpoint saved during training
# Outcomes that a checkpoint stores among its training settings.
OUTCOMES = ("epochs_run", "best_epoch", "failures", "data_sha256", "samples", "saved_at_loss")
R = TypeVar("R")
Report = Callable[[str], None]


@dataclass(frozen=True)
class TrainingRun:
    """One training run with its log and its results.

    Attributes:
        name: Name of the run. It is preceded by its folder if several runs have the same name.
        training: Training settings that were requested, as recorded in the checkpoint.
        network: Network settings that were requested.
        data: Data settings that were requested.
        start: State at initialization: "seconds", "forward_passes" and "layers" (statistics of each layer, in order).
            None if unknown.
        log: One dictionary per epoch; empty without a log.
        spectra: Spectra by the part of the file name between NAME and the kind of result: "" for the final weights,
            otherwise for instance "loss0.02", "epoch0005" or "loss0.02.ggn".
        flatness: Flatness results, with the same keys.
        robustness: Robustness of the final weights, or None.
        failures: Problems in training ("NaN: ...", "dead layer: ...") and "failed: STEP: reason" from NAME.failed.json.
        finished: Whether training ran to its end.
        best_epoch: Epoch whose weights were kept, or None if unknown.
        epochs_run: Number of epochs that were trained, or None if unknown.
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
        """Return the setting `key` from training, network or data (the first that contains it), or None."""
        for part in (self.training, self.network, self.data):
            if key in part:
                return part[key]
        return None

    @property
    def diverged(self) -> bool:
        """Whether training ended in NaN or a step failed. Whatever the run did not reach is censored."""
        return any(f.startswith(("NaN", "failed")) for f in self.failures)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def gather(paths: Sequence[Path], report: Report = _warn) -> list[TrainingRun]:
    """Collect the training runs found at the given paths.

    Args:
        paths: Folders, which are searched recursively; results or `NAME.train.json` files, which bring along the log of
            their run; or checkpoints `NAME.pt`, which stand for all results of that name in the same folder.
        report: Called with one line for each damaged, incomplete or stale file in a searched folder, for each stale
            result of a checkpoint, and for each log that ends in an incomplete line. By default the line is issued as a
            warning.

    Returns:
        The runs, sorted by name. If runs in different folders have the same name, the folder precedes the name.

    Raises:
        ResultError: If a path contains no results, or a file given by name is missing, damaged or stale (its checkpoint
            has other weights now), or all results of a checkpoint are stale.
    """
    files: dict[Path, bool] = {}  # True if the user gave the file by name
    given: dict[Path, Path] = {}  # the path as the user wrote it
    standing: dict[Path, Path] = {}  # results that were not named themselves: the checkpoint that stands for them
    for path in paths:
        named = not path.is_dir()
        for file in _named(path) if named else _searched(path):
            key = Path(os.path.realpath(file))  # Path.resolve raises in a loop of links
            files[key] = files.get(key, False) or named
            given.setdefault(key, file)
        if path.suffix == ".pt":
            standing |= {Path(os.path.realpath(file)): path for file in _named(path) if not file.name.endswith(TRAIN)}
    parts: dict[tuple[Path, str], dict[str, Any]] = {}
    stale: dict[Path, str] = {}
    names: dict[Path, list[str]] = {}
    for file, named in files.items():
        if file.parent not in names:
            described = (p.name.removesuffix(TRAIN) for p in file.parent.glob(f"*{TRAIN}"))
            names[file.parent] = sorted(described, key=len, reverse=True)
        try:
            name, kind, value = _read(file, names[file.parent])
        except ResultError as error:
            line = str(error).replace(str(file), str(given[file]), 1)
            if isinstance(error, StaleError):
                stale[file] = line = line.replace(f"{file.parent}{os.sep}", str(given[file])[: -len(given[file].name)])
            if named and not (file in stale and file in standing):
                raise ResultError(line) from None
            report(f"{line} (skipped)")
            continue
        parts.setdefault((file.parent, name), {TRAIN: {}, SPECTRUM: {}, FLATNESS: {}})[kind].update(value)
    for checkpoint in set(standing.values()):
        lines = [stale.get(file, "") for file, path in standing.items() if path == checkpoint]
        if lines and all(lines):
            raise StaleError(lines[0])
    prefixes = _prefixes(list(parts))
    runs = [_run(folder, name, prefixes[folder, name], found, report) for (folder, name), found in parts.items()]
    return sorted(runs, key=lambda run: run.name)


def _searched(folder: Path) -> list[Path]:
    """Return the results and run descriptions below a folder."""
    found = [p for p in sorted(folder.rglob("*.json")) if p.name.endswith((TRAIN, SPECTRUM, FLATNESS))]
    if not found:
        raise ResultError(
            f"{folder}: no *{SPECTRUM}, *{FLATNESS} or *{TRAIN} in this folder: run `ikun-hessian train` or "
            "`ikun-hessian spectrum` first"
        )
    return found


def _named(path: Path) -> Iterator[Path]:
    """Yield the files that a named path stands for, then the `NAME.train.json` of its run."""
    if path.suffix == ".pt":
        beside = path.parent.glob("*.json") if path.parent.is_dir() else []
        prefix, kinds = f"{path.stem}.", (TRAIN, SPECTRUM, FLATNESS)
        found = sorted(p for p in beside if p.name.startswith(prefix) and p.name.endswith(kinds))
        if not found:
            missing = path.with_suffix(SPECTRUM)
            raise ResultError(
                f"{missing}: cannot be read (no results next to the checkpoint): run `ikun-hessian spectrum {path}`"
            )
        yield from found
    elif not path.name.endswith((TRAIN, SPECTRUM, FLATNESS)):
        near = next((p for end in (SPECTRUM, FLATNESS) if (p := path.with_suffix(end)).is_file()), None)
        hint = f": did you mean {near}?" if near else f" (*{SPECTRUM}, *{FLATNESS}, *{TRAIN})"
        raise ResultError(f"{path}: not a folder, a checkpoint (.pt) or a result{hint}")
    else:
        yield path
    known = [p for p in path.parent.glob(f"*{TRAIN}") if path.name.startswith(f"{p.name.removesuffix(TRAIN)}.")]
    yield from sorted(known, key=lambda p: len(p.name))[-1:]


def _read(file: Path, names: Sequence[str]) -> tuple[str, str, dict[str, Any]]:
    """Return the run's name, the kind of the file, and its content by key.

    `names` lists the runs described in the folder, longest name first.
    """
    if file.name.endswith(TRAIN):
        return file.name.removesuffix(TRAIN), TRAIN, {"": results.load_result(file, _Described, TRAINING_SCHEMA)}
    found: SpectrumResult | FlatnessResult
    if file.name.endswith(SPECTRUM):
        kind, found = SPECTRUM, load_spectrum(file)
    else:
        kind, found = FLATNESS, results.load_result(file, FlatnessResult, FLATNESS_SCHEMA)
    refuse_stale(file, found.checkpoint)
    whole = file.name.removesuffix(kind)
    checkpoint = PurePath(str(found.checkpoint.get("path", ""))).stem
    own = re.sub(rf"\.{MOMENT}$", "", checkpoint)
    name = next((n for n in (*names, own) if n and (whole == n or whole.startswith(f"{n}."))), whole)
    return name, kind, {whole[len(name) + 1 :]: found}


@dataclass(frozen=True)
class _Described:
    """The fields of NAME.train.json that a run keeps."""

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
    """The content of NAME.failed.json."""

    schema: str
    step: str
    error: str


def _run(folder: Path, name: str, shown: str, found: dict[str, Any], report: Report) -> TrainingRun:
    """Assemble one run from its description, results, log and the files of a study."""
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
    """Load a file that a study wrote for the run; None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        found = results.load_result(path, kind, schema)
        refuse_stale(path, getattr(found, "checkpoint", {}))
    except ResultError as error:
        report(f"{error} (skipped)")
        return None
    return found


def _from_result(result: SpectrumResult | FlatnessResult) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields of a run that a result records, and the run's failures.

    The surrogate is the one used in training, which may differ from the one used in the analysis.
    """
    training, network = result.training, result.network
    if "trained_surrogate" in network:
        network = {**network, "surrogate": network["trained_surrogate"]}
    data = {"name": result.data.get("name"), "sha256": training.get("data_sha256"), "samples": training.get("samples")}
    asked = {key: value for key, value in training.items() if key not in OUTCOMES}
    best, last = (v if isinstance(v := training.get(key), int) else None for key in ("best_epoch", "epochs_run"))
    known: dict[str, Any] = {"training": asked, "network": network, "data": data, "best_epoch": best}
    return {**known, "epochs_run": last}, tuple(map(str, training.get("failures", ())))


def _log(path: Path, report: Report) -> tuple[dict[str, Any], ...]:
    """Return the epochs of a log, or () if there is none.

    The log is cut at the first line that is incomplete (as in a running or killed training) or out of sequence.
    """
    lines: list[dict[str, Any]] = []
    try:
        text = results.read_text(path)
    except results.MissingError:
        return ()
    except ResultError as error:
        report(f"{error} (skipped)")
        return ()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = results.parse_json(line)
        except ResultError:
            value = None
        if not isinstance(value, dict) or type(value.get("epoch")) is not int or value["epoch"] != number:
            report(
                f"{path}: line {number} is not a valid entry for epoch {number} (it and all later lines are skipped)"
            )
            break
        lines.append(value)
    return tuple(lines)


def _prefixes(keys: Sequence[tuple[Path, str]]) -> dict[tuple[Path, str], str]:
    """Return the displayed name of each (folder, name): as few parent folders as make it unique, and the name."""
    shown = {}
    for folder, name in keys:
        others = [other for other, same in keys if same == name and other != folder]
        depth = 0
        while any(other.parts[-depth:] == folder.parts[-depth:] if depth else True for other in others):
            depth += 1
        shown[folder, name] = "/".join([*(folder.parts[-depth:] if depth else ()), name])
    return shown
