"""The figure of the study of generalization: the primary measure against the gap, and psi of every measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hessian_tools.plots.style import (
    PANEL,
    SMALL,
    WIDTH,
    add_caption,
    layout,
    log_places,
    log_x_ticks,
    looks,
    numbers,
    say,
    set_title,
    settled,
    styled,
)
from ikun_hessian.experiments.generalization.measures import CONTROL, MEASURES, PRIMARY, SPIKING, SURROGATE
from ikun_hessian.experiments.generalization.result import END, MATCHED
from ikun_hessian.experiments.generalization.summary import ASKED, GAP, MeasureResult, Networks, Summary

MARKERS = "os^Dv"
PARTS = 12  # in which the points are drawn
AXES = {
    "lr": "learning rate", "batch-size": "batch size", "hidden": "hidden layers", "weight-decay": "weight decay",
    "init": "initializer",
}  # fmt: skip
GROUPS = {SPIKING: "spiking loss", SURROGATE: "surrogate", CONTROL: "controls"}
PERCENT = 100.0


def figure_of(summary: Summary) -> Figure:
    """Draw the primary measure against the gap, coloured by every axis, and psi of all measures with 95% intervals.

    Args:
        summary: The answer of the study.

    Returns:
        The figure, two columns wide.
    """
    networks = summary.networks[ASKED[0]]
    axes = networks.grid.axes
    with styled():
        figure = Figure(figsize=(WIDTH, 5.2), layout=layout())
        grid = figure.add_gridspec(1, 2, width_ratios=[1.0, 1.05])
        rows = max(1, math.ceil(len(axes) / 2))
        cells = GridSpecFromSubplotSpec(rows, 2, grid[0])
        first: Axes | None = None
        for i, axis in enumerate(axes):
            ax = figure.add_subplot(cells[i], sharex=first, sharey=first)
            first = first or ax
            set_title(ax, chr(ord("a") + i), AXES.get(axis, axis))
            _scatter(ax, networks, i)
            ax.label_outer()
            if i % 2 == 0:
                ax.set_ylabel("accuracy gap (points)")
            if i + 2 >= len(axes):
                ax.set_xlabel("PAC-Bayes $1/\\sigma^2$")
        if first is not None:
            _scale(first, networks)
        ax = figure.add_subplot(grid[1])
        set_title(ax, chr(ord("a") + len(axes)), "")
        _correlations(ax, summary)
        add_caption(figure, figure_caption(summary))
        return settled(figure)


def figure_caption(summary: Summary) -> str:
    """Return the caption: what is shown, and of how many networks."""
    there = summary.networks[ASKED[0]]
    n, environments = len(there.grid.seed), len(there.environments)
    return (
        f"{n} spiking networks in {environments} environments, at the first epoch of training loss at most "
        f"{summary.threshold:g}. Left: each point is a network; a learning rate counts as the first or second of its "
        "optimizer. Right: mean psi over the axes of Kendall's tau over networks that differ in one axis only; bars "
        "are 95% intervals of a bootstrap over configurations, grey ticks the axes. psi > 0: sharper networks have the "
        "larger gap."
    )


def _scatter(ax: Axes, networks: Networks, axis: int) -> None:
    values, gaps = networks.measures[PRIMARY], PERCENT * networks.targets[GAP]
    names = networks.levels[axis]
    shades = looks(len(names))
    size = 5.0 if len(values) > 200 else 12.0
    handles = []
    shown = np.random.default_rng(0).permutation(np.flatnonzero(np.isfinite(values) & (values > 0)))
    for part in np.array_split(shown, PARTS):  # mixed, so that no level covers the others
        for level in range(len(names)):
            at = part[networks.grid.levels[part, axis] == level]
            style: dict[str, Any] = {"color": [shades[level][0]], "marker": MARKERS[level % len(MARKERS)]}
            ax.scatter(values[at], gaps[at], s=size, alpha=0.7, linewidths=0, rasterized=True, **style)
    for level, name in enumerate(names):
        colour, marker = shades[level][0], MARKERS[level % len(MARKERS)]
        handles.append(
            Line2D(
                [], [], color=colour, marker=marker, linestyle="", markersize=3.5, label=_shown(name, axis, networks)
            )
        )
    ax.legend(
        handles=handles, loc="upper left", fontsize=SMALL - 0.5, handletextpad=0.1, borderpad=0.1, borderaxespad=0.2,
        labelspacing=0.2, frameon=True, framealpha=0.8, edgecolor="none",
    )  # fmt: skip


def _shown(name: str, axis: int, networks: Networks) -> str:
    if networks.grid.axes[axis] == "lr":
        return {"1": "lower", "2": "higher"}.get(name, name) if len(networks.levels[axis]) == 2 else name
    return name.replace(",", " + ")


def _scale(ax: Axes, networks: Networks) -> None:
    values, gaps = networks.measures[PRIMARY], PERCENT * networks.targets[GAP]
    shown = np.isfinite(values) & (values > 0)
    if not shown.any():
        return
    low, high = (float(x) for x in np.quantile(values[shown], [0.002, 0.998]) * np.array([0.87, 1.15]))
    ticks = log_places(low, high)[0]
    log_x_ticks(ax, low, high, ticks, numbers(ticks), PANEL / 2)
    ax.set_xticks([], minor=True)
    least, most = float(gaps[shown].min()), float(gaps[shown].max())
    room = 0.05 * max(most - least, 0.1)
    ax.set_ylim(least - room, most + 7 * room)  # space for the legends
    ax.yaxis.set_major_locator(MaxNLocator(5))


def _correlations(ax: Axes, summary: Summary) -> None:
    found = {moment: summary.results.get((moment, GAP), {}) for moment in (MATCHED, END)}
    rows = _ordered(found[MATCHED] or found[END])
    if not rows:
        say(ax, "no pair of networks")
        return
    colours = [look[0] for look in looks(3)]
    y, ticks, labels = 0.0, [], []
    for group, title in GROUPS.items():
        members = [r for r in rows if r.measure.group == group]
        if not members:
            continue
        ax.text(0.01, y, title, transform=ax.get_yaxis_transform(), va="center", fontsize=SMALL, style="italic")
        y += 1
        for r in members:
            for moment, shift, filled in ((MATCHED, -0.14, True), (END, 0.2, False)):
                at = found[moment].get(r.measure.name)
                if at is None or not at.granulated.axes:
                    continue
                psi = at.granulated.psi
                colour = colours[0 if filled else 1]
                ax.plot([psi.low, psi.high], [y + shift] * 2, color=colour, linewidth=1.0, solid_capstyle="butt")
                ax.plot(
                    psi.value, y + shift, "o" if filled else "s", color=colour, markersize=3.2,
                    markerfacecolor=colour if filled else "white", markeredgewidth=0.8,
                )  # fmt: skip
                if filled:
                    taus = [tau.value for tau in at.granulated.axes.values()]
                    ax.plot(
                        taus, [y + shift] * len(taus), "|", color="0.6", markersize=4, markeredgewidth=0.6, zorder=0
                    )
            ticks.append(y)
            labels.append(r.measure.short + (" (primary)" if r.measure.name == PRIMARY else ""))
            y += 1
    ax.axvline(0, color="0.4", linewidth=0.6, zorder=0)
    ax.set_yticks(ticks, labels, fontsize=SMALL - 0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(y - 0.3, -0.7)
    ax.set_xlabel("psi: rank correlation of sharpness and gap")
    for spine in ("top", "right", "left"):
        ax.spines[spine].set_visible(False)
    handles = [
        Line2D([], [], color=colours[0], marker="o", markersize=3.2, linewidth=1.0, label="matched training loss"),
        Line2D(
            [], [], color=colours[1], marker="s", markersize=3.2, markerfacecolor="white", linewidth=1.0, label="end"
        ),
    ]
    ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 0.995), ncols=2, fontsize=SMALL, borderpad=0)


def _ordered(found: dict[str, MeasureResult]) -> Sequence[MeasureResult]:
    """Return the measures by group, and within a group by psi; the primary measure first."""
    rows = [found[m.name] for m in MEASURES if m.name in found]
    return sorted(rows, key=lambda r: (r.measure.name != PRIMARY, -_psi(r)))


def _psi(result: MeasureResult) -> float:
    return result.granulated.psi.value if result.granulated.axes else -2.0
