"""Which runs stand together in a figure: levels of the condition compared, settings they share, moments, quartiles."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from hessian_tools.io.json import ResultError
from hessian_tools.results.spectrum import SpectrumResult

if TYPE_CHECKING:
    from ikun_hessian.experiments.runs import TrainingRun

LEVELS = 16  # more cannot be told apart in one panel
# What a run is told apart by but not asked for under, or what does not move its training.
NO_CONDITION = frozenset(
    {
        "seed", "sha256", "data_sha256", "samples", "input_shape", "classes", "epochs_run", "best_epoch", "failures",
        "saved_at_loss", "save_at_loss", "snapshots", "trained_surrogate",
    }
)  # fmt: skip
# Of training alone: without a say at initialization.
AFTER_START = frozenset(
    {"optimizer", "lr", "schedule", "weight_decay", "momentum", "epochs", "batch_size", "patience", "dropout"}
)
FIRST = ("name", "model", "depth", "hidden", "norm", "surrogate", "neuron", "optimizer", "schedule")  # to be named
_MOMENT = re.compile(r"(?:(epoch\d+|loss\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?:\.|$))?(.*)", re.DOTALL)


def level(run: TrainingRun, by: str) -> str:
    """The run's value of the condition compared, as text."""
    return show(run.value(by))


def levels(runs: Iterable[TrainingRun], by: str) -> list[str]:
    """The levels of the condition `by`: numbers by size, names by alphabet.

    Raises ResultError for a condition that no run knows, or of more levels than can be told apart.
    """
    runs = list(runs)
    if all(run.value(by) is None for run in runs):
        known = sorted({key for run in runs for part in (run.training, run.network, run.data) for key in part})
        raise ResultError(f"--by {by}: no run knows this condition: choose one of {', '.join(known)}")
    found = {level(run, by) for run in runs}
    if len(found) > LEVELS:
        raise ResultError(f"--by {by}: {len(found)} levels cannot be told apart: give at most {LEVELS}")
    return sorted(found, key=lambda name: (*_number(name), name))


def _number(name: str) -> tuple[int, float]:
    try:
        return 0, float(name)
    except ValueError:
        return 1, 0.0


def show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "-".join(map(show, value)) if isinstance(value, list | tuple) else str(value)


def settings_groups(
    runs: Sequence[TrainingRun], by: str, apart_from: Collection[str] = ()
) -> dict[str, list[TrainingRun]]:
    """The runs by everything else that was varied besides `by`, `apart_from` and the seed, named by the fewest
    conditions that tell them apart ("" where nothing was).

    A condition that follows from the others and the level (a learning rate that belongs to an optimizer) names nothing.
    """
    keys = [key for key in common_conditions(runs) if key != by and key not in apart_from]
    cells: list[tuple[Any, ...]] = [(level(run, by),) for run in runs]
    kept: list[str] = []
    for key in sorted(keys, key=lambda k: FIRST.index(k) if k in FIRST else len(FIRST)):
        finer = [(*cell, plain(run.value(key))) for cell, run in zip(cells, runs, strict=True)]
        if len(set(finer)) > len(set(cells)):
            cells, kept = finer, [*kept, key]
    found: dict[str, list[TrainingRun]] = {}
    for run in runs:
        found.setdefault(", ".join(display_name(key, run.value(key)) for key in kept), []).append(run)
    return found


def common_conditions(runs: Sequence[TrainingRun]) -> list[str]:
    """What all runs were asked for and that moves a training."""
    keys = dict.fromkeys(key for run in runs for part in (run.training, run.network, run.data) for key in part)
    return [key for key in keys if key not in NO_CONDITION and all(_has(run, key) for run in runs)]


def _has(run: TrainingRun, key: str) -> bool:
    return any(key in part for part in (run.training, run.network, run.data))


def plain(value: Any) -> str:
    """The same text for equal values, lists and tuples alike."""
    return json.dumps(value, default=str)


def display_name(key: str, value: Any) -> str:
    """A value that speaks for itself, otherwise with the name of its condition."""
    text = gain_name(value) if key == "gain" and isinstance(value, int | float) else show(value)
    return text if isinstance(value, str) and value != "none" else f"{key.replace('_', ' ')} {text}"


def gain_name(gain: float) -> str:
    """As n or 1/n where it is one to the six digits of its text, else as a number."""
    n = gain if gain >= 1 else 1 / gain if gain > 0 else math.inf
    if n < 1e5 and math.isclose(n, round(n), rel_tol=5e-6):
        return f"{round(n)}" if gain >= 1 else f"1/{round(n)}"
    return show(float(gain))


