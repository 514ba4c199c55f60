"""Choose and draw the axes of a study's figures. Panels with the same axis share its range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from hessian_tools.plots.curves import (
    Array,
    SymlogAxis,
    ValueAxis,
    linear_axis,
    log_margin,
    symlog_limits,
    value_axis,
)
from hessian_tools.plots.spectrum_panels import set_rank_axis
from hessian_tools.plots.style import (
    NORMAL,
    SMALL,
    count_axis,
    log_places,
    log_x_ticks,
    numbers,
    printable,
    symlog_ticks,
    text_width,
    value_scale,
    wrapped,
)
from ikun_hessian.experiments.figures.chart import Axis, Mark
from ikun_hessian.experiments.grouping import gain_name

DECADES = 12  # largest range of a logarithmic axis; smaller values are drawn on the floor
BEYOND = 0.12  # height of the strip for infinite values, as a fraction of the panel


@dataclass(frozen=True)
class Range:
    """Range of the y axis of a panel.

    Attributes:
        axis: The scale and the limits.
        floor: Position at which values too small for the axis are drawn, NaN if there are none.
        beyond: Whether infinite values are drawn in a strip at the top.
    """

    axis: ValueAxis
    floor: float = math.nan
    beyond: bool = False


def y_range(kind: str, marks: Sequence[Mark], least: float = math.nan) -> Range | None:
    """Choose the range of a y axis.

    Args:
        kind: Kind of the axis (see `Axis`).
        marks: All marks that share the axis.
        least: Smallest half width of the linear part of a symlog axis, NaN for no restriction.

    Returns:
        The range, None if no value is finite.
    """
    values = np.array([v for m in marks for v in (m.value, m.low, m.high)], dtype=float)
    beyond = bool(np.isposinf([m.value for m in marks]).any())
    y = values[np.isfinite(values)]
    if kind == "share":
        return Range(ValueAxis("linear", -0.04, 1.04))
    if not len(y):
        return Range(ValueAxis("linear", 0.0, 1.0), beyond=True) if beyond and kind == "epochs" else None
    if kind == "log":
        positive = y[y > 0]
        if len(positive):
            least = max(float(positive.min()), float(positive.max()) * 10.0**-DECADES)
            cut = bool((y < least).any())
            known = np.append(positive[positive >= least], [least / 10] if cut else [])
            room = log_margin(float(known.min()), float(known.max()))
            floor = least / 10 if cut else math.nan
            return Range(ValueAxis("log", float(known.min() / room), float(known.max() * room)), floor)
    if kind == "place":
        return Range(ValueAxis("linear", float(y.max()) + 0.5, 0.5))
    if kind == "signed":
        return Range(_linear_to(least, value_axis(y, np.zeros(len(y))), y))
    if kind == "epochs":
        top = float(y.max())
        return Range(ValueAxis("linear", 0.0, top * (1.06 + 1.6 * BEYOND * beyond)), beyond=beyond)
    return Range(linear_axis(y, np.zeros(len(y))))


def _linear_to(least: float, found: ValueAxis, y: Array) -> ValueAxis:
    """Return the axis with a linear part of at least +-least, or a linear axis if that covers most of the values."""
    if found.kind != "symlog" or not least > found.linthresh:
        return found
    if least > np.abs(y).max() / 10:
        return linear_axis(y, np.zeros(len(y)))
    return ValueAxis("symlog", *symlog_limits(least, float(y.min()), float(y.max())), least)


def set_y(ax: Axes, found: Range, label: str, kind: str, height: float) -> None:
    """Set the y axis of a panel.

    Args:
        ax: The panel.
        found: The range.
        label: Label of the axis.
        kind: Kind of the axis (see `Axis`).
        height: Height of the panel in points.
    """
    low, high = found.axis.low, found.axis.high
    if kind == "place":
        ax.set_ylim(low, high)
        ax.set_yticks(range(1, int(low) + 1), [f"{i}" for i in range(1, int(low) + 1)])
        ax.set_ylabel(fitted(label, height))
        return
    value_scale(ax, found.axis, fitted(label, height), height)
    if kind == "share":
        ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    if kind == "epochs":
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter("{x:g}")
    if found.beyond:
        edge = high * (1 - BEYOND)
        ticks = [t for t in ax.get_yticks() if t < edge]
        ax.set_yticks([*ticks, high * (1 - BEYOND / 2)], [*numbers(ticks), "never"])
        ax.axhspan(edge, high, color="0.95", linewidth=0, zorder=0)
    if not math.isnan(found.floor):
        ax.axhline(found.floor, color="0.45", linestyle=":", linewidth=0.8, zorder=0, label="floor")
    if found.axis.kind == "symlog" or (kind == "signed" and low < 0 < high):
        ax.axhline(0, color="0.75", linewidth=0.6, zorder=0)


def fitted(text: str, length: float) -> str:
    """Break the label of an axis or a title into lines of at most `length` points."""
    return wrapped(text, length * SMALL / NORMAL)


def set_x(ax: Axes, axis: Axis, marks: Sequence[Mark], width: float) -> None:
    """Set the x axis of a panel.

    Args:
        ax: The panel.
        axis: The axis.
        marks: All marks that share the axis.
        width: Width of the panel in points.
    """
    x = np.array([m.x for m in marks if math.isfinite(m.x)], dtype=float)
    low, high = (float(x.min()), float(x.max())) if len(x) else (0.0, 1.0)
    label = fitted(axis.label, width)
    ax.set_xlabel(label)
    if axis.kind == "rank":
        tops, smalls = int(max(high, 0)), int(max(-low, 0))
        set_rank_axis(ax, tops, smalls, width)
    elif axis.kind == "names":
        ax.set_xlim(-0.5, len(axis.ticks) - 0.5)
        labels = [printable(name, 18) for name in axis.ticks]
        if any(m.kind == "slope" for m in marks):
            ax.set_xlim(-0.12, 1.12)
        turned = len(labels) * (max(text_width(name, SMALL) for name in labels) + 4) > width
        ax.set_xticks(range(len(labels)), labels, fontsize=SMALL, rotation=90 if turned else 0)
        ax.tick_params(axis="x", length=0 if turned else 2)
    elif axis.kind == "count":
        count_axis(ax, [int(n) for n in x], width)
    elif axis.kind == "gain":
        low, high = min(low, 1.0), max(high, 1.0)
        _gain_x(ax, low / 1.5, high * 1.5, sorted(set(x.tolist())), width)
        ax.axvline(1, color="0.45", linestyle="--", linewidth=0.8, zorder=0, label="own")
    elif axis.kind == "signed":
        _signed_x(ax, replace(axis, label=label), x, width)
    else:
        room = 0.04 * (high - low) or 0.5
        ax.set_xlim(low - room, high + room)
        found = MaxNLocator(max(2, int(width / 28)), integer=True, steps=[1, 2, 5, 10]).tick_values(low, high)
        ax.set_xticks([t for t in found if low <= t <= high])


def _signed_x(ax: Axes, axis: Axis, x: Array, width: float) -> None:
    """Set an x axis that is logarithmic, symlog or linear, depending on the values."""
    if not math.isnan(axis.linthresh):
        return symlog_ticks(ax, SymlogAxis(axis.linthresh, float(x.min()), float(x.max()), 0.0), axis.label, width)
    found = value_axis(x, np.zeros(len(x)))
    if found.kind == "symlog":
        return symlog_ticks(ax, SymlogAxis(found.linthresh, found.low, found.high, 0.0), axis.label, width)
    if found.kind == "log":
        return _log_x(ax, found.low, found.high, width)
    ax.set_xlim(found.low, found.high)
    ax.xaxis.set_major_locator(MaxNLocator(max(2, int(width / 36)), steps=[1, 2, 5, 10]))


def _log_x(ax: Axes, low: float, high: float, width: float) -> None:
    """Set a logarithmic x axis with labels at as many of its ticks as fit."""
    ticks, decades = log_places(low, high)
    log_x_ticks(ax, low, high, ticks, numbers(ticks), width)
    ax.set_xticks(decades, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _gain_x(ax: Axes, low: float, high: float, gains: Sequence[float], width: float) -> None:
    """Set a logarithmic x axis with labels at as many gains as fit, with priority for those close to 1."""
    order = sorted(gains, key=lambda t: (abs(math.log(t)), t))
    labels = gain_labels(order)
    log_x_ticks(ax, low, high, order, labels, width)
    if len(ax.get_xticks()) < len(order):  # more labels fit if they are rotated
        log_x_ticks(ax, low, high, order, labels, width, turned=True)
    ax.set_xticks(order, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())


def gain_labels(gains: Sequence[float]) -> list[str]:
    """Format all gains in the same way: as n and 1/n if that is exact and short for all, otherwise as numbers."""
    names = [gain_name(t) for t in gains]
    return numbers(gains) if any("." in name or "e" in name for name in names) else names


def floors(ranges: Mapping[Axis, Range | None]) -> str:
    """Describe for the caption where the axes are linear and where their floors are."""
    known = [(axis.label, r) for axis, r in ranges.items() if r is not None]
    linear = [f"{label} ±{r.axis.linthresh:.2g}" for label, r in known if r.axis.kind == "symlog"]
    cut = [f"{label} {r.floor:.1g}" for label, r in known if not math.isnan(r.floor)]
    text = f" Axes that are linear within these bounds and logarithmic outside: {', '.join(linear)}." if linear else ""
    return text + (f" Smaller values are drawn on the dotted floor: {', '.join(cut)}." if cut else "")
