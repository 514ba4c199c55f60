"""Draw the parts that the figures of one and of several calibrations share: looks of the operators, panels and axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import NullLocator

from hessian_tools.plots.curves import Array, SymlogAxis, ValueAxis, symlog_limits
from hessian_tools.plots.style import (
    MEDIUM,
    PANEL,
    SMALL,
    TEXT_BOX,
    WIDTH,
    Look,
    apart,
    despine,
    log_ticks,
    looks,
    numbers,
    operator_name,
    set_title,
    symlog_ticks,
    value_scale,
)

CALIBRATED_OPERATORS = ("hessian", "|hessian|", "fisher", "ggn", "ggn, fitted", "smoothed")
AGAINST = ("hessian", "ggn", "smoothed")  # operators compared with the true curvature direction by direction
LETTERS = "abcdefg"
BAND = (0.7, 1.4)  # ratios that count as good; the same band as in Agreement.within
LOWEST, HIGHEST = 0.1, 10.0  # smallest and largest ratio drawn; the caption names operators outside
DECADES = 4  # largest range of |c| on the logarithmic part of a symlog axis
SURE = 0.9995  # the largest correlation that an axis in arctanh can show
TRUE = "0.1"  # colour of the true curvature


def name_of(operator: str) -> str:
    """Return the name under which a figure shows an operator or one of its variants."""
    known = {"|hessian|": "|Hessian|", "ggn, fitted": "GGN, width fitted", "smoothed": "smoothed"}
    base, comma, variant = operator.partition(", ")
    return known.get(operator) or f"{operator_name(base)}{comma}{variant}"


def look_of(operator: str) -> Look:
    """Return the look of an operator, which is the same in all figures. A variant has the colour of its operator."""
    palette = [looks(10)[i] for i in (0, 9, 7, 1, 4, 2)]
    known = dict(zip(CALIBRATED_OPERATORS, palette, strict=True))
    colour, dashes = known.get(operator) or known.get(operator.partition(", ")[0], looks(6)[5])
    return colour, dashes if operator in known else (0, (1, 1))


def curvature_axis(c: Array, errors: Array) -> SymlogAxis:
    """Choose the axis of the true curvatures.

    Args:
        c: True curvatures [n].
        errors: Their standard errors [n].

    Returns:
        An axis that is linear up to the smallest curvature that differs from 0 by two standard errors.
    """
    sizes = np.abs(c[np.abs(c) > 2 * np.nan_to_num(errors)])
    largest = float(np.abs(c[np.isfinite(c)]).max(initial=0.0)) or 1.0
    linthresh = float(np.clip(sizes.min(initial=largest), largest * 10.0**-DECADES, largest / 10))
    bars = np.concatenate([c - errors, c + errors, [largest]])
    return _with_margin(linthresh, float(np.nanmin(bars)), float(np.nanmax(bars)))


def prediction_axis(predicted: Array, axis: SymlogAxis) -> SymlogAxis:
    """Choose the axis of the predictions of an operator.

    Args:
        predicted: Predictions [n].
        axis: Axis of the true curvatures.

    Returns:
        An axis with the same scale as `axis`. It reaches from the smallest prediction to the largest prediction or
        true curvature.
    """
    finite = predicted[np.isfinite(predicted)]
    high = max(float(finite.max(initial=0.0)), axis.high)
    return _with_margin(axis.linthresh, min(float(finite.min(initial=0.0)), max(axis.low, 0.0)), high)


def _with_margin(linthresh: float, low: float, high: float) -> SymlogAxis:
    """Return a symlog axis that shows `low` to `high`."""
    return SymlogAxis(linthresh, *symlog_limits(linthresh, low, high), 0.0)


def against(
    figure: Figure, cell: SubplotSpec, letters: str, predicted: Mapping[str, Array], c: Array, errors: Array
) -> dict[str, Axes]:
    """Add a row of empty panels of the true curvature against the prediction, one panel for each operator.

    A decade has the same length on all axes.

    Args:
        figure: The figure.
        cell: The cell of its grid in which the row is placed.
        letters: Letters of the panels.
        predicted: Predictions [n] by operator.
        c: True curvatures [n].
        errors: Their standard errors [n].

    Returns:
        The panels by operator, with axes, the identity and the band of good ratios.
    """
    y = curvature_axis(c, errors)
    axes = {name: prediction_axis(values, y) for name, values in predicted.items()}
    spans = [float(np.ptp(x.forward(np.array([x.low, x.high])))) for x in axes.values()]
    grid = cell.subgridspec(1, len(axes), width_ratios=spans)
    panels = {}
    for i, (name, x) in enumerate(axes.items()):
        ax = panels[name] = figure.add_subplot(grid[0, i])
        set_title(ax, letters[i], name_of(name))
        draw_identity(ax, x, y, (WIDTH - 0.9) * 72 * spans[i] / sum(spans))
        if i:
            ax.tick_params(labelleft=False)
            ax.set_ylabel("")
    return panels


def draw_identity(ax: Axes, x: SymlogAxis, y: SymlogAxis, width: float) -> None:
    """Draw both axes, the identity, the band of good ratios and lines at 0.

    Args:
        ax: The panel.
        x: Axis of the predictions.
        y: Axis of the true curvatures.
        width: Width of the panel in points.
    """
    value_scale(ax, ValueAxis("symlog", y.low, y.high, y.linthresh), "true curvature c")
    exponents = range(math.ceil(math.log10(y.linthresh)), math.ceil(math.log10(max(y.high, -y.low))))
    ticks = [t for t in (0.0, *(sign * 10.0**k for k in exponents for sign in (1, -1))) if y.low <= t <= y.high]
    low, high = y.forward(np.array([y.low, y.high]))
    places = [float(y.forward(np.array(t)) / (high - low)) for t in ticks]
    shown = sorted(apart(ticks, places, [1.4 * MEDIUM / (0.7 * PANEL)] * len(ticks)))
    if len(shown) > 2:  # otherwise keep the ticks between the decades
        ax.set_yticks(shown, numbers(shown))
    symlog_ticks(ax, x, "prediction v′Av", width)
    low, high = y.forward(np.array([min(y.low, 0.0), max(x.high, y.high)]))
    t = y.inverse(np.linspace(low, high, 200))
    ax.fill_between(t, BAND[0] * t, BAND[1] * t, color="0.88", linewidth=0, zorder=0)
    ax.plot(t, t, color="0.4", linewidth=0.7, zorder=1, label="identity")
    ax.axvline(0, color="0.75", linewidth=0.6, zorder=0)
    if y.low < 0:
        ax.axhline(0, color="0.75", linewidth=0.6, zorder=0)
    despine(ax)


def note(ax: Axes, text: str) -> None:
    """Write text above or below the identity, on the side with fewer markers."""
    marked = [each.get_xydata() for each in ax.lines if each.get_linestyle() == "None"]
    x, y = (ax.transData - ax.transAxes).transform(np.concatenate(marked)).T
    above = ((x < 0.35) & (y > 0.75)).sum() < ((x > 0.65) & (y < 0.25)).sum()
    place, side, end = ((0.03, 0.97), "left", "top") if above else ((0.98, 0.03), "right", "bottom")
    shown = text.replace("-", "−")
    ax.text(
        *place, shown, transform=ax.transAxes, ha=side, va=end, fontsize=SMALL, color="0.2", bbox=TEXT_BOX
    )  # fmt: skip


def clipped(correlation: float) -> float:
    """Clip a correlation to the range that an axis in Fisher's z can show."""
    return min(max(correlation, -SURE), SURE)


