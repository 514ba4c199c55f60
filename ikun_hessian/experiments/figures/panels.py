"""The panels of a study's figures: looks of the levels, and marks, each drawn into the axes it is given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hessian_tools.plots.style import SMALL, Colour, looks, printable, say, shades
from ikun_hessian.experiments.figures.axes import BEYOND, Range, gain_labels, set_x, set_y
from ikun_hessian.experiments.figures.chart import Mark, Panel

Array = npt.NDArray[np.float64]
MARKERS = "os^DvP*X<p>h"
COLOURS = (0, 1, 2, 3, 4, 9, 5, 7)  # of the palette; the palest left out, for those of Tol's "muted" and black
MORE: tuple[Colour, ...] = ((0.1, 0.1, 0.1), (0.2, 0.13, 0.53), (0.53, 0.13, 0.33), (0.6, 0.6, 0.2))
KNOWN = (  # initializers that look alike in all figures, the most usual first
    *("ikun", "kaiming", "xavier", "lecun", "normal", "ikun_v1", "ikun_v2", "orthogonal", "lsuv", "fluctuation"),
    *("delta_orthogonal", "firing", "gradient_stable", "tdbn"),
)
LINES = ("median", "slope", "curve", "steps")
NOTES = {  # of marks: label in the legend, marker, face
    "not converged": ("not converged", "o", "white"),
    "diverged": ("diverged run", "x", "0.2"),
    "never": ("never got there", "o", "white"),
    "censored": ("censored run", "|", "0.2"),
}


@dataclass(frozen=True)
class LevelLook:
    """How one level of the condition is drawn everywhere."""

    colour: Colour
    dashes: Any
    marker: str
    place: float  # of its dots beside those of other levels, from -0.5 to 0.5
    label: str = ""  # where it is not the level's name


def level_looks(names: Sequence[str], by: str = "") -> dict[str, LevelLook]:
    """Colour, dashes and marker of each level, by place: no two alike. Numbers go from dark to light, initializers that
    are known have their own."""
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
    """Which look each initializer has: those not known take turns that no level here has, the rarest first."""
    own = [KNOWN.index(name) for name in names if name in KNOWN]
    rarest = itertools.chain(reversed(range(len(MARKERS))), itertools.count(len(KNOWN)))
    free = (turn for turn in rarest if turn not in own)
    return [KNOWN.index(name) if name in KNOWN else next(free) for name in names]


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


# --- marks
def draw_panel(
    ax: Axes,
    panel: Panel,
    styles: Mapping[str, LevelLook],
    found: Range | None,
    beside: Sequence[Mark],
    size: tuple[float, float],
) -> None:
    """A panel's marks on the axes that it shares. found: of y; beside: the marks with which it shares x; size: of the
    panel, in points."""
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
    """The names of the levels behind the ends of their lines."""
    ax.set_xlim(-0.12, 1.45)
    for value in dict.fromkeys(m.value for m in marks):
        names = ", ".join(styles[m.level].label or printable(m.level, 18) for m in marks if m.value == value)
        ax.text(1.05, value, names, va="center", fontsize=SMALL, color="0.2")


def _places(marks: Sequence[Mark], kind: str, look: LevelLook, ends: tuple[int, int]) -> Array:
    """Where marks of one level stand on the x axis: beside those of other levels where all would stand on one place.

    ends: so many ranks from the large and from the small end.
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
    """Shifts within (-0.5, 0.5) that keep equal places apart."""
    at = [(x[:i] == v).sum() for i, v in enumerate(x)]
    counts = [(x == v).sum() for v in x]
    return np.asarray((np.array(at) + 0.5) / np.array(counts) - 0.5)


def _shown(value: float, found: Range) -> float:
    """The value as the axis can show it: too small on the floor, infinite in the strip, or not at all."""
    if math.isinf(value):
        return found.axis.high * (1 - BEYOND / 2) if found.beyond and value > 0 else math.nan
    return found.floor if not math.isnan(found.floor) and value < found.floor else value


def _draw(
    ax: Axes, kind: str, marks: Sequence[Mark], x: Array, y: Array, look: LevelLook, found: Range, dots: float
) -> None:
    """Marks of one kind and level at x, y. dots: size of those of runs."""
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
        y = np.where(np.isinf(values), np.clip(values, found.axis.low, found.axis.high), y)  # on the edge
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
    """Ranks from the two ends are two lines."""
    cuts = [0, *(int(i) + 1 for i in np.flatnonzero((x[:-1] > 0) & (x[1:] < 0))), len(x)]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def _line(ax: Axes, kind: str, marks: Sequence[Mark], x: Array, y: Array, look: LevelLook, found: Range) -> None:
    """A line through the marks with their band; markers on some of them where there are many."""
    low, high = (np.array([getattr(m, end) for m in marks]) for end in ("low", "high"))
    if np.isfinite([low, high]).any():
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


# --- legend
def level_legend(panels: Sequence[Panel], styles: Mapping[str, LevelLook]) -> list[Line2D | Patch]:
    """Every level drawn, and what bands, thin lines and odd markers say."""
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
    if any(m.low < m.high for m in marks):
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
