"""Define the style of all figures: colours, printable text, ticks that fit, titles, legend, caption and layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator, NullFormatter

from hessian_tools.io.files import write_atomically
from hessian_tools.plots.curves import SymlogAxis, ValueAxis

T = TypeVar("T")
Colour = tuple[float, float, float]
Look = tuple[Colour, Any]  # colour, dashes
WIDTH = 7.0  # figure width in inches, two columns of a page
SMALL, MEDIUM, NORMAL = 7.0, 7.5, 8.0  # font sizes in points
PANEL = 166.0  # width of the narrowest panel, in points
LINSCALE = 0.9 / math.log(10)  # linscale for which matplotlib's symlog has a continuous slope at linthresh
DASHES = ("", (4, 1.2), (1, 1), (5, 1, 1, 1), (7, 2), (3, 1, 1, 1, 1, 1), (1, 2.2), (8, 1, 2, 1))
OPERATOR_NAMES = {"hessian": "Hessian", "ggn": "GGN", "fisher": "Fisher", "relaxed": "relaxed Hessian"}
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.titlepad": 4.0,
    "axes.labelpad": 2.0,
    "axes.linewidth": 0.6,
    "xtick.labelsize": MEDIUM,
    "ytick.labelsize": MEDIUM,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.pad": 2.0,
    "ytick.major.pad": 2.0,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,
}
TEXT_BOX: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}


# "colorblind" of seaborn
COLOURS = (
    "#0173B2", "#DE8F05", "#029E73", "#D55E00", "#CC78BC", "#CA9161", "#FBAFE4", "#949494", "#ECE133", "#56B4E9",
)  # fmt: skip


def despine(ax: Axes, sides: Sequence[str] = ("top", "right")) -> None:
    """Hide sides of the frame of a panel."""
    ax.spines[list(sides)].set_visible(False)


def looks(count: int) -> list[Look]:
    """Return `count` combinations of colour and dashes.

    Neighbours differ in both colour and dashes. No combination repeats within the first 40.
    """
    colours = [to_rgb(colour) for colour in COLOURS]
    dashes = [(0, d) if d else "-" for d in DASHES]
    return [(colours[i % len(colours)], dashes[i % len(dashes)]) for i in range(count)]


def shades(count: int) -> list[Look]:
    """Return `count` colours from dark to light, each with dashes that differ from those of its neighbours."""
    colours = [colormaps["viridis"](0.85 * i / max(count - 1, 1)) for i in range(count)]
    return [((r, g, b), dashes) for (r, g, b, _), (_, dashes) in zip(colours, looks(count), strict=True)]


def operator_name(operator: str) -> str:
    """Return the name under which a figure shows an operator."""
    return OPERATOR_NAMES.get(operator, printable(operator, 18))


def printable(value: Any, longest: int) -> str:
    """Convert a value to text that matplotlib prints literally.

    Args:
        value: Any value; `str(value)` is shown.
        longest: Maximum number of characters. Longer text is shortened in the middle.

    Returns:
        The text on one line, with dollar signs escaped so that nothing is read as mathematics. Characters that
        cannot be printed or that the font lacks become question marks.
    """
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    text = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in str(value))
    if len(text) > longest:
        text = f"{text[: (longest - 1) // 2]}…{text[len(text) - longest // 2 :]}"
    return text.replace("$", r"\$") if not text.startswith("_") else " " + text.replace("$", r"\$")


@functools.lru_cache(maxsize=4096)
def text_width(text: str, size: float = SMALL) -> float:
    """Return the width in points of text that is in matplotlib's notation."""
    font = FontProperties(family="DejaVu Sans", size=size)
    math_text = text.startswith("$")
    shown = text if math_text else text.replace(r"\$", "$")
    return float(text_to_path.get_text_width_height_descent(shown, font, ismath=math_text)[0])


