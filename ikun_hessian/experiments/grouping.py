"""Group training runs for comparisons and figures: levels of a condition, settings, moments and quartiles."""

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

LEVELS = 16  # largest number of levels that can be distinguished in one panel
# Settings that are outcomes or that do not affect training; they never split runs into groups.
NO_CONDITION = frozenset(
    {
        "seed", "sha256", "data_sha256", "samples", "input_shape", "classes", "epochs_run", "best_epoch", "failures",
        "saved_at_loss", "save_at_loss", "snapshots", "trained_surrogate", "relaxed_accuracy",
    }
)  # fmt: skip
# Settings that affect training but not the initialization.
AFTER_START = frozenset(
    {
        "optimizer", "lr", "schedule", "weight_decay", "momentum", "epochs", "batch_size", "patience", "dropout", "sam",
        "asam", "sam_forward",
    }
)  # fmt: skip
# Settings to prefer in names of groups.
FIRST = (
    "name",
    "model",
    "depth",
    "hidden",
    "norm",
    "surrogate",
    "neuron",
    "optimizer",
    "schedule",
)
_MOMENT = re.compile(r"(?:(epoch\d+|loss\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?:\.|$))?(.*)", re.DOTALL)


def level(run: TrainingRun, by: str) -> str:
    """Return the run's value of the condition `by`, as text."""
    return show(run.value(by))


def levels(runs: Iterable[TrainingRun], by: str) -> list[str]:
    """Return the distinct values of the condition `by`, numbers by size before names in alphabetical order.

    Args:
        runs: The runs.
        by: The condition, for instance "init".

    Returns:
        The levels, as text.

    Raises:
        ResultError: If no run has this condition, or it has more than `LEVELS` values.
    """
    runs = list(runs)
    if all(run.value(by) is None for run in runs):
        known = sorted({key for run in runs for part in (run.training, run.network, run.data) for key in part})
        raise ResultError(f"--by {by}: no run has this condition: choose one of {', '.join(known)}")
    found = {level(run, by) for run in runs}
    if len(found) > LEVELS:
        raise ResultError(f"--by {by}: {len(found)} levels are too many to distinguish: use at most {LEVELS}")
    return sorted(found, key=lambda name: (*_number(name), name))


def _number(name: str) -> tuple[int, float]:
    """Return a sort key that puts numbers, by size, before other text."""
    try:
        return 0, float(name)
    except ValueError:
        return 1, 0.0


def show(value: Any) -> str:
    """Return the text of a setting: lower-case for booleans and None, six digits for floats, lists joined by "-"."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "-".join(map(show, value)) if isinstance(value, list | tuple) else str(value)


def settings_groups(
    runs: Sequence[TrainingRun], by: str, apart_from: Collection[str] = ()
) -> dict[str, list[TrainingRun]]:
    """Group runs by every setting that varies apart from `by`, `apart_from` and the seed.

    A setting that is determined by the others and the level (such as a learning rate that goes with an optimizer) does
    not split the groups.

    Args:
        runs: The runs.
        by: The condition being compared.
        apart_from: Further conditions that do not split the groups.

    Returns:
        The runs of each group, numbers by size and otherwise in the order of the runs. A group is named by the fewest
        settings that distinguish it; the name is "" if no setting varies.
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
    order = {name: tuple(_number(show(some[0].value(key))) for key in kept) for name, some in found.items()}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}


def common_conditions(runs: Sequence[TrainingRun]) -> list[str]:
    """Return the settings that are recorded for all runs and that affect training."""
    keys = dict.fromkeys(key for run in runs for part in (run.training, run.network, run.data) for key in part)
    return [key for key in keys if key not in NO_CONDITION and all(_has(run, key) for run in runs)]


def _has(run: TrainingRun, key: str) -> bool:
    """Return whether the run records this setting."""
    return any(key in part for part in (run.training, run.network, run.data))


def plain(value: Any) -> str:
    """Return a text that is equal for equal values; a list and a tuple of the same values are equal."""
    return json.dumps(value, default=str)


def display_name(key: str, value: Any) -> str:
    """Return the value as text, with the name of its setting unless the value is a name itself."""
    text = gain_name(value) if key == "gain" and isinstance(value, int | float) else show(value)
    return text if isinstance(value, str) and value != "none" else f"{key.replace('_', ' ')} {text}"


def gain_name(gain: float) -> str:
    """Return a gain as n or 1/n if it equals one to six digits, otherwise as a number."""
    n = gain if gain >= 1 else 1 / gain if gain > 0 else math.inf
    if n < 1e5 and math.isclose(n, round(n), rel_tol=5e-6):
        return f"{round(n)}" if gain >= 1 else f"1/{round(n)}"
    return show(float(gain))


def moment_of(key: str) -> tuple[str, str]:
    """Split the key of a result into moment and tag.

    "loss0.02.published" gives ("loss0.02", "published"), and "x" gives ("", "x").
    """
    found = _MOMENT.fullmatch(key)
    assert found is not None  # the pattern matches everything
    return found[1] or "", found[2]


