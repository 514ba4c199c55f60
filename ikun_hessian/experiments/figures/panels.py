"""Draw the panels of a study's figures: looks of the levels, marks and legend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hessian_tools.plots.curves import Array
from hessian_tools.plots.style import SMALL, Colour, looks, printable, say, shades
from ikun_hessian.experiments.figures.axes import BEYOND, Range, gain_labels, set_x, set_y
from ikun_hessian.experiments.figures.chart import Mark, Panel

MARKERS = "os^DvP*X<p>h"
COLOURS = (0, 1, 2, 3, 4, 9, 5, 7)  # colours of the palette that are dark enough
MORE: tuple[Colour, ...] = (  # black and three colours of Paul Tol's "muted" palette
    (0.1, 0.1, 0.1),
    (0.2, 0.13, 0.53),
    (0.53, 0.13, 0.33),
    (0.6, 0.6, 0.2),
)
KNOWN = (  # initializers with the same look in all figures, the most common first
    *("ikun", "kaiming", "xavier", "lecun", "normal", "ikun_v1", "ikun_v2", "orthogonal", "lsuv", "fluctuation"),
    *("delta_orthogonal", "firing", "gradient_stable", "tdbn", "two_sided", "relay"),
)
LINES = ("median", "slope", "curve", "steps")
NOTES = {  # note of a mark: label in the legend, marker, face colour
    "not converged": ("not converged", "o", "white"),
    "diverged": ("diverged run", "x", "0.2"),
    "never": ("never reached", "o", "white"),
    "censored": ("censored run", "|", "0.2"),
}
LEAST_RUNS = 3  # a band of quartiles needs this number of runs


@dataclass(frozen=True)
class LevelLook:
    """How a level of the condition is drawn in all panels.

    Attributes:
        colour: Colour of lines and markers.
        dashes: Dashes of lines, in matplotlib's notation.
        marker: Marker.
        place: Horizontal offset of its dots from those of other levels, from -0.5 to 0.5.
        label: Label in the legend, "" for the name of the level.
    """

    colour: Colour
    dashes: Any
    marker: str
    place: float
    label: str = ""


def level_looks(names: Sequence[str], by: str = "") -> dict[str, LevelLook]:
    """Choose a different look for each level.

    Args:
        names: Names of the levels.
        by: The condition. Known initializers have fixed looks; levels that are numbers go from dark to light.

    Returns:
        The look of each level.
    """
    count = len(names)
    turns = _turns(names) if by == "init" else list(range(count))
    palette = [*(looks(10)[i][0] for i in COLOURS), *MORE]
    colours = [palette[turn % len(palette)] for turn in turns]
    if count > 3 and all(_is_number(name) for name in names):
        colours = [colour for colour, _ in shades(count)]
    dashes = looks(max(turns, default=0) + 1)
    labels = (
        gain_labels([float(name) for name in names]) if by == "gain" and all(map(_is_number, names)) else [""] * count
    )
    markers = [MARKERS[(turn + turn // len(MARKERS)) % len(MARKERS)] for turn in turns]
    return {
        name: LevelLook(colours[i], dashes[turns[i]][1], markers[i], (i + 0.5) / count - 0.5, labels[i])
        for i, name in enumerate(names)
    }


def _turns(names: Sequence[str]) -> list[int]:
    """Return the index of the look of each initializer. Unknown initializers get the least common unused looks."""
    own = [KNOWN.index(name) for name in names if name in KNOWN]
    rarest = itertools.chain(reversed(range(len(MARKERS))), itertools.count(len(KNOWN)))
    free = (turn for turn in rarest if turn not in own)
    return [KNOWN.index(name) if name in KNOWN else next(free) for name in names]


def _is_number(name: str) -> bool:
    """Return whether the name is a finite number."""
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def draw_panel(
    ax: Axes,
    panel: Panel,
    styles: Mapping[str, LevelLook],
    found: Range | None,
    beside: Sequence[Mark],
    size: tuple[float, float],
) -> None:
    """Draw a panel.

    Args:
        ax: The axes to draw into.
        panel: The panel.
        styles: Looks of the levels.
        found: Range of the y axis, None if no value is finite.
        beside: All marks that share the x axis.
        size: Width and height of the panel in points.
    """
    if found is None or not panel.marks:
        return say(ax, "nothing measured")
    set_y(ax, found, panel.y.label, panel.y.kind, size[1])
    set_x(ax, panel.x, beside, size[0])
    dots = 3.0 if len(panel.marks) < 100 else 2.2
    ends = (int(max((m.x for m in beside), default=0)), int(max((-m.x for m in beside), default=0)))
    for name, look in styles.items():
        for kind in dict.fromkeys(m.kind for m in panel.marks if m.level == name):
            marks = [m for m in panel.marks if (m.level, m.kind) == (name, kind)]
            x = _places(marks, panel.x.kind, look, ends)
            y = np.array([_shown(m.value, found) for m in marks])
            _draw(ax, kind, marks, x, y, look, found, dots)
    if panel.y.kind == "place":
        _name_places(ax, [m for m in panel.marks if m.x == 1], styles)
    sns.despine(ax=ax)


def _name_places(ax: Axes, marks: Sequence[Mark], styles: Mapping[str, LevelLook]) -> None:
    """Write the names of the levels at the ends of their lines."""
    ax.set_xlim(-0.12, 1.45)
    for value in dict.fromkeys(m.value for m in marks):
        names = ", ".join(styles[m.level].label or printable(m.level, 18) for m in marks if m.value == value)
        ax.text(1.05, value, names, va="center", fontsize=SMALL, color="0.2")


def _places(marks: Sequence[Mark], kind: str, look: LevelLook, ends: tuple[int, int]) -> Array:
    """Return the positions of the marks of one level on the x axis, spread out where they would coincide.

    Args:
        marks: The marks.
        kind: Kind of the x axis.
        look: Look of the level.
        ends: Numbers of ranks from the largest and from the smallest eigenvalue.

    Returns:
        The positions [n].
    """
    x = np.array([m.x for m in marks], dtype=float)
    dots = marks[0].kind == "run"
    if kind == "rank":
        return np.where(x > 0, x, sum(ends) + 2 + x) + 0.5 * look.place
    if kind == "gain" and dots:
        return np.asarray(x * 2 ** (0.4 * _spread(x)))
    if kind == "names" and dots:
        return np.asarray(x + 0.5 * _spread(x))
    return x


def _spread(x: Array) -> Array:
    """Return shifts between -0.5 and 0.5 that separate equal positions."""
    at = [(x[:i] == v).sum() for i, v in enumerate(x)]
    counts = [(x == v).sum() for v in x]
    return np.asarray((np.array(at) + 0.5) / np.array(counts) - 0.5)


def _shown(value: float, found: Range) -> float:
    """Return the position of a value: on the floor if it is too small, in the strip or NaN if it is infinite."""
    if math.isinf(value):
        return found.axis.high * (1 - BEYOND / 2) if found.beyond and value > 0 else math.nan
    return found.floor if not math.isnan(found.floor) and value < found.floor else value


def _draw(
    ax: Axes, kind: str, marks: Sequence[Mark], x: Array, y: Array, look: LevelLook, found: Range, dots: float
) -> None:
    """Draw marks of one kind and level.

    Args:
        ax: The axes.
        kind: Kind of the marks.
        marks: The marks.
        x: Their positions on the x axis [n].
        y: Their positions on the y axis [n].
        look: Look of the level.
        found: Range of the y axis.
        dots: Size of the dots of runs.
    """
    name = marks[0].level
    if kind == "run":
        for note in dict.fromkeys(m.note for m in marks):
            at, lost = np.array([m.note == note for m in marks]), note == "diverged"
            ax.plot(
                x[at], y[at], linestyle="none", marker=NOTES[note][1] if lost else look.marker, markersize=dots,
                color=look.colour, alpha=0.75, markerfacecolor="white" if note else look.colour,
                markeredgewidth=1.0 if lost else 0.6 if note else 0.2, label=f"run {name}", zorder=1.6,
            )  # fmt: skip
    elif kind in ("censored", "diverged"):
        values = np.array([m.value for m in marks])
        y = np.where(
            np.isinf(values), np.clip(values, found.axis.low, found.axis.high), y
        )  # infinite values on the edge
        ax.plot(
            x, y, linestyle="none", marker=NOTES[kind][1], markersize=5, color=look.colour, markeredgewidth=1.0,
            label=f"{kind} {name}", zorder=3, clip_on=False,
        )  # fmt: skip
    elif kind == "bar":
        ax.hlines(y, x - 0.32, x + 0.32, color=look.colour, linewidth=1.6, zorder=2, label=f"bar {name}")
    elif kind == "path":
        for run in dict.fromkeys(m.run for m in marks):
            at = np.array([m.run == run for m in marks])
            ax.plot(x[at], y[at], color=look.colour, linewidth=0.5, alpha=0.5, zorder=1.2, label=f"path {name}")
    else:
        order = np.argsort(x, kind="stable")
        for part in _unbroken(np.array([m.x for m in marks])[order]):
            _line(ax, kind, [marks[i] for i in order[part]], x[order[part]], y[order[part]], look, found)


def _unbroken(x: Array) -> list[slice]:
    """Split ranks into those from the largest and those from the smallest eigenvalue."""
    cuts = [0, *(int(i) + 1 for i in np.flatnonzero((x[:-1] > 0) & (x[1:] < 0))), len(x)]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def _line(ax: Axes, kind: str, marks: Sequence[Mark], x: Array, y: Array, look: LevelLook, found: Range) -> None:
    """Draw a line through marks, with the band of their quartiles and markers at some of them."""
    low, high = (np.array([getattr(m, end) for m in marks]) for end in ("low", "high"))
    if np.isfinite([low, high]).any() and min(m.n for m in marks) >= LEAST_RUNS:
        lower = np.array([found.axis.low if math.isinf(v) and v < 0 else _shown(v, found) for v in low])
        upper = np.where(np.isposinf(high), found.axis.high, high)
        name = f"band {marks[0].level}"
        ax.fill_between(x, lower, upper, color=look.colour, alpha=0.15, linewidth=0, zorder=1, label=name)
    step = max(1, len(x) // 6)
    ax.plot(
        x, y, color=look.colour, linestyle=look.dashes, linewidth=1.1, markersize=3.2, markeredgewidth=0.3,
        drawstyle="steps-post" if kind == "steps" else "default", label=marks[0].level,
        marker=look.marker if kind in ("median", "slope") else "", markevery=(int((look.place + 0.5) * step), step),
        zorder=2,
    )  # fmt: skip


def level_legend(panels: Sequence[Panel], styles: Mapping[str, LevelLook]) -> list[Line2D | Patch]:
    """Compose the legend of the levels, bands and special markers of some panels."""
    marks = [m for p in panels for m in p.marks]
    kinds, drawn = {m.kind for m in marks}, {m.level for m in marks}
    lines = bool(kinds & set(LINES))
    dots = bool(kinds - {"curve", "steps", "censored", "diverged"})
    handles: list[Line2D | Patch] = [
        Line2D(
            [], [], color=look.colour, linestyle=look.dashes if lines else "none", linewidth=1.1,
            marker=look.marker if dots else "", markersize=3.2, label=look.label or printable(name, 20),
        )
        for name, look in styles.items()
        if name in drawn
    ]  # fmt: skip
    if any(m.low < m.high and m.n >= LEAST_RUNS for m in marks):
        handles.append(Patch(facecolor="0.85", label="quartiles"))
    for note, (label, marker, face) in NOTES.items():
        if any(note in (m.note, m.kind) for m in marks):
            handles.append(
                Line2D(
                    [],
                    [],
                    color="0.2",
                    marker=marker,
                    markerfacecolor=face,
                    markersize=3.5,
                    linestyle="none",
                    label=label,
                )
            )
    if any(p.x.kind == "gain" for p in panels):
        handles.append(Line2D([], [], color="0.45", linestyle="--", linewidth=0.8, label="the initializer’s own"))
    return handles