def wrapped(text: str, width: float) -> str:
    """Break text into lines of at most `width` points."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".lstrip()
        lines = [*lines[:-1], joined] if text_width(joined) <= width else [*lines, word]
    return "\n".join(lines)


def numbers(ticks: Sequence[float]) -> list[str]:
    """Format tick labels as plain numbers if all are short, otherwise all as powers of ten."""
    if all(t == 0 or 1e-3 <= abs(t) < 1.1e3 for t in ticks):
        return [f"{t:g}".replace("-", "−") for t in ticks]
    return [_power(t) for t in ticks]


def _power(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".replace(".0", "").split("e")
    factor = {"1": "", "-1": "-"}.get(mantissa, rf"{mantissa}\times")
    return f"${factor}10^{{{int(exponent)}}}$"


def apart(items: Sequence[T], places: Sequence[float], widths: Sequence[float]) -> list[T]:
    """Select items whose labels do not overlap.

    Args:
        items: Items in order of priority.
        places: Position of each item's label, in any unit.
        widths: Width of each item's label, in the same unit.

    Returns:
        The items kept. An item is kept if its label does not overlap that of an item kept before it.
    """
    kept: list[int] = []
    for i, place in enumerate(places):
        if all(abs(place - places[j]) >= (widths[i] + widths[j]) / 2 for j in kept):
            kept.append(i)
    return [items[i] for i in kept]


def log_ticks(ax: Axes, low: float, high: float) -> None:
    """Set the ticks of a logarithmic y axis with the limits `low` and `high`."""
    ticks, decades = log_places(low, high)
    ax.set_yticks(ticks, numbers(ticks))
    ax.set_yticks(decades, minor=True)
    ax.yaxis.set_minor_formatter(NullFormatter())


def share_log_range(axes: Sequence[Axes]) -> None:
    """Give logarithmic panels that are compared the same limits and ticks on the y axis."""
    if axes:
        low, high = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(low, high)
            log_ticks(ax, low, high)


def log_places(low: float, high: float) -> tuple[list[float], list[float]]:
    """Return the positions of the ticks of a logarithmic axis.

    Args:
        low: Lower limit of the axis.
        high: Upper limit of the axis.

    Returns:
        The labelled ticks and the decades between the limits. The labelled ticks are decades (at most about six); if
        there are fewer than three decades they also include 2 and 5 times a decade, or finer steps.
    """
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**k for k in exponents if low <= 10.0**k <= high]
    fine, finer = (
        [m * 10.0**k for k in exponents for m in steps if low <= m * 10.0**k <= high]
        for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7))
    )
    return decades[:: math.ceil(len(decades) / 6)] if len(decades) > 2 else fine if len(fine) > 2 else finer, decades


def symlog_ticks(ax: Axes, axis: SymlogAxis, label: str = "eigenvalue λ", width: float = PANEL) -> None:
    """Set a symlog scale for the x axis, with labels at 0 and at as many decades as fit.

    Args:
        ax: The panel.
        axis: The scale and its limits.
        label: Label of the axis.
        width: Width of the panel in points.
    """
    ax.set_xscale("symlog", linthresh=axis.linthresh, linscale=LINSCALE)
    ax.set_xlim(axis.low, axis.high)
    furthest = max(axis.high, -axis.low)
    decades = [0.0, *(10.0**k for k in range(-300, 301) if axis.linthresh <= 10.0**k <= furthest)]
    low, high = axis.forward(np.array([axis.low, axis.high]))
    places = [float(axis.forward(np.array(t)) / (high - low)) for t in decades]
    widths = [(text_width(text, MEDIUM) + 3) / width for text in numbers([-t for t in decades])]
    ticks, shown = (
        [t for t in sorted({s * t + 0.0 for t in found for s in (-1, 1)}) if axis.low <= t <= axis.high]
        for found in (decades, apart(decades, places, widths))
    )
    ax.set_xticks(shown, numbers(shown))
    ax.set_xticks(ticks, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)


def value_scale(ax: Axes, axis: ValueAxis, label: str, height: float = PANEL / 2) -> None:
    """Set the scale, limits, ticks and label of the y axis of a curve.

    Args:
        ax: The panel.
        axis: The scale and its limits, as returned by `hessian_tools.plots.curves.value_axis`.
        label: Label of the axis. A common power of ten of the tick labels is appended to it.
        height: Height of the panel in points.
    """
    ax.set_yscale(axis.kind, **({"linthresh": axis.linthresh, "linscale": LINSCALE} if axis.kind == "symlog" else {}))
    ax.set_ylim(axis.low, axis.high)
    ax.set_ylabel(label)
    if axis.kind == "log":
        log_ticks(ax, axis.low, axis.high)
    elif axis.kind == "symlog":  # in order of priority: 0, decades of both signs, 5 and 2 times the decades
        furthest = max(axis.high, -axis.low)
        decades = [10.0**k for k in range(-300, 301) if axis.linthresh / 2 <= 10.0**k <= furthest]
        ticks = [0.0, *(sign * m * t for m in (1, 5, 0.5, 2, 0.2) for t in decades for sign in (1, -1))]
        ticks = list(dict.fromkeys(t for t in ticks if axis.low <= t <= axis.high))
        low, high = np.arcsinh(np.array([axis.low, axis.high]) / axis.linthresh)
        places = [float(np.arcsinh(t / axis.linthresh) / (high - low)) for t in ticks]
        shown = sorted(apart(ticks, places, [1.4 * MEDIUM / height] * len(ticks)))
        ax.set_yticks(shown, numbers(shown))
        ax.set_yticks([t for t in ticks if abs(t) in decades], minor=True)
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        found = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(axis.low, axis.high)
        ticks = [t for t in found if axis.low <= t <= axis.high]
        largest = max(map(abs, ticks))
        exponent = 0 if 1e-3 <= largest < 1e4 else math.floor(math.log10(largest))
        ax.set_yticks(ticks, [f"{t / 10.0**exponent:.6g}".replace("-", "−") for t in ticks])
        if exponent:
            ax.set_ylabel(rf"{label}  ($10^{{{exponent}}}$)")


def count_axis(ax: Axes, counts: Sequence[int], width: float = PANEL) -> None:
    """Set a logarithmic x axis with ticks at given counts.

    Args:
        ax: The panel.
        counts: Positions of the ticks. As many as fit are labelled, with priority for the largest and the smallest.
        width: Width of the panel in points.
    """
    low, high = min(counts) / 1.6, max(counts) * 1.6
    order = list(dict.fromkeys((max(counts), *sorted(counts))))
    log_x_ticks(ax, low, high, order, [f"{n}" for n in order], width)
    ax.set_xticks(order, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())


def log_x_ticks(
    ax: Axes,
    low: float,
    high: float,
    ticks: Sequence[float],
    labels: Sequence[str],
    width: float,
    *,
    turned: bool = False,
) -> None:
    """Set a logarithmic x axis with as many labelled ticks as fit.

    Args:
        ax: The panel.
        low: Lower limit of the axis.
        high: Upper limit of the axis.
        ticks: Positions of the ticks in order of priority.
        labels: Labels of the ticks, in the same order.
        width: Width of the panel in points.
        turned: Whether the labels are rotated by 90 degrees.
    """
    places = [math.log(t / low) / math.log(high / low) for t in ticks]
    widths = [1.2 * SMALL if turned else text_width(label, MEDIUM) + 4 for label in labels]
    shown = apart(list(range(len(ticks))), places, [w / width for w in widths])
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    how: dict[str, Any] = {"rotation": 90, "fontsize": SMALL} if turned else {}
    ax.set_xticks([ticks[i] for i in shown], [labels[i] for i in shown], **how)


def set_title(ax: Axes, letter: str, title: str) -> None:
    """Set the title of a panel: its letter in bold and a text."""
    ax.set_title(rf"$\mathbf{{({letter})}}$  {title}", loc="left")


def say(ax: Axes, message: str) -> None:
    """Show a message in place of the content of a panel."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.minorticks_off()
    ax.spines[:].set_color("0.8")
    ax.text(0.5, 0.5, message, transform=ax.transAxes, ha="center", va="center", color="0.3")


