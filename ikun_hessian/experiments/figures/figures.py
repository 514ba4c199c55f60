"""Draw the publication figures of a study from its runs, each with a table of everything it shows."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hessian_tools.io.files import write_table
from hessian_tools.plots.calibration import middle, predictions
from hessian_tools.plots.calibration_panels import AGAINST
from hessian_tools.plots.style import (
    SMALL,
    add_caption,
    add_legend,
    layout,
    legend_rows,
    printable,
    save_figure,
    settled,
    styled,
    wrapped,
)
from ikun_hessian.experiments.figures.axes import Range, fitted, floors, y_range
from ikun_hessian.experiments.figures.calibration import study_figure, surrogate_of
from ikun_hessian.experiments.figures.chart import Axis, Chart, NotEnoughError, Panel, chart_provenance, table
from ikun_hessian.experiments.figures.gap import gap_chart, robustness_chart
from ikun_hessian.experiments.figures.minima import layers_chart, one_image_chart, ranks_chart, samples_chart
from ikun_hessian.experiments.figures.names import FIGURE_NAMES
from ikun_hessian.experiments.figures.panels import LevelLook, draw_panel, level_legend, level_looks
from ikun_hessian.experiments.figures.training import depth_chart, epochs_chart, gain_chart, start_chart, training_chart
from ikun_hessian.experiments.grouping import display_name, levels
from ikun_hessian.experiments.runs import TrainingRun

if TYPE_CHECKING:
    from hessian_tools.results.calibration import CalibrationResult


COLUMN_WIDTHS = {1: 3.5, 2: 7.2}  # width of a figure in inches, by number of columns
ACROSS = {1: 2, 2: 4}  # largest number of columns of panels in a grid, by number of columns
FLOW = {1: 4, 2: 9}  # largest number of panels per page outside a grid, by number of columns
MOST = 12  # panels on a page with a grid
LINE = 0.125  # height in inches of a line of the legend or the caption


@dataclass(frozen=True)
class Drawn:
    """Result of `draw_all`.

    Attributes:
        written: Paths of the files written.
        skipped: For each figure that was not drawn, the reason.
    """

    written: tuple[Path, ...]
    skipped: dict[str, str]


def draw_all(
    runs: Sequence[TrainingRun],
    out: Path,
    only: Sequence[str] = (),
    *,
    by: str = "init",
    accuracy: float = 0.9,
    width: int = 2,
    calibrations: Mapping[str, CalibrationResult] | None = None,
) -> Drawn:
    """Write the figures of a study as OUT/NAME.png, .pdf and .csv.

    Further pages of a figure are named NAME-2, NAME-3 and so on. A figure for which the runs lack results is skipped.

    Args:
        runs: The runs.
        out: Folder for the files.
        only: Names of the figures to draw (see `FIGURE_NAMES`), all if empty.
        by: The condition that is compared.
        accuracy: Test accuracy, above 0 and at most 1, that the figures `epochs` and `gain` count epochs to.
        width: Width of the figures in columns of a page, 1 or 2.
        calibrations: Calibrations by name of the network, for the figure `calibration`.

    Returns:
        The files written, and the figures skipped with the reason.

    Raises:
        ValueError: If a name, the width, the accuracy or the condition is invalid, or if there is nothing to draw.
        OSError: If a file cannot be written.
    """
    if wrong := [name for name in only if name not in FIGURE_NAMES]:
        raise ValueError(f"unknown figure '{wrong[0]}': choose from {', '.join(FIGURE_NAMES)}")
    if width not in COLUMN_WIDTHS:
        raise ValueError(f"--width {width}: choose 1 or 2 columns")
    if not 0 < accuracy <= 1:
        raise ValueError(f"--accuracy {accuracy:g}: give a share of the test images, above 0 and at most 1")
    if not runs and not calibrations:
        raise ValueError("there are no runs to draw")
    if runs:
        levels(runs, by)  # raises for an unknown condition before anything is written
    written: list[Path] = []
    skipped: dict[str, str] = {}
    for name in only or FIGURE_NAMES:
        try:
            if name == "calibration":
                written += _draw_calibrations(calibrations or {}, out)
            else:
                chart = charts(by, accuracy)[name](runs)
                written += write_chart(chart, out / name, width)
        except NotEnoughError as reason:
            skipped[name] = str(reason)
    return Drawn(tuple(written), skipped)


def charts(by: str, accuracy: float) -> dict[str, Callable[[Sequence[TrainingRun]], Chart]]:
    """Return the functions that chart runs, by name of the figure (see `draw_all` for the arguments)."""
    return {
        "start": partial(start_chart, by=by),
        "gain": partial(gain_chart, by=by, accuracy=accuracy),
        "depth": partial(depth_chart, by=by),
        "epochs": partial(epochs_chart, by=by, accuracy=accuracy),
        "ranks": partial(ranks_chart, by=by),
        "one-image": partial(one_image_chart, by=by),
        "gap": partial(gap_chart, by=by),
        "robustness": partial(robustness_chart, by=by),
        "training": partial(training_chart, by=by),
        "layers": partial(layers_chart, by=by),
        "samples": partial(samples_chart, by=by),
    }


def write_chart(chart: Chart, stem: Path, width: int = 2) -> list[Path]:
    """Write a chart as STEM.png and .pdf, further pages as STEM-2 and so on, and its table as STEM.csv.

    Args:
        chart: The chart.
        stem: Path of the files without suffix.
        width: Width of the figure in columns of a page, 1 or 2.

    Returns:
        The paths of the files.
    """
    paths = []
    for number, figure in enumerate(chart_figures(chart, width), 1):
        paths += save_figure(figure, stem if number == 1 else f"{stem}-{number}")
    write_table(table(chart), stem.with_name(f"{stem.name}.csv"))
    return [*paths, stem.with_name(f"{stem.name}.csv")]


def _draw_calibrations(found: Mapping[str, CalibrationResult], out: Path) -> list[Path]:
    """Write the figure of all calibrations and its table: first the values of (a-d), then the directions of (e-g)."""
    if not found:
        raise NotEnoughError(
            "there is no NAME.calibration.json: run `ikun-hessian flatness --calibrate` on the checkpoints"
        )
    rows: list[dict[str, Any]] = []
    for name, result in found.items():
        network = {"network": name, "surrogate": surrogate_of(result)}
        rows += [
            {**network, "scale": s.scale, "operator": operator, "rank_correlation": a.correlation, "ratio": a.ratio}
            for s in result.calibration.scales
            for operator, a in s.agreement.items()
        ]
        at, kinds = middle(result), result.calibration.kinds
        rows += [
            {**network, "scale": at.scale, "operator": operator, "direction": kind, "prediction": p, "curvature": c}
            for operator in AGAINST
            for kind, p, c in zip(kinds, predictions(result, at, operator).tolist(), at.curvature, strict=True)
            if math.isfinite(p)
        ]
    write_table(rows, out / "calibration.csv")
    return [*save_figure(study_figure(found), out / "calibration"), out / "calibration.csv"]


def chart_figures(chart: Chart, width: int = 2) -> list[Figure]:
    """Draw a chart on as many pages as needed.

    Panels with the same y axis share its range. If all panels of a page belong to one column, they are placed side by
    side.

    Args:
        chart: The chart.
        width: Width of the figures in columns of a page, 1 or 2.

    Returns:
        One figure for each page.
    """
    styles = level_looks(levels(chart.runs, chart.by), chart.by)
    ranges = {
        axis: y_range(axis.kind, [m for p in chart.panels if p.y == axis for m in p.marks], axis.linthresh)
        for axis in dict.fromkeys(p.y for p in chart.panels)
    }
    pages = [page for name in dict.fromkeys(p.page for p in chart.panels) for page in _pages(chart, name, width)]
    figures = []
    for number, (panels, flowing) in enumerate(pages, 1):
        text = f"({number} of {len(pages)}) " if len(pages) > 1 else ""
        text += f"{printable(panels[0].page, 80)}. " if panels[0].page else ""
        used = {axis: found for axis, found in ranges.items() if any(p.y == axis for p in panels)}
        shown = list({run.name: run for panel in panels for run in panel.runs}.values())
        samples = [count for panel in panels for count in panel.samples]
        text = f"{text}{chart.caption}{floors(used)} {chart_provenance(shown, chart.by, samples)}"
        names = [run.value(chart.by) for run in chart.runs]
        title = "" if all(isinstance(v, str) and display_name(chart.by, v) == v for v in names) else chart.by
        with styled():
            figures.append(
                _figure(panels, flowing, COLUMN_WIDTHS[width], styles, ranges, text, title.replace("_", " "))
            )
    return figures


def _pages(chart: Chart, name: str, width: int) -> list[tuple[list[Panel], bool]]:
    """Return the panels of each page, and whether they are placed side by side instead of in a grid."""
    panels = [p for p in chart.panels if p.page == name]
    columns = list(dict.fromkeys(p.column for p in panels))
    if len(columns) == 1:
        most = FLOW[width]
        return [(panels[i : i + most], True) for i in range(0, len(panels), most)]
    parts = -(-len(columns) // ACROSS[width])
    cuts = [round(i * len(columns) / parts) for i in range(parts + 1)]
    rows = list(dict.fromkeys(p.row for p in panels))
    pages = []
    for a, b in itertools.pairwise(cuts):
        most = MOST // (b - a)
        for i in range(0, len(rows), most):
            some = [p for p in panels if p.column in columns[a:b] and p.row in rows[i : i + most]]
            pages += [(some, False)] if some else []
    return pages


def _figure(
    panels: Sequence[Panel],
    flowing: bool,
    width: float,
    styles: Mapping[str, LevelLook],
    ranges: Mapping[Axis, Range | None],
    caption: str,
    title: str,
) -> Figure:
    """Draw one page.

    Args:
        panels: The panels.
        flowing: Whether they are placed side by side instead of in a grid.
        width: Width of the figure in inches.
        styles: Looks of the levels.
        ranges: Ranges of the y axes.
        caption: The caption.
        title: Title of the legend.

    Returns:
        The figure.
    """
    rows = list(dict.fromkeys(p.row for p in panels))
    columns = list(dict.fromkeys(p.column for p in panels))
    if flowing:
        across = _across(len(panels), width)
        places = {id(p): divmod(i, across) for i, p in enumerate(panels)}
    else:
        across = len(columns)
        places = {id(p): (rows.index(p.row), columns.index(p.column)) for p in panels}
    at = dict(sorted(((places[id(p)], p) for p in panels), key=lambda item: item[0]))

    def shares_x(row: int, column: int) -> bool:
        """Return whether the panel below has the same x axis, so that its labels serve both."""
        below = at.get((row + 1, column))
        return not flowing and below is not None and below.x == at[row, column].x

    deep = max(row for row, _ in at) + 1
    feet = [max(p.foot.count("\n") + bool(p.foot) for (r, _), p in at.items() if r == row) for row in range(deep)]
    inner = 1.8 if len(panels) == 1 else 1.1 if deep < 4 else 0.85
    tall = [inner * max(_TALL.get(p.x.kind, 1.0) for (r, _), p in at.items() if r == row) for row in range(deep)]
    wide = 72 * (width / across - 0.5)
    room = wide if flowing else 72 * (width - 0.6) / across  # panels of a grid have no labels between them
    titles = {place: _named(p, place, flowing, room) for place, p in at.items()}
    around = LINE * sum(feet)
    for row in range(deep):
        around += max(0.2 + LINE * titles[r, c].count("\n") for r, c in at if r == row)
        around += max(_below(p, shares_x(r, c), wide) for (r, c), p in at.items() if r == row)
    handles = level_legend(panels, styles)
    above = legend_rows([str(h.get_label()) for h in handles], width) + bool(title)
    below = wrapped(caption, (width - 0.15) * 72).count("\n") + 1
    height = sum(tall) + around + (above + below) * LINE + 0.2
    figure = Figure(figsize=(width, height), layout=layout())
    grid = figure.add_gridspec(deep, across, height_ratios=tall)
    letters = iter(string.ascii_lowercase)
    for (row, column), panel in at.items():
        ax = figure.add_subplot(grid[row, column])
        beside = [m for p in panels if p.x == panel.x for m in p.marks]
        draw_panel(ax, panel, styles, ranges[panel.y], beside, (wide, 72 * tall[row]))
        _title(ax, next(letters, ""), titles[row, column], panel.foot, feet[row])
        if not flowing and (row, column - 1) in at:
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
        if shares_x(row, column):
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
    add_legend(figure, handles, title)
    add_caption(figure, caption)
    return settled(figure)


_TALL = {"rank": 1.4}  # relative height of a panel, by kind of its x axis


def _named(panel: Panel, place: tuple[int, int], flowing: bool, width: float) -> str:
    """Return the title of a panel in lines of at most `width` points, without what its axes already say."""
    names = [panel.column if place[0] == 0 and not flowing else "", panel.row]
    title = ", ".join(name for name in names if name not in ("", panel.x.label, panel.y.label))
    return fitted(printable(title, 80).replace(" ≤ ", "\u00a0≤\u00a0"), width - 26)


def _below(panel: Panel, shared: bool, width: float) -> float:
    """Return the height of the tick labels and the label of the x axis in inches."""
    turned = 0.35 if panel.x.kind == "names" and len(panel.x.ticks) > 3 else 0.0
    return (
        0.05
        if shared
        else 0.16 + turned + LINE * (fitted(panel.x.label, width).count("\n") + 1.4) * bool(panel.x.label)
    )


def _across(count: int, width: float) -> int:
    """Return the number of panels per row outside a grid."""
    if width == COLUMN_WIDTHS[1]:
        return 1 if count <= 3 else 2
    return count if count <= 3 else 2 if count == 4 else 3 if count in (5, 6, 9) else 4


def _title(ax: Axes, letter: str, title: str, foot: str, lines: int) -> None:
    """Set the title of a panel and, below it in small type, the foot, with space for `lines` lines."""
    ax.set_title(rf"$\mathbf{{({letter})}}$  {title}", loc="left", pad=4.0 + 1.2 * SMALL * lines)
    if foot:
        ax.text(0, 1.02, foot, transform=ax.transAxes, va="bottom", fontsize=SMALL, color="0.2", linespacing=1.1)