def moments(runs: Iterable[TrainingRun]) -> list[str]:
    """Return the moments at which spectra (or flatness, if there are no spectra) were measured, except snapshots.

    The matched losses come first, largest first, and "" (the end of training) comes last.
    """
    runs = list(runs)
    found = {moment_of(key)[0] for run in runs for key in run.spectra}
    found = found or {moment_of(key)[0] for run in runs for key in run.flatness}
    return sorted((m for m in found if not m.startswith("epoch")), key=lambda m: -float(m[4:] or 0))


def moment_name(moment: str) -> str:
    """Return a moment as it is shown in a figure."""
    return f"loss ≤ {moment[4:]}" if moment else "at the end"


def titled(setting: str, moment: str) -> str:
    """Return the title of a panel: the setting and the moment."""
    return ", ".join(part for part in (setting, moment_name(moment)) if part)


def at_moment(run: TrainingRun, moment: str) -> SpectrumResult | None:
    """Return the run's spectra at a moment, merged with results whose tag is the name of an operator."""
    found = run.spectra.get(moment)
    for key, other in run.spectra.items():
        where, tag = moment_of(key)
        if where == moment and tag in other.spectra:
            found = other if found is None else replace(found, spectra={tag: other.spectra[tag], **found.spectra})
    return found


def epoch_at(run: TrainingRun, moment: str) -> int | None:
    """Return the epoch of a moment, or None if unknown.

    This is the epoch of the snapshot, the first epoch whose training loss was at most the given one, or for "" the
    epoch whose weights were kept.
    """
    if moment.startswith("epoch"):
        return int(moment[5:])
    if moment:
        return next((line["epoch"] for line in run.log if at_most(line.get("loss"), float(moment[4:]))), None)
    return run.best_epoch or (run.log[-1]["epoch"] if run.log and not cut(run) else None)


def at_most(value: Any, limit: float) -> bool:
    """Return whether the value is known and at most `limit`."""
    return value is not None and value <= limit


def number_or_nan(value: Any) -> float:
    """Return the value as a float, or NaN if it is missing."""
    return float(value) if isinstance(value, int | float) else math.nan


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile, ignoring NaN.

    Quartiles are interpolated linearly between order statistics (the default of NumPy). Values may be infinite: a
    quartile between a finite and an infinite value is infinite. All three are NaN if there are no values.
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
    """Interpolate linearly; the result is infinite if either end is."""
    if math.isinf(a) or math.isinf(b):
        return float(a if math.isinf(a) else b)
    return float(a + weight * (b - a))


def ended_in_nan(run: TrainingRun) -> bool:
    """Return whether training itself broke down, as opposed to a later analysis."""
    return any(failure.startswith(("NaN", "failed: train")) for failure in run.failures)


def cut(run: TrainingRun) -> bool:
    """Return whether the log lacks epochs that were trained."""
    return run.epochs_run is not None and len(run.log) < run.epochs_run


def over(run: TrainingRun) -> bool:
    """Return whether training has ended and the log is complete."""
    return (run.finished or ended_in_nan(run)) and not cut(run)


def horizon(run: TrainingRun) -> int:
    """Return the number of epochs over which the run was observed.

    For a run that has ended, this is the number of epochs requested, even if it stopped earlier. Otherwise it is the
    last logged epoch.
    """
    last = int(run.log[-1]["epoch"]) if run.log else 0
    return max(last, int(run.training.get("epochs") or 0)) if over(run) else last


def epochs_to(run: TrainingRun, accuracy: float) -> tuple[int, bool]:
    """Return the first epoch that reached a test accuracy, as an event time with its censoring flag.

    A run that ended early, in NaN or by early stopping, will never reach it. It is censored at the last epoch that was
    requested. A run with an incomplete log is censored at its last line.

    Args:
        run: The run.
        accuracy: Test accuracy, as a fraction between 0 and 1.

    Returns:
        (epoch, True) if the accuracy was reached, otherwise (`horizon(run)`, False).
    """
    for line in run.log:
        value = line.get("test_accuracy")
        if value is not None and value >= accuracy:
            return int(line["epoch"]), True
    return horizon(run), False


def survival(times: Sequence[int], reached: Sequence[bool]) -> tuple[list[float], list[float]]:
    """Compute the Kaplan-Meier estimate of the fraction of runs that have not reached an event.

    Args:
        times: Time of the event, or of censoring, for each run [n].
        reached: Whether the event was observed [n].

    Returns:
        The times of the steps and the fraction from each of them on, starting with 1 at time 0.
    """
    curve = stats.ecdf(stats.CensoredData.right_censored(list(times), ~np.array(reached, dtype=bool))).sf
    return [0.0, *curve.quantiles.tolist()], [1.0, *curve.probabilities.tolist()]
