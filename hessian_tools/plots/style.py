"""How every figure looks: style, colours, text that matplotlib can print, ticks that fit, legend and layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import seaborn as sns
from matplotlib import colormaps, style
from matplotlib.axes import Axes
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
WIDTH = 7.0  # two columns, inches
SMALL, MEDIUM, NORMAL = 7.0, 7.5, 8.0  # points
PANEL = 166.0  # points, the narrowest a panel becomes
LINSCALE = 0.9 / math.log(10)  # of matplotlib's symlog: the slope is continuous at linthresh
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


def looks(count: int) -> list[Look]:
    """Colour and dashes, both different for neighbours, no pair twice in 40."""
    colours = sns.color_palette("colorblind")
    dashes = [(0, d) if d else "-" for d in DASHES]
    return [(colours[i % len(colours)], dashes[i % len(dashes)]) for i in range(count)]


def shades(count: int) -> list[Look]:
    """From dark to light in the order of depth, each with other dashes than its neighbours."""
    colours = [colormaps["viridis"](0.85 * i / max(count - 1, 1)) for i in range(count)]
    return [((r, g, b), dashes) for (r, g, b, _), (_, dashes) in zip(colours, looks(count), strict=True)]


def operator_name(operator: str) -> str:
    return OPERATOR_NAMES.get(operator, printable(operator, 18))


def printable(value: Any, longest: int) -> str:
    """What matplotlib can print as it stands: no mathematics, no line break, nothing the font lacks, not too long."""
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    text = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in str(value))
    if len(text) > longest:
        text = f"{text[: (longest - 1) // 2]}…{text[len(text) - longest // 2 :]}"
    return text.replace("$", r"\$") if not text.startswith("_") else " " + text.replace("$", r"\$")


@functools.lru_cache(maxsize=4096)
def text_width(text: str, size: float = SMALL) -> float:
    """In points, of text as matplotlib takes it."""
    font = FontProperties(family="DejaVu Sans", size=size)
    math_text = text.startswith("$")
    shown = text if math_text else text.replace(r"\$", "$")
    return float(text_to_path.get_text_width_height_descent(shown, font, ismath=math_text)[0])


def wrapped(text: str, width: float) -> str:
    """Lines of at most `width` points."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".lstrip()
        lines = [*lines[:-1], joined] if text_width(joined) <= width else [*lines, word]
    return "\n".join(lines)


def numbers(ticks: Sequence[float]) -> list[str]:
    """Plain where all are short, otherwise as powers of ten."""
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
    """The items, first come first served, whose labels clear those kept before."""
    kept: list[int] = []
    for i, place in enumerate(places):
        if all(abs(place - places[j]) >= (widths[i] + widths[j]) / 2 for j in kept):
            kept.append(i)
    return [items[i] for i in kept]


def log_ticks(ax: Axes, low: float, high: float) -> None:
    """The ticks of a logarithmic y axis."""
    ticks, decades = log_places(low, high)
    ax.set_yticks(ticks, numbers(ticks))
    ax.set_yticks(decades, minor=True)
    ax.yaxis.set_minor_formatter(NullFormatter())


def log_places(low: float, high: float) -> tuple[list[float], list[float]]:
    """Ticks: decades, thinned to what fits, or 1-2-5, or finer, where there are too few; and all decades."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**k for k in exponents if low <= 10.0**k <= high]
    fine, finer = (
        [m * 10.0**k for k in exponents for m in steps if low <= m * 10.0**k <= high]
        for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7))
    )
    return decades[:: math.ceil(len(decades) / 6)] if len(decades) > 2 else fine if len(fine) > 2 else finer, decades


def symlog_ticks(ax: Axes, axis: SymlogAxis, label: str = "eigenvalue λ", width: float = PANEL) -> None:
    """The symlog scale of x, its slope continuous at linthresh, with 0 and as many decades labelled as fit; width: of
    the panel, in points."""
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
    """The y axis of a curve, as `value_axis` says; height: of the panel, in points."""
    ax.set_yscale(axis.kind, **({"linthresh": axis.linthresh, "linscale": LINSCALE} if axis.kind == "symlog" else {}))
    ax.set_ylim(axis.low, axis.high)
    ax.set_ylabel(label)
    if axis.kind == "log":
        log_ticks(ax, axis.low, axis.high)
    elif axis.kind == "symlog":  # 0, decades of both signs, then what fits of 5 and 2 times them
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
    """A logarithmic x axis with labels under as many of these counts as fit, the largest and the smallest first; width:
    of the panel, in points."""
    low, high = min(counts) / 1.6, max(counts) * 1.6
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    order = list(dict.fromkeys((max(counts), *sorted(counts))))
    places = [math.log(n / low) / math.log(high / low) for n in order]
    shown = apart(order, places, [(text_width(f"{n}", MEDIUM) + 4) / width for n in order])
    ax.set_xticks(shown, [f"{n}" for n in shown])
    ax.set_xticks(order, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())


def set_title(ax: Axes, letter: str, title: str) -> None:
    ax.set_title(rf"$\mathbf{{({letter})}}$  {title}", loc="left")


def say(ax: Axes, message: str) -> None:
    """A message instead of a panel's content."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.minorticks_off()
    ax.spines[:].set_color("0.8")
    ax.text(0.5, 0.5, message, transform=ax.transAxes, ha="center", va="center", color="0.3")


def add_legend(figure: Figure, handles: Sequence[Line2D | Patch], title: str = "") -> None:
    """Above all panels, in as few rows as the width allows; matplotlib fills columns first."""
    rows = legend_rows([str(h.get_label()) for h in handles], figure.get_figwidth())
    figure.legend(
        handles=handles, loc="outside upper center", ncols=math.ceil(len(handles) / rows), handlelength=2.4,
        columnspacing=1.2, handletextpad=0.5, title=title or None, title_fontsize=SMALL,
    )  # fmt: skip


def legend_rows(labels: Sequence[str], width: float) -> int:
    """How many rows of a legend these labels take at this width in inches."""
    widths, count = [text_width(label) + 36 for label in labels], len(labels)
    fits = (r for r in range(1, count + 1) if sum(max(widths[i : i + r]) for i in range(0, count, r)) <= width * 72)
    return next(fits, max(count, 1))


def add_caption(figure: Figure, text: str) -> None:
    """Below all panels, in lines as wide as the figure."""
    lines = wrapped(text, (figure.get_figwidth() - 0.15) * 72)
    figure.supxlabel(lines, x=0.008, ha="left", fontsize=SMALL, linespacing=1.25)


def styled() -> AbstractContextManager[None]:
    return style.context(["default", STYLE])


def layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04, wspace=0.03, hspace=0.03)


def settled(figure: Figure) -> Figure:
    """The layout made and kept, so that drawing again changes nothing."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def save_figure(figure: Figure, stem: str | Path) -> list[Path]:
    """Write STEM.png (300 dpi) and STEM.pdf (TrueType fonts embedded), each whole or not at all; returns the paths.

    No time stamp goes into them.
    """
    paths = [Path(f"{stem}.png"), Path(f"{stem}.pdf")]
    with styled():
        save = partial(figure.savefig, bbox_inches=None, facecolor="white")
        write_atomically(paths[0], lambda file: save(file, format="png", dpi=300))
        write_atomically(paths[1], lambda file: save(file, format="pdf", metadata={"CreationDate": None}))
    return paths
