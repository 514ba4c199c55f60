"""Describe a figure of a study as plain values: panels of marks, and the table of everything they show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hessian_tools.plots.style import printable
from hessian_tools.results.provenance import Analysed
from ikun_hessian.experiments.grouping import common_conditions, display_name, plain, quartiles, show

if TYPE_CHECKING:
    from ikun_hessian.experiments.runs import TrainingRun


class NotEnoughError(ValueError):
    """The runs do not have the results that a figure needs. The message says in one line what is missing."""


@dataclass(frozen=True)
class Axis:
    """Axis of a panel. Panels with equal axes share their range.

    Attributes:
        label: Label of the axis.
        kind: For y: "log" (values that are not positive are drawn on a floor), "signed" (logarithmic if all values are
            positive, otherwise symlog or linear), "linear", "share" (0 to 1), "epochs" (infinite values are drawn above
            the others) or "place" (1 at the top). For x: "epoch", "layer", "rank", "gain", "count", "signed" or "names"
            (named positions 0, 1, ...).
        ticks: Names of the positions of an x axis of kind "names".
        linthresh: For kind "signed": half width of the linear part of x, or smallest half width of the linear part of
            y. NaN to choose it from the values.
    """

    label: str
    kind: str
    ticks: tuple[str, ...] = ()
    linthresh: float = math.nan


@dataclass(frozen=True)
class Mark:
    """One point of a panel.

    Attributes:
        level: Level of the condition that is compared.
        kind: "run" (a dot), "median" (a point of a line with quartiles), "slope" (a point of a line through medians),
            "path" (a point of the thin line of one run), "curve" (a point of a line without markers), "steps" (a point
            of a piecewise constant line), "bar" (a single median), "censored" or "diverged" (how a run ended).
        x: Position on the x axis.
        value: Value on the y axis.
        low: Lower quartile, NaN if there is none.
        high: Upper quartile, NaN if there is none.
        n: Number of runs that the mark represents.
        run: Name of the run, "" if the mark represents several runs.
        note: Why the mark is hollow, "" if it is filled.
    """

    level: str
    kind: str
    x: float
    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 1
    run: str = ""
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel of a figure.

    Attributes:
        row: Name of its row.
        column: Name of its column.
        x: The x axis.
        y: The y axis.
        marks: Everything drawn.
        runs: The runs that it shows.
        foot: Text below its title.
        page: Name of the page; panels with different names are drawn on different pages.
        samples: Numbers of samples on which the curvature shown was measured.
    """

    row: str
    column: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    runs: tuple[TrainingRun, ...]
    foot: str = ""
    page: str = ""
    samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A figure on one or several pages.

    Attributes:
        panels: The panels.
        by: The condition that is compared; each of its levels has its own colour.
        caption: How to read the figure.
        runs: All runs that it shows.
    """

    panels: tuple[Panel, ...]
    by: str
    caption: str
    runs: tuple[TrainingRun, ...]


def medians(level: str, points: Iterable[tuple[float, float]]) -> list[Mark]:
    """Compute medians and quartiles of values at each x.

    Args:
        level: Level of the marks.
        points: Pairs (x, value). NaN values are ignored.

    Returns:
        One mark for each x, in ascending order.
    """
    at: dict[float, list[float]] = {}
    for x, value in points:
        at.setdefault(x, []).append(value)
    marks = []
    for x in sorted(at):
        low, middle, high = quartiles(at[x])
        known = sum(not math.isnan(v) for v in at[x])
        marks.append(Mark(level, "median", x, middle, low, high, known))
    return marks


def samples_of(results: Iterable[Analysed]) -> tuple[int, ...]:
    """Return the number of samples of each result, if it is known."""
    return tuple(count for r in results if isinstance(count := r.data.get("samples"), int))


def reading(panels: Iterable[Panel]) -> str:
    """Describe for the caption how the medians of these panels are drawn."""
    lines: dict[tuple[int, str], set[float]] = {}
    bands = False
    for i, panel in enumerate(panels):
        for mark in panel.marks:
            if mark.kind == "median":
                lines.setdefault((i, mark.level), set()).add(mark.x)
                bands |= mark.low < mark.high
    drawn = "lines" if any(len(x) > 1 for x in lines.values()) else "larger marks"
    return f"{drawn}{' and bands: median and quartiles' if bands else ': medians'}"


def table(chart: Chart) -> list[dict[str, Any]]:
    """Return the table of a chart: one row for each mark, with empty cells for unknown values."""

    def cell(value: float) -> Any:
        """Return the value, empty for NaN."""
        return "" if math.isnan(value) else value

    return [
        {
            "page": panel.page,
            "panel": panel.row,
            "column": panel.column,
            chart.by: mark.level,
            "mark": mark.kind,
            "run": mark.run,
            "x_axis": panel.x.label,
            "x": cell(mark.x),
            "y_axis": panel.y.label,
            "y": cell(mark.value),
            "low": cell(mark.low),
            "high": cell(mark.high),
            "runs": mark.n,
            "note": mark.note,
        }
        for panel in chart.panels
        for mark in panel.marks
    ]


def chart_provenance(runs: Sequence[TrainingRun], by: str, samples: Iterable[int] = ()) -> str:
    """Describe for the caption what all runs share, how many there are, and which of them diverged.

    Args:
        runs: The runs shown.
        by: The condition that is compared.
        samples: Numbers of samples on which the curvature shown was measured.

    Returns:
        The description.
    """
    samples = tuple(samples)
    shared = {k: runs[0].value(k) for k in common_conditions(runs) if len({plain(r.value(k)) for r in runs}) == 1}

    def words(*keys: str) -> str:
        """Describe the conditions that all runs share."""
        return ", ".join(_word(key, shared[key]) for key in keys if shared.get(key) not in (None, "", 0, "none"))

    model = words("model", "norm", "neuron", "reset", "surrogate", "timesteps")
    data = ", ".join(part for part in (words("name"), _trained_on(runs), words("loss")) if part)
    trained = words("optimizer", "lr", "schedule", "weight_decay", "batch_size", "epochs")
    text = "; ".join(part for part in (model, data, trained, _analysed(runs, samples)) if part)
    seeds = {plain(run.value("seed")) for run in runs}
    count = len({show(run.value(by)) for run in runs})
    text += f". {_many(len(runs), 'run')}: {_many(count, 'level')} of {by}, {_many(len(seeds), 'seed')}"
    lost = [run for run in runs if run.diverged]
    text += f"; {len(lost)} diverged or failed ({_few([run.name for run in lost])})." if lost else "."
    return text


def _word(key: str, value: Any) -> str:
    """Describe the value of a condition."""
    words = {"timesteps": f"T = {value}", "reset": f"{value} reset", "surrogate": f"surrogate {value}"}
    words |= {"schedule": f"{value} schedule", "batch_size": f"batch {value}", "epochs": f"{value} epochs"}
    return printable(words.get(key) or display_name(key, value), 40)


def _trained_on(runs: Sequence[TrainingRun]) -> str:
    """Return the number of training samples, "" if the runs differ or it is unknown."""
    counts = [run.data.get("samples") or run.value("subset") for run in runs]
    if not isinstance(counts[0], int) or any(count != counts[0] for count in counts):
        return ""
    images = all(run.value("coding") in ("direct", "poisson") for run in runs)
    return _many(counts[0], f"training {'image' if images else 'sample'}")


def _analysed(runs: Sequence[TrainingRun], samples: Sequence[int]) -> str:
    """Return on how many samples the curvature was measured, and the surrogate if it is not that of the training."""
    found = sorted(set(samples))
    if not found:
        return ""
    networks = [r.network for run in runs for results in (run.spectra, run.flatness) for r in results.values()]
    others = {
        str(n["surrogate"]) for n in networks if n.get("trained_surrogate", n.get("surrogate")) != n.get("surrogate")
    }
    under = f" with surrogate {', '.join(sorted(others))}" if others else ""
    return f"curvature on {f'{found[0]} to ' if len(found) > 1 else ''}{_many(found[-1], 'sample')}{under}"


def _many(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _few(names: Sequence[str]) -> str:
    """Return the first three names and the number of others."""
    return ", ".join(printable(name, 30) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
