"""Charts as SVG: axes, lines, error bars and points that say their numbers when the pointer is near."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hessian_tools.plots.curves import ValueAxis, value_axis
from ikun_hessian.reports.html.elements import Html, html, number, tag

WIDTH, HEIGHT = 340, 230  # of a panel; about its size on the screen, so that the text is readable on a telephone
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 24, 38
COLOURS = 8  # of the style sheet: .c0 to .c7


@dataclass(frozen=True)
class PixelScale:
    """Maps numbers to pixels.

    Attributes:
        axis: Kind and limits.
        start: Pixel of the lower limit.
        end: Pixel of the upper limit.
    """

    axis: ValueAxis
    start: float
    end: float

    def __call__(self, x: float) -> float:
        """Return the pixel of a number, or NaN where there is none (0 on a logarithmic axis)."""
        low, high, at = (self._u(v) for v in (self.axis.low, self.axis.high, x))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def _u(self, x: float) -> float:
        if self.axis.kind == "log":
            return math.log10(x) if x > 0 else math.nan
        return math.asinh(x / self.axis.linthresh) if self.axis.kind == "symlog" else x

    def ticks(self, most: int = 5) -> list[float]:
        """Return at most about `most` round numbers between the limits."""
        low, high = self.axis.low, self.axis.high
        if self.axis.kind == "linear":
            return linear_ticks(low, high, most)
        if self.axis.kind == "log" and high / low < 4:
            return [t for t in linear_ticks(low, high, most) if t > 0]
        if self.axis.kind == "log" and high / low < 200:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            found = [float(f"{k}e{power}") for power in powers for k in ((1, 2, 5) if high / low < 40 else (1, 3))]
            return [t for t in found if low <= t <= high]
        if self.axis.kind == "log":
            first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
            step = max(1, -(-(last - first + 1) // most))
            return [10.0**k for k in range(first, last + 1, step)]
        return self._symlog_ticks(most)

    def _symlog_ticks(self, most: int) -> list[float]:
        size = max(abs(self.axis.low), abs(self.axis.high))
        first, last = math.ceil(math.log10(self.axis.linthresh)), math.floor(math.log10(size) + 1e-9)
        powers = [10.0**k for k in range(last, first - 1, -max(1, -(-2 * (last - first + 1) // most)))]
        found = sorted({0.0, *powers, *(-p for p in powers)})
        apart: list[float] = []
        for t in (t for t in found if self.axis.low <= t <= self.axis.high):
            if not apart or abs(self(t) - self(apart[-1])) > 0.09 * abs(self.end - self.start) or t == 0:
                apart.append(t)
        return apart


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, a multiple of 1, 2 or 5 apart."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def chosen_axis(values: Iterable[float], errors: Iterable[float] | None = None, kind: str = "") -> ValueAxis:
    """Choose an axis for values: linear, logarithmic or symmetric logarithmic.

    Args:
        values: The values. Those that are not finite are ignored.
        errors: Half lengths of their error bars, if any.
        kind: "linear" to force a linear axis without a margin.
    """
    y = np.array(list(values), dtype=float)
    e = np.zeros(len(y)) if errors is None else np.array(list(errors), dtype=float)
    y, e = y[np.isfinite(y)], np.nan_to_num(e[np.isfinite(y)], posinf=0.0)
    if not len(y):
        return ValueAxis("linear", 0.0, 1.0)
    if kind == "linear":
        low, high = float(y.min()), float(y.max())
        return ValueAxis("linear", low, high) if high > low else ValueAxis("linear", low - 0.5, high + 0.5)
    found = value_axis(y, e)
    return found if found.high > found.low else ValueAxis("linear", found.low - 0.5, found.high + 0.5)


@dataclass
class SvgChart:
    """One panel.

    Attributes:
        title: Title of the panel.
        x: Axis of x.
        y: Axis of y.
        x_label: Label of x.
        y_label: Label of y.
        x_ticks: Positions and labels of the ticks of x; chosen from the limits by default.
        alt: Description for readers who do not see the figure.
    """

    title: str
    x: ValueAxis
    y: ValueAxis
    x_label: str = ""
    y_label: str = ""
    x_ticks: Sequence[tuple[float, str]] | None = None
    alt: str = ""
    marks: list[Html] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.to_x = PixelScale(self.x, LEFT, WIDTH - RIGHT)
        self.to_y = PixelScale(self.y, HEIGHT - BOTTOM, TOP)

    def _pixel(self, x: float, y: float) -> tuple[float, float] | None:
        px, py = self.to_x(x), self.to_y(y)
        return (px, py) if math.isfinite(px) and math.isfinite(py) else None

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: int, style: str = "") -> None:
        """Draw a line, interrupted where a number is not finite."""
        parts: list[str] = []
        begun = False
        for x, y in zip(xs, ys, strict=True):
            at = self._pixel(x, y)
            if at is not None:
                parts.append(f"{'L' if begun else 'M'}{at[0]:.1f} {at[1]:.1f}")
            begun = at is not None
        if parts:
            self.marks.append(tag("path", d="".join(parts), class_=f"l c{colour % COLOURS} {style}".strip()))

    def point(self, x: float, y: float, colour: int, says: str, style: str = "") -> None:
        """Draw a point that shows the text `says` when the pointer is near."""
        if at := self._pixel(x, y):
            look = f"p c{colour % COLOURS} {style}".strip()
            self.marks.append(tag("circle", cx=f"{at[0]:.1f}", cy=f"{at[1]:.1f}", r="3", class_=look, data_tip=says))

    def bar(self, x: float, low: float, high: float, colour: int, style: str = "") -> None:
        """Draw a vertical error bar. An end outside the axis is cut there."""
        px = self.to_x(x)
        ends = [min(max(self._clamped(v), TOP), HEIGHT - BOTTOM) for v in (low, high)]
        if math.isfinite(px):
            look = f"e c{colour % COLOURS} {style}".strip()
            self.marks.append(
                tag("line", x1=f"{px:.1f}", x2=f"{px:.1f}", y1=f"{ends[0]:.1f}", y2=f"{ends[1]:.1f}", class_=look)
            )

    def _clamped(self, y: float) -> float:
        at = self.to_y(y)
        return HEIGHT - BOTTOM if math.isnan(at) else at

    def cell(self, x: float, y: float, half_x: float, half_y: float, shade: int | None) -> None:
        """Fill a rectangle around (x, y) with a shade of the style sheet; None leaves it empty."""
        if shade is not None:
            a, b = self.to_x(x - half_x), self.to_x(x + half_x)
            c, d = self.to_y(y + half_y), self.to_y(y - half_y)
            size = {"x": f"{a:.1f}", "y": f"{c:.1f}", "width": f"{b - a + 0.3:.1f}", "height": f"{d - c + 0.3:.1f}"}
            self.marks.append(tag("rect", **size, class_=f"s{shade}"))

    def reference(self, y: float) -> None:
        """Draw a thin horizontal line."""
        at = self.to_y(y)
        if TOP <= at <= HEIGHT - BOTTOM:
            self.marks.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="g"))

    def svg(self) -> Html:
        """Return the panel as an SVG element."""
        bottom, parts = HEIGHT - BOTTOM, []
        for value in self.to_y.ticks():
            at = self.to_y(value)
            parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="g"))
            parts.append(tag("text", _tick(value), x=LEFT - 6, y=f"{at + 4:.1f}", class_="t end"))
        chosen = [(v, _tick(v)) for v in self.to_x.ticks(4)] if self.x_ticks is None else self.x_ticks
        for value, text in chosen:
            at = self.to_x(value)
            parts.append(tag("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=bottom, y2=bottom + 4, class_="a"))
            parts.append(tag("text", text, x=f"{at:.1f}", y=bottom + 16, class_="t mid"))
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="a"))
        parts.append(tag("text", self.title, x=LEFT, y=14, class_="h"))
        parts.append(tag("text", self.x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="t mid"))
        middle = (TOP + bottom) / 2
        parts.append(tag("text", self.y_label, x=12, y=middle, class_="t mid", transform=f"rotate(-90 12 {middle})"))
        x, y, wide, high = LEFT - 4, TOP - 4, WIDTH - LEFT - RIGHT + 8, HEIGHT - TOP - BOTTOM + 8
        clip = tag(  # the same coordinates, cut at the axes
            "svg", self.marks, x=x, y=y, width=wide, height=high, viewBox=f"{x} {y} {wide} {high}"
        )
        return tag(
            "svg",
            *parts,
            clip,
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            class_="chart",
            role="img",
            aria_label=self.alt or self.title,
        )


def _tick(value: float) -> str:
    """Format a tick: a power of ten far from 1 as 1e5."""
    return number(value, 3).replace("e−0", "e−").replace("e+0", "e")


def panels(*charts: Html) -> Html:
    """Return charts side by side, as many as fit."""
    return tag("div", *charts, class_="panels two" if len(charts) in (2, 4) else "panels")


def legend(entries: Sequence[tuple[str, int, str]]) -> Html:
    """Return a legend.

    Args:
        entries: Text, colour and style of each line.
    """
    items = []
    for text, colour, style in entries:
        look = f"l c{colour % COLOURS} {style}".strip()
        line = tag(
            "svg", tag("path", d="M1 7H25", class_=look), viewBox="0 0 26 14", width=26, height=14, aria_hidden="true"
        )
        items.append(tag("span", line, html(" ", text)))
    return tag("p", *items, class_="legend")