def correlation_axis(ax: Axes, shown: Iterable[float], height: float = 0.7 * PANEL) -> None:
    """Set a y axis of correlations in Fisher's z = arctanh(r), on which equal lengths are equal evidence.

    Args:
        ax: The panel.
        shown: Correlations that the axis must show. Values that are not finite are ignored.
        height: Height of the panel in points.
    """

    def z(r: Any) -> Any:
        return np.arctanh(np.clip(r, -1 + 1e-9, 1 - 1e-9))

    finite = [clipped(r) for r in shown if math.isfinite(r)]
    low, high = z(min([*finite, 0.5])), z(max([*finite, 0.99]))
    ax.set_yscale("function", functions=(z, np.tanh))
    room = 0.05 * (high - low)
    ends = float(np.tanh(low - room)), float(np.tanh(high + room))
    ax.set_ylim(*ends)
    ticks = [t for t in (-0.99, -0.9, -0.5, 0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999) if ends[0] <= t <= ends[1]]
    places = [float((z(t) - z(ends[0])) / (z(ends[1]) - z(ends[0]))) for t in ticks]
    kept = sorted(apart(ticks[::-1], places[::-1], [1.4 * MEDIUM / height] * len(ticks)))
    ax.set_yticks(kept, numbers(kept))
    ax.yaxis.set_minor_locator(NullLocator())
    if low < 0:
        ax.axhline(0, color="0.75", linewidth=0.6, zorder=0)


def ratio_axis(ax: Axes, shown: Iterable[float]) -> None:
    """Set a logarithmic y axis of ratios, with the band of good ratios and a line at 1.

    Args:
        ax: The panel.
        shown: Ratios that the axis must show, as far as they lie between `LOWEST` and `HIGHEST`. Values that are not
            finite or not positive are ignored.
    """
    finite = [min(max(r, LOWEST), HIGHEST) for r in shown if math.isfinite(r) and r > 0]
    low, high = min([*finite, 0.5]) / 1.15, max([*finite, 2.0]) * 1.15
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    log_ticks(ax, low, high)
    ax.axhspan(*BAND, color="0.88", linewidth=0, zorder=0, label="band")
    ax.axhline(1, color="0.4", linewidth=0.7, zorder=1)
