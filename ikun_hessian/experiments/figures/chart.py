"""A figure of a study as plain values: panels of marks, and the table of exactly what they show."""

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
    """These runs cannot fill the figure: one line that says what is missing."""


@dataclass(frozen=True)
class Axis:
    """kind: of y, log (what is 0 or less lies on a floor), signed (logarithmic where all is positive, symlog where
    not), linear, share (0 to 1), epochs (what is infinite stands above the others) or place (1 at the top); of x,
    epoch, layer, rank, gain, count, signed or names (the ticks 0, 1, ...). linthresh: where a signed x is linear,
    and how far a signed y is at least if it is symlog."""

    label: str
    kind: str
    ticks: tuple[str, ...] = ()
    linthresh: float = math.nan


@dataclass(frozen=True)
class Mark:
    """One point of a panel. kind: run (a dot), median (of a line, low and high its quartiles, over n runs), slope (of a
    line through medians), path (of one run's thin line), curve (of a line without markers), steps (of a line that keeps
    its value), bar (a median alone), censored or diverged (how a run ended).

    run: its name, "" for what stands for several. note: why the mark is hollow, "" where it is not.
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
    """row, column: its place and names there, on a page of its own for every `page`. runs: those it is about. foot:
    what stands in its title's second line. samples: on how many the curvature was measured that it shows."""

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
    """by: the condition whose levels have colours of their own. caption: how to read it. runs: all that it is about."""

    panels: tuple[Panel, ...]
    by: str
    caption: str
    runs: tuple[TrainingRun, ...]


def medians(level: str, points: Iterable[tuple[float, float]]) -> list[Mark]:
    """The median and quartiles of (x, value) at every x, of the values that are no NaN."""
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
    """On how many samples each was measured, as far as it is known."""
    return tuple(count for r in results if isinstance(count := r.data.get("samples"), int))


def reading(panels: Iterable[Panel]) -> str:
    """What the medians of these panels are drawn as, for a caption."""
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
    """One row a mark, in the order of the panels; empty where a mark has no such value."""

    def cell(value: float) -> Any:
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
    """What all runs share, how many there are, and which of them diverged, for a caption.

    samples: on how many the curvature was measured that is shown.
    """
    samples = tuple(samples)
    shared = {k: runs[0].value(k) for k in common_conditions(runs) if len({plain(r.value(k)) for r in runs}) == 1}

    def words(*keys: str) -> str:
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
    words = {"timesteps": f"T = {value}", "reset": f"{value} reset", "surrogate": f"surrogate {value}"}
    words |= {"schedule": f"{value} schedule", "batch_size": f"batch {value}", "epochs": f"{value} epochs"}
    return printable(words.get(key) or display_name(key, value), 40)


def _trained_on(runs: Sequence[TrainingRun]) -> str:
    """How many samples all runs were trained on; nothing where they differ, or it is not known."""
    counts = [run.data.get("samples") or run.value("subset") for run in runs]
    if not isinstance(counts[0], int) or any(count != counts[0] for count in counts):
        return ""
    images = all(run.value("coding") in ("direct", "poisson") for run in runs)
    return _many(counts[0], f"training {'image' if images else 'sample'}")


def _analysed(runs: Sequence[TrainingRun], samples: Sequence[int]) -> str:
    """How the curvature was measured: on how many samples, and under which surrogate if not each under its own."""
    found = sorted(set(samples))
    if not found:
        return ""
    networks = [r.network for run in runs for results in (run.spectra, run.flatness) for r in results.values()]
    others = {
        str(n["surrogate"]) for n in networks if n.get("trained_surrogate", n.get("surrogate")) != n.get("surrogate")
    }
    under = f" under surrogate {', '.join(sorted(others))}" if others else ""
    return f"curvature on {f'{found[0]} to ' if len(found) > 1 else ''}{_many(found[-1], 'sample')}{under}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(printable(name, 30) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