def moment_of(key: str) -> tuple[str, str]:
    """(moment, tag) of the key of a result: "loss0.02.published" is ("loss0.02", "published"), "x" is ("", "x")."""
    found = _MOMENT.fullmatch(key)
    assert found is not None  # the pattern matches everything
    return found[1] or "", found[2]


def moments(runs: Iterable[TrainingRun]) -> list[str]:
    """Where spectra were measured, or flatness where no spectra were: every "lossX", the largest X first, then "" for
    the end; snapshots left out."""
    runs = list(runs)
    found = {moment_of(key)[0] for run in runs for key in run.spectra}
    found = found or {moment_of(key)[0] for run in runs for key in run.flatness}
    return sorted((m for m in found if not m.startswith("epoch")), key=lambda m: -float(m[4:] or 0))


def moment_name(moment: str) -> str:
    return f"loss ≤ {moment[4:]}" if moment else "at the end"


def titled(setting: str, moment: str) -> str:
    return ", ".join(part for part in (setting, moment_name(moment)) if part)


def at_moment(run: TrainingRun, moment: str) -> SpectrumResult | None:
    """The run's spectra at a moment; what is tagged with an operator's name is put beside them."""
    found = run.spectra.get(moment)
    for key, other in run.spectra.items():
        where, tag = moment_of(key)
        if where == moment and tag in other.spectra:
            found = other if found is None else replace(found, spectra={tag: other.spectra[tag], **found.spectra})
    return found


def epoch_at(run: TrainingRun, moment: str) -> int | None:
    """The epoch of a moment: of a snapshot, of the first training loss that is no larger, of the weights kept."""
    if moment.startswith("epoch"):
        return int(moment[5:])
    if moment:
        return next((line["epoch"] for line in run.log if at_most(line.get("loss"), float(moment[4:]))), None)
    return run.best_epoch or (run.log[-1]["epoch"] if run.log and not cut(run) else None)


def at_most(value: Any, limit: float) -> bool:
    return value is not None and value <= limit


def number_or_nan(value: Any) -> float:
    """NaN for what is missing."""
    return float(value) if isinstance(value, int | float) else math.nan


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, linear between order statistics (NumPy's default); NaN is left out.

    Values may be infinite: a quartile between a finite and an infinite one is infinite. NaN without a value.
    """
    x = np.sort([v for v in values if not math.isnan(v)])
    if not len(x):
        return math.nan, math.nan, math.nan
    found = []
    for share in (0.25, 0.5, 0.75):
        place = share * (len(x) - 1)
        low, weight = math.floor(place), place - math.floor(place)
        found.append(float(x[low]) if weight == 0 or x[low] == x[low + 1] else _between(x[low], x[low + 1], weight))
    return found[0], found[1], found[2]


def _between(a: float, b: float, weight: float) -> float:
    if math.isinf(a) or math.isinf(b):
        return float(a if math.isinf(a) else b)
    return float(a + weight * (b - a))


def ended_in_nan(run: TrainingRun) -> bool:
    """Whether training itself broke down, not an analysis after it."""
    return any(failure.startswith(("NaN", "failed: train")) for failure in run.failures)


def cut(run: TrainingRun) -> bool:
    """Whether the log lacks epochs that were trained."""
    return run.epochs_run is not None and len(run.log) < run.epochs_run


def over(run: TrainingRun) -> bool:
    """Whether there will be no further epoch, and the log is there to the last."""
    return (run.finished or ended_in_nan(run)) and not cut(run)


def horizon(run: TrainingRun) -> int:
    """The epochs that a run had, those it gave up included; the last logged one where there is or may be more."""
    last = int(run.log[-1]["epoch"]) if run.log else 0
    return max(last, int(run.training.get("epochs") or 0)) if over(run) else last


def epochs_to(run: TrainingRun, accuracy: float) -> tuple[int, bool]:
    """(epoch of the first test accuracy of at least this, True), or (horizon, False) for a run that never had it.

    A run that ended early, in NaN or by early stopping, never will: it counts as not there up to the last epoch that
    was asked for; one whose log was cut, up to the last line.
    """
    for line in run.log:
        value = line.get("test_accuracy")
        if value is not None and value >= accuracy:
            return int(line["epoch"]), True
    return horizon(run), False


def survival(times: Sequence[int], reached: Sequence[bool]) -> tuple[list[float], list[float]]:
    """Kaplan and Meier's estimate of the share not yet there: times of the steps and the share from each of them on,
    from 1 at time 0. times [n]: of the event where reached, else of the censoring."""
    curve = stats.ecdf(stats.CensoredData.right_censored(list(times), ~np.array(reached, dtype=bool))).sf
    return [0.0, *curve.quantiles.tolist()], [1.0, *curve.probabilities.tolist()]
