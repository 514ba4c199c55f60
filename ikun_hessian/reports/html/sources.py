"""Collect what a report shows: training runs with their results, landscapes, and paths of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TypeVar

from hessian_tools.io.json import ResultError, load_result
from hessian_tools.results.landscape import LANDSCAPE_SCHEMA, LandscapeResult
from hessian_tools.results.provenance import Analysed
from hessian_tools.results.training_path import TRAINING_PATH_SCHEMA, TrainingPath
from ikun_hessian.experiments.runs import FLATNESS, SPECTRUM, TRAIN, TrainingRun, gather
from ikun_hessian.experiments.staleness import refuse_stale

LANDSCAPE, PATH = ".landscape.json", ".trajectory.json"
KNOWN = (SPECTRUM, FLATNESS, LANDSCAPE, PATH, TRAIN)
R = TypeVar("R", bound=Analysed)


@dataclass(frozen=True)
class Sources:
    """Contents of a report.

    Attributes:
        runs: Training runs with their spectra, flatness results and logs.
        landscapes: Landscapes by name.
        paths: Paths of training by name.
        left_out: One line for each file that is not shown, with the reason.
    """

    runs: tuple[TrainingRun, ...]
    landscapes: dict[str, LandscapeResult]
    paths: dict[str, TrainingPath]
    left_out: tuple[str, ...]


def collect(paths: Sequence[Path]) -> Sources:
    """Read the results at the given paths.

    Args:
        paths: Folders, which are searched recursively; result files; or checkpoints, which stand for the results next
            to them.

    Returns:
        The results. Results in folders that are damaged, or stale (their checkpoint has other weights now), are in
        `left_out` instead.

    Raises:
        ResultError: If a path has no results, or a file given by name is missing, damaged or stale.
    """
    left_out: list[str] = []
    for_runs: list[Path] = []
    others: dict[str, dict[Path, bool]] = {LANDSCAPE: {}, PATH: {}}  # True if the user gave the file by name
    for path in paths:
        found, named = _found(path)
        runs = [file for file in found if not file.name.endswith(tuple(others))]
        if runs or (named and not found):
            for_runs.append(path)
        for file in found:
            for ending, files in others.items():
                if file.name.endswith(ending):
                    files[file] = files.get(file, False) or (named and file == path)
    runs_found = gather(for_runs, report=left_out.append) if for_runs else []
    landscapes = _loaded(others[LANDSCAPE], _landscape, left_out)
    trajectories = _loaded(others[PATH], _training_path, left_out)
    if not (runs_found or landscapes or trajectories):
        raise ResultError(f"nothing to show: {left_out[0]}" if left_out else f"{paths[0]}: no results")
    return Sources(tuple(runs_found), _by_name(landscapes, LANDSCAPE), _by_name(trajectories, PATH), tuple(left_out))


def _landscape(file: Path) -> LandscapeResult:
    result = load_result(file, LandscapeResult, LANDSCAPE_SCHEMA)
    refuse_stale(file, result.checkpoint)
    return result


def _training_path(file: Path) -> TrainingPath:
    """Load a path, and check that every snapshot has the weights that it was measured at."""
    result = load_result(file, TrainingPath, TRAINING_PATH_SCHEMA)
    refuse_stale(file, result.checkpoint)
    folder = PurePath(str(result.checkpoint.get("path", ""))).parent
    for s in result.snapshots:
        refuse_stale(file, {"path": str(folder / s.name), "sha256": s.sha256})
    return result


def _found(path: Path) -> tuple[list[Path], bool]:
    """Return the results that a path stands for, and whether the path is a file and not a folder."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*.json") if p.name.endswith(KNOWN))
        if not found:
            raise ResultError(
                f"{path}: no results (*{', *'.join(KNOWN)}) in this folder: run `ikun-hessian spectrum` first"
            )
        return found, False
    if path.suffix == ".pt":
        beside = path.parent.glob("*.json") if path.parent.is_dir() else []
        return sorted(p for p in beside if p.name.startswith(f"{path.stem}.") and p.name.endswith(KNOWN)), True
    if not path.name.endswith(KNOWN):
        raise ResultError(f"{path}: not a folder, a checkpoint (.pt) or a result (*{', *'.join(KNOWN)})")
    return [path], True


def _loaded(files: dict[Path, bool], load: Callable[[Path], R], left_out: list[str]) -> dict[Path, R]:
    """Load results; one that was not named itself and cannot be used becomes a line of `left_out`."""
    results: dict[Path, R] = {}
    for file, named in files.items():
        try:
            result = load(file)
        except ResultError as error:
            if named:
                raise
            left_out.append(f"{error} (skipped)")
            continue
        results[file] = result
    return results


def _by_name(results: dict[Path, R], ending: str) -> dict[str, R]:
    """Name results by their files, with as many folders as make the names unique."""
    found: dict[str, R] = {}
    for file, result in results.items():
        depth, others = 1, [f for f in results if f != file]
        while any(f.parts[-depth:] == file.parts[-depth:] for f in others) and depth < len(file.parts):
            depth += 1
        found["/".join(file.parts[-depth:]).removesuffix(ending)] = result
    return found


@dataclass(frozen=True)
class MeasuredNetwork:
    """One set of weights and what was measured at it.

    Attributes:
        name: Name on the page.
        run: The training run that it belongs to.
        key: Moment and tag of the results; "" for the final weights.
    """

    name: str
    run: TrainingRun
    key: str

    @property
    def results(self) -> list[Analysed]:
        """The spectrum and the flatness result, as far as there are any."""
        found = (self.run.spectra.get(self.key), self.run.flatness.get(self.key))
        return [result for result in found if result is not None]


def networks(runs: Sequence[TrainingRun]) -> list[MeasuredNetwork]:
    """Return every set of weights with results, run by run, the final weights first."""
    found = []
    for run in runs:
        for key in sorted({*run.spectra, *run.flatness}):
            found.append(MeasuredNetwork(f"{run.name}.{key}" if key else run.name, run, key))
    return found