def add_legend(figure: Figure, handles: Sequence[Line2D | Patch], title: str = "") -> None:
    """Add a legend above all panels, in as few rows as the width of the figure allows.

    Args:
        figure: The figure.
        handles: The entries, with their labels. Matplotlib fills the legend column by column.
        title: Title of the legend.
    """
    rows = legend_rows([str(h.get_label()) for h in handles], figure.get_figwidth())
    figure.legend(
        handles=handles, loc="outside upper center", ncols=math.ceil(len(handles) / rows), handlelength=2.4,
        columnspacing=1.2, handletextpad=0.5, title=title or None, title_fontsize=SMALL,
    )  # fmt: skip


def legend_rows(labels: Sequence[str], width: float) -> int:
    """Return the number of rows of a legend with these labels in a figure that is `width` inches wide."""
    widths, count = [text_width(label) + 36 for label in labels], len(labels)
    fits = (r for r in range(1, count + 1) if sum(max(widths[i : i + r]) for i in range(0, count, r)) <= width * 72)
    return next(fits, max(count, 1))


def add_caption(figure: Figure, text: str) -> None:
    """Add a caption below all panels, in lines as wide as the figure."""
    lines = wrapped(text, (figure.get_figwidth() - 0.15) * 72)
    figure.supxlabel(lines, x=0.008, ha="left", fontsize=SMALL, linespacing=1.25)


def styled() -> AbstractContextManager[None]:
    """Return a context in which matplotlib uses the style of this package and ignores the user's settings."""
    return style.context(["default", STYLE])


def layout() -> ConstrainedLayoutEngine:
    """Return the layout engine of all figures."""
    return ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04, wspace=0.03, hspace=0.03)


def settled(figure: Figure) -> Figure:
    """Compute the layout of a figure once and fix it, so that drawing the figure again does not change it."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def save_figure(figure: Figure, stem: str | Path) -> list[Path]:
    """Write a figure as STEM.png (300 dpi) and STEM.pdf (with embedded TrueType fonts).

    Each file is written atomically and contains no time stamp, so that equal figures give equal bytes.

    Args:
        figure: The figure.
        stem: Path of the files without suffix.

    Returns:
        The paths of the two files.

    Raises:
        OSError: If a file cannot be written.
    """
    paths = [Path(f"{stem}.png"), Path(f"{stem}.pdf")]
    with styled():
        save = partial(figure.savefig, bbox_inches=None, facecolor="white")
        write_atomically(paths[0], lambda file: save(file, format="png", dpi=300))
        write_atomically(paths[1], lambda file: save(file, format="pdf", metadata={"CreationDate": None}))
    return paths
