"""Draw panels of curves against the epoch of a training run or against the number of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hessian_tools.plots.curves import Array, ValueAxis, linear_axis, value_axis
from hessian_tools.plots.style import PANEL, SMALL, Colour, Look, count_axis, despine, say, value_scale
from hessian_tools.results.spectrum import SamplePoint
from hessian_tools.results.trajectory import RANKS

Rows = Sequence[dict[str, Any]]
LIMIT_REACH = 100.0  # the stability limit is drawn if it lies within this factor of the eigenvalues
LIMIT_DASHES = (0, (6, 2))


def draw_eigenvalue_paths(ax: Axes, rows: Rows, looks: dict[str, Look], limit: float) -> tuple[ValueAxis | None, bool]:
    """Draw the largest eigenvalues and the smallest eigenvalue against the epoch.

    The largest and the smallest eigenvalue have markers and error bars; those of rank 2 and higher are thin lines.

    Args:
        ax: The panel.
        rows: Table with one row per epoch, as returned by `hessian_tools.results.trajectory.trajectory_rows`.
        looks: Looks of the operators drawn.
        limit: Stability limit, drawn as a horizontal line unless it differs from all eigenvalues by more than a factor
            of `LIMIT_REACH`.

    Returns:
        The value axis (None if there is nothing to draw) and whether the limit is drawn.
    """
    found = {
        (name, rank): (column(rows, f"{name}.lambda_{rank}"), column(rows, f"{name}.lambda_{rank}.data_stderr"))
        for name in looks
        for rank in (*range(1, RANKS + 1), "min")
    }
    found = {key: (y, e) for key, (y, e) in found.items() if np.isfinite(y).any()}
    if not found:
        say(ax, "no eigenvalue found")
        return None, False
    values, errors = (np.concatenate(part) for part in zip(*found.values(), strict=True))
    positive = values[np.isfinite(values) & (values > 0)]
    near = len(positive) > 0 and positive.min() / LIMIT_REACH <= limit <= positive.max() * LIMIT_REACH
    drawn = np.append(values, limit) if near else values
    axis = value_axis(drawn, np.append(errors, 0.0) if near else errors)
    value_scale(ax, axis, "eigenvalue λ")
    if near:
        ax.axhline(limit, color="0.2", linestyle=LIMIT_DASHES, linewidth=0.9, zorder=0, label="limit")
    x = _epochs(ax, rows, axis)
    for (name, rank), (y, e) in found.items():
        if isinstance(rank, int) and rank > 1:
            _draw_thin(ax, x, y, looks[name], f"{name} {rank}")
        else:
            hollow = column(rows, f"{name}.lambda_{rank}.converged") == 0
            _draw_curve(ax, x, y, e, looks[name], f"{name} {rank}", marker="o" if rank == 1 else "v", hollow=hollow)
    return axis, bool(near)


def draw_paths(
    ax: Axes,
    rows: Rows,
    keys: dict[str, Look],
    label: str,
    *,
    errors: str = "",
    linear: bool = False,
    height: float = PANEL / 2,
) -> ValueAxis | None:
    """Draw columns of a table against the epoch.

    Args:
        ax: The panel.
        rows: Table with one row per epoch.
        keys: Names of the columns drawn, with their looks.
        label: Label of the value axis.
        errors: Suffix of the columns with the standard errors, "" for no error bars.
        linear: Whether the value axis is linear.
        height: Height of the panel in points.

    Returns:
        The value axis, None if there is nothing to draw.
    """
    curves = {key: column(rows, key) for key in keys}
    bars = {key: column(rows, key + errors) if errors else np.zeros(len(rows)) for key in keys}
    if not any(np.isfinite(y).any() for y in curves.values()):
        say(ax, f"no {label}")
        return None
    choose = linear_axis if linear else value_axis
    axis = choose(np.concatenate(list(curves.values())), np.concatenate(list(bars.values())))
    value_scale(ax, axis, label, height)
    x = _epochs(ax, rows, axis)
    for key, look in keys.items():
        _draw_curve(ax, x, curves[key], bars[key], look, key)
    return axis


def name_ends(ax: Axes, names: dict[str, str], height: float) -> None:
    """Write the names of lines to the right of a panel and connect each name to the end of its line.

    If there is no space for all names, names at equal distances are kept.

    Args:
        ax: The panel.
        names: Name of each line by its label.
        height: Height of the panel in points.
    """
    room = 1.25 * SMALL / height
    chosen = np.linspace(0, len(names) - 1, min(int(1 / room), len(names))).round().astype(int)
    kept = {list(names)[i] for i in chosen}
    ends: list[tuple[float, float, Line2D]] = []
    for line in ax.lines:
        points = np.asarray(line.get_xydata())
        last = points[np.isfinite(points[:, 1])][-1:]
        if line.get_label() in kept and len(last):
            x, y = (float(place) for place in (ax.transData - ax.transAxes).transform(last)[0])
            ends.append((x, y, line))
    ends.sort(key=lambda end: end[1])
    places: list[float] = []
    for _, y, _ in ends:
        places.append(max(y, places[-1] + room) if places else y)
    highest = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], highest)
        highest = places[i] - room
    for (x, y, line), place in zip(ends, places, strict=True):
        ax.plot(
            [x + 0.02, 1.0, 1.03], [y, y, place], transform=ax.transAxes, clip_on=False, color=line.get_color(),
            linewidth=0.6,
        )  # fmt: skip
        text = names[str(line.get_label())]
        ax.text(1.04, place, text, transform=ax.transAxes, va="center", fontsize=SMALL, color="0.2")


def draw_resamples(
    ax: Axes,
    curve: Sequence[SamplePoint],
    ranks: Sequence[Sequence[Array]],
    whole: tuple[float, float, int],
    colours: tuple[Colour, Colour],
    label: str,
) -> ValueAxis | None:
    """Draw values on random subsets of the data against the number of samples.

    Each subset is a dot, which is hollow if the subset shares samples with another one. A line connects the medians.

    Args:
        ax: The panel.
        curve: Points of the curve.
        ranks: For each rank and point, the values on the subsets.
        whole: Value on all samples, its standard error (NaN if unknown) and the number of all samples.
        colours: Colour of the first rank, whose line is thick, and colour of the others.
        label: Label of the value axis.

    Returns:
        The value axis, None if there is nothing to draw.
    """
    value, error, samples = whole
    everything = np.concatenate([np.empty(0), *(y for rank in ranks for y in rank)])
    if not len(everything):
        say(ax, "no finite value")
        return None
    bar = error if math.isfinite(error) else 0.0
    axis = value_axis(np.append(everything, value), np.append(np.zeros(len(everything)), bar))
    count_axis(ax, [*(point.samples for point in curve), *([samples] if samples else [])])
    value_scale(ax, axis, label)
    if axis.low < 0:
        ax.axhline(0, color="0.75", linewidth=0.6, zorder=0)
    if math.isfinite(value):
        ax.axhspan(value - bar, value + bar, color="0.85", linewidth=0, zorder=0, label="error")
        ax.axhline(value, color="0.2", linestyle=LIMIT_DASHES, linewidth=0.9, zorder=1, label="whole")
    x = np.array([point.samples for point in curve], dtype=float)
    shared = np.array([not point.disjoint for point in curve])
    for number, rank in reversed(list(enumerate(ranks, 1))):
        first = number == 1
        colour = colours[0 if first else 1]
        for hollow in (False, True):
            dots = [(n, y) for n, ys, s in zip(x, rank, shared, strict=True) if s == hollow for y in ys]
            ax.plot(
                [n for n, _ in dots], [y for _, y in dots], linestyle="none", marker="o",
                markersize=2.8 if first else 1.8, color=colour, markerfacecolor="white" if hollow else colour,
                markeredgewidth=0.6 if hollow else 0, label=f"dots {number}", zorder=2 if first else 1.9,
            )  # fmt: skip
        medians = np.array([np.median(y) if len(y) else math.nan for y in rank])
        ax.plot(
            x, medians, color=colour, linewidth=1.6 if first else 0.7, marker="_", markersize=7 if first else 5,
            markeredgewidth=1.6 if first else 0.7, label=f"median {number}", zorder=2 if first else 1.9,
        )  # fmt: skip
    ax.set_xlabel("samples in the subset")
    despine(ax)
    return axis


def column(rows: Rows, key: str) -> Array:
    """Return a column of the table as numbers, NaN where it is missing."""
    return np.array([float(row.get(key, math.nan)) for row in rows])


def _epochs(ax: Axes, rows: Rows, axis: ValueAxis) -> Array:
    """Set the x axis of epochs or snapshots, draw a line at 0 if values are negative, and return the positions."""
    label = "epoch" if "epoch" in rows[0] else "snapshot"
    x = column(rows, label)
    room = 0.04 * (x[-1] - x[0])
    low, high = x[0] - room, x[-1] + room
    ax.set_xlim(low, high)
    ax.set_xticks(
        [t for t in MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= t <= high]
    )
    ax.set_xlabel(label)
    if axis.low < 0:
        ax.axhline(0, color="0.75", linewidth=0.6, zorder=0)
    despine(ax)
    return x


def _draw_curve(
    ax: Axes,
    x: Array,
    y: Array,
    errors: Array,
    look: Look,
    label: str,
    *,
    marker: str = "o",
    hollow: Array | None = None,
) -> None:
    """Draw a line with markers, some of them hollow, and error bars where the errors are known."""
    colour, dashes = look
    size = 3.2 if len(x) <= 12 else 2.2
    ax.plot(x, y, color=colour, linestyle=dashes, label=label)
    known = np.isfinite(y) & (errors > 0)
    ax.vlines(x[known], (y - errors)[known], (y + errors)[known], color=colour, linewidth=0.8)
    hollow = np.zeros(len(x), dtype=bool) if hollow is None else hollow
    for at, face in ((np.logical_not(hollow), colour), (hollow, "white")):
        ax.plot(
            x[at], y[at], marker=marker, markersize=size, linestyle="none", color=colour, markerfacecolor=face,
            markeredgewidth=0.7,
        )  # fmt: skip


def _draw_thin(ax: Axes, x: Array, y: Array, look: Look, label: str) -> None:
    """Draw a thin line with small dots."""
    colour, dashes = look
    ax.plot(x, y, color=colour, linestyle=dashes, linewidth=0.6, alpha=0.6, marker=".", markersize=1.5, label=label)
