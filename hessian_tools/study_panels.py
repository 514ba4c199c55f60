"""The panels of a study's figures: looks of the levels, axes, and marks, each drawn into the axes it is given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from hessian_tools.curves import SymlogAxis, ValueAxis, linear_axis, value_axis
from hessian_tools.panels import rank_ticks
from hessian_tools.study_chart import Axis, Mark, Panel
from hessian_tools.study_groups import gain_name
from hessian_tools.typesetting import (
    MEDIUM,
    NORMAL,
    SMALL,
    Colour,
    apart,
    count_axis,
    log_places,
    looks,
    numbers,
    printable,
    say,
    shades,
    symlog_ticks,
    text_width,
    value_scale,
    wrapped,
)

Array = npt.NDArray[np.float64]

MARKERS = "os^DvP*X<p>h"
COLOURS = (0, 1, 2, 3, 4, 9, 5, 7)  # of the palette; the palest left out, for those of Tol's "muted" and black
MORE: tuple[Colour, ...] = ((0.1, 0.1, 0.1), (0.2, 0.13, 0.53), (0.53, 0.13, 0.33), (0.6, 0.6, 0.2))
KNOWN = (  # initializers that look alike in all figures, the most usual first
    *("ikun", "kaiming", "xavier", "lecun", "normal", "ikun_v1", "ikun_v2", "orthogonal", "lsuv", "fluctuation"),
    *("delta_orthogonal", "firing", "gradient_stable", "tdbn"),
)
DECADES = 12  # of a logarithmic axis below its largest value; what is smaller lies on the floor
BEYOND = 0.12  # of a panel's height, the strip of what is never
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
        _gain_labels([float(name) for name in names]) if by == "gain" and all(map(_is_number, names)) else [""] * count
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


# --- axes


@dataclass(frozen=True)
class Range:
    """What an axis shows. floor: where values too small for it lie, NaN where there are none. beyond: some are
    infinite."""

    axis: ValueAxis
    floor: float = math.nan
    beyond: bool = False


def y_range(kind: str, marks: Sequence[Mark], least: float = math.nan) -> Range | None:
    """Of all the marks that share an axis; None without a finite value. least: how far a symlog axis is linear at
    least."""
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
            room = max(1.2, (known.max() / known.min()) ** 0.05, math.sqrt(3 * known.min() / known.max()))
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
    """A symlog axis that is linear within +-least, linear throughout where that is most of it."""
    if found.kind != "symlog" or not least > found.linthresh:
        return found
    if least > np.abs(y).max() / 10:
        return linear_axis(y, np.zeros(len(y)))
    scale = SymlogAxis(least, found.low, found.high, 0.0)
    low, high = scale.forward(np.array([y.min(), y.max()]))
    room = 0.05 * (high - low)
    ends = scale.inverse(np.array([low - room, high + room]))
    return ValueAxis("symlog", float(ends[0]), float(ends[1]), least)


def set_y(ax: Axes, found: Range, label: str, kind: str, height: float) -> None:
    """The y axis; height: of the panel, in points."""
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
    """In lines of at most so many points, of text as large as that of axes and titles."""
    return wrapped(text, length * SMALL / NORMAL)


def set_x(ax: Axes, axis: Axis, marks: Sequence[Mark], width: float) -> None:
    """The x axis for all marks that share it; width: of the panel, in points."""
    x = np.array([m.x for m in marks if math.isfinite(m.x)], dtype=float)
    low, high = (float(x.min()), float(x.max())) if len(x) else (0.0, 1.0)
    label = fitted(axis.label, width)
    ax.set_xlabel(label)
    if axis.kind == "rank":
        tops, smalls = int(max(high, 0)), int(max(-low, 0))
        ax.set_xlim(0.3, tops + (smalls + 1 if smalls else 0) + 0.7)
        ax.set_xticks(*rank_ticks(tops, smalls, 1, width))
        if smalls:
            ax.axvline(tops + 1, color="0.75", linewidth=0.6, zorder=0)
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
    """A logarithmic x axis with labels under as many of its ticks as fit."""
    ticks, decades = log_places(low, high)
    _log_ticks(ax, low, high, ticks, numbers(ticks), width)
    ax.set_xticks(decades, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _gain_x(ax: Axes, low: float, high: float, gains: Sequence[float], width: float) -> None:
    """A logarithmic x axis with labels under as many of these gains as fit, first come those next to 1."""
    order = sorted(gains, key=lambda t: (abs(math.log(t)), t))
    labels = _gain_labels(order)
    _log_ticks(ax, low, high, order, labels, width)
    if len(ax.get_xticks()) < len(order):  # turned, more fit
        _log_ticks(ax, low, high, order, labels, width, turned=True)
    ax.set_xticks(order, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _log_ticks(
    ax: Axes,
    low: float,
    high: float,
    ticks: Sequence[float],
    labels: Sequence[str],
    width: float,
    *,
    turned: bool = False,
) -> None:
    """As many of the ticks as fit, first come, first served. turned: labels upright."""
    places = [math.log(t / low) / math.log(high / low) for t in ticks]
    widths = [1.2 * SMALL if turned else text_width(label, MEDIUM) + 4 for label in labels]
    shown = apart(list(range(len(ticks))), places, [w / width for w in widths])
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    how: dict[str, Any] = {"rotation": 90, "fontsize": SMALL} if turned else {}
    ax.set_xticks([ticks[i] for i in shown], [labels[i] for i in shown], **how)


def _gain_labels(gains: Sequence[float]) -> list[str]:
    """All written alike: as n and 1/n where all are, and these short, otherwise as numbers."""
    names = [gain_name(t) for t in gains]
    return numbers(gains) if any("." in name or "e" in name for name in names) else names


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


def legend(panels: Sequence[Panel], styles: Mapping[str, LevelLook]) -> list[Line2D | Patch]:
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


def floors(ranges: Mapping[Axis, Range | None]) -> str:
    """For the caption: where axes turn linear and where their floors lie."""
    known = [(axis.label, r) for axis, r in ranges.items() if r is not None]
    linear = [f"{label} ±{r.axis.linthresh:.2g}" for label, r in known if r.axis.kind == "symlog"]
    cut = [f"{label} {r.floor:.1g}" for label, r in known if not math.isnan(r.floor)]
    text = f" Axes linear within these bounds and logarithmic beyond: {', '.join(linear)}." if linear else ""
    return text + (f" On the floor (dotted) what is smaller still: {', '.join(cut)}." if cut else "")
