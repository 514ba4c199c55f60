"""Draw the figure of a loss landscape: the loss along lines, with the quadratics of the operators, and over planes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hessian_tools.plots.captions import caption
from hessian_tools.plots.curves import Array, ValueAxis, linear_axis, value_axis
from hessian_tools.plots.style import (
    SMALL,
    TEXT_BOX,
    WIDTH,
    Look,
    add_caption,
    add_legend,
    despine,
    layout,
    log_ticks,
    looks,
    say,
    set_title,
    settled,
    styled,
    value_scale,
)

if TYPE_CHECKING:  # a figure only needs the saved result
    from hessian_tools.results.landscape import LandscapeResult, Line, Plane


LEVELS = 13  # number of contour levels
OBLIQUE = 0.05  # smallest cosine between the directions of a plane that the caption reports
LEAST = "#ff9e1b"  # colour of the mark at the smallest loss
RING: dict[str, Any] = {
    "marker": "o",
    "markersize": 6.5,
    "markerfacecolor": "none",
    "markeredgewidth": 1.1,
    "linestyle": "none",
}
ACCURACY = (0, (3, 1.5))  # dashes of the accuracy
TRUE: Look = ((0.1, 0.1, 0.1), "-")  # look of the true loss


def landscape_figure(result: LandscapeResult, captioned: bool = True) -> Figure:
    """Draw the loss along lines and over planes through the weights.

    There is one panel for each line, with a common loss axis, and one or two panels for each plane: the true loss and
    the loss of the relaxed network. Distances are in units of the norm of the weights. The quadratics
    L(0) + t g'v + t^2/2 v'Av of the surrogate's Hessian and GGN are drawn as far as they fit the loss axis. All planes
    share the same contour levels, which are logarithmic if the losses are positive and within six decades. A ring marks
    the smallest loss on the grid, and + marks the weights.

    Args:
        result: The landscape of one checkpoint.
        captioned: Whether to add a caption with the provenance.

    Returns:
        The figure, two columns wide.
    """
    relaxed = any(line.relaxed_loss for line in result.lines)
    lines, planes = result.lines, result.planes
    columns = 2 if len(lines) in (2, 4) else min(3, len(lines))
    rows = -(-len(lines) // columns)
    across = min(len(planes), 2 if relaxed else 4)  # planes per row
    deep = -(-len(planes) // across) if planes else 0
    panels = across * (1 + relaxed)
    tall = {1: 2.5, 2: 2.5}.get(panels, 1.85)
    heights = [1.5 * rows, tall * deep] if planes else [1.9 * rows]
    letters = (chr(ord("a") + i) if i < 26 else f"{i + 1}" for i in range(10**6))
    with styled():
        figure = Figure(figsize=(WIDTH, sum(heights) + 1.15), layout=layout())
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        styles = dict(zip(("hessian", "ggn", "relaxed"), looks(3), strict=True))
        axis = _loss_axis(result)
        cells = _cells(grid[0], rows, columns)
        for i, (line, cell) in enumerate(zip(lines, cells, strict=False)):
            ax = figure.add_subplot(cell)
            set_title(ax, next(letters), title(line.name))
            draw_line(ax, line, result, styles, axis)
            if i % columns:
                ax.tick_params(labelleft=False)
                ax.set_ylabel("")
            if line.accuracy:
                _draw_accuracy(ax, line, result.weight_norm, labelled=(i + 1) % columns == 0 or i + 1 == len(lines))
            if i + columns >= len(lines):
                ax.set_xlabel("distance t / ‖w‖")
        if planes:
            surfaces = [surface for p in planes for surface in (p.loss, p.relaxed_loss) if surface]
            levels, norm = contour_levels(surfaces)
            axes = []
            cells = _cells(grid[1], deep, panels)
            for plane in planes:
                for name, surface in (("true loss", plane.loss), ("relaxed", plane.relaxed_loss)):
                    if surface:
                        ax = figure.add_subplot(next(cells))
                        set_title(ax, next(letters), name)
                        draw_plane(ax, plane, surface, result.weight_norm, levels, norm)
                        if name == "relaxed":
                            ax.tick_params(labelleft=False)
                            ax.set_ylabel("")
                        axes.append(ax)
            if len(levels):
                colour_bar(figure, axes, levels, norm)
        add_legend(figure, _legend(result, styles, relaxed))
        if captioned:
            add_caption(figure, landscape_caption(result))
        return settled(figure)


def title(name: str) -> str:
    """Return the title of a direction."""
    if name == "negative":
        return "most negative eigenvector"
    kind, number = name.rstrip("0123456789"), name.lstrip("abcdefghijklmnopqrstuvwxyz")
    return {"top": f"eigenvector {number}", "random": f"random {number}"}.get(kind, name)


def draw_line(ax: Axes, line: Line, result: LandscapeResult, styles: dict[str, Look], axis: ValueAxis) -> None:
    """Draw the losses and the quadratics along a line, and write its curvatures.

    Args:
        ax: The panel.
        line: The line. Distances are drawn in units of the norm of the weights.
        result: The landscape that contains it.
        styles: Looks of the operators and of the relaxed network.
        axis: The loss axis.
    """
    t = np.array(line.distances)
    x = t / result.weight_norm
    fine = np.linspace(t[0], t[-1], 401)
    e, below, _, above = line.around(line.loss)
    at = [-e / result.weight_norm, e / result.weight_norm]
    value_scale(ax, axis, "loss")
    for name, curvature in (("hessian", line.hessian), ("ggn", line.ggn)):
        colour, dashes = styles[name]
        y = quadratic(fine, result.loss, line.slope, curvature)
        ax.plot(fine / result.weight_norm, y, color=colour, linestyle=dashes, label=name)
    if line.relaxed_loss:
        colour, dashes = styles["relaxed"]
        ax.plot(x, line.relaxed_loss, color=colour, linestyle=dashes, linewidth=1.4, label="relaxed")
    ax.plot(x, line.loss, color=TRUE[0], marker=".", markersize=2.5, linewidth=0.8, label="true")
    ax.plot(
        at,
        [below, above],
        color=TRUE[0],
        marker="o",
        markersize=4.5,
        markerfacecolor="none",
        markeredgewidth=0.8,
        linestyle="none",
        label="step",
    )
    numbers = ("v′Hv", line.hessian), ("v′Gv", line.ggn), ("L″", line.second_difference(line.loss))
    text = "\n".join(f"{name} = {value:.2g}".replace("-", "−") for name, value in numbers)
    ax.text(
        0.5, 0.97, text, transform=ax.transAxes, ha="center", va="top", fontsize=SMALL, color="0.2", bbox=TEXT_BOX
    )  # fmt: skip
    _ends(ax, x)
    despine(ax)


def _draw_accuracy(ax: Axes, line: Line, unit: float, labelled: bool) -> None:
    """Draw the accuracy of a line on a second axis from 0 to 1, behind everything else."""
    twin = ax.twinx()
    twin.plot(
        np.array(line.distances) / unit, line.accuracy, color="0.6", linestyle=ACCURACY, linewidth=0.9, label="accuracy"
    )
    twin.set_ylim(0, 1.7)  # leaves space for the text above
    twin.set_yticks([0, 0.5, 1])
    despine(twin, ("top", "left"))
    twin.tick_params(color="0.6", labelcolor="0.4", labelright=labelled, labelbottom=False)
    twin.spines["right"].set_color("0.6")
    twin.set_zorder(ax.get_zorder() - 1)
    ax.patch.set_visible(False)


def _ends(ax: Axes, x: Array) -> None:
    """Label the x axis at 0 and, inside the panel, at both ends."""
    ax.set_xlim(x[0], x[-1])
    ax.set_xticks([x[0], 0, x[-1]], _labels(x))
    ax.set_xticks([x[0] / 2, x[-1] / 2], minor=True)
    left, _, right = ax.get_xticklabels()
    left.set_horizontalalignment("left")
    right.set_horizontalalignment("right")


def _labels(x: Array) -> list[str]:
    """Return tick labels for the two ends of x and for 0 between them."""
    return [f"{v:.3g}".replace("-", "−") for v in (x[0], 0, x[-1])]


def quadratic(t: Array, loss: float, slope: float, curvature: float) -> Array:
    """Return the quadratic L(0) + t g'v + t^2/2 v'Av [n] of a loss, slope g'v and curvature v'Av at distances t [n]."""
    return loss + slope * t + curvature * t**2 / 2


def _loss_axis(result: LandscapeResult) -> ValueAxis:
    """Choose the loss axis of all lines. It extends below the losses by at most a third of their range."""
    losses = np.array([result.loss, *(y for line in result.lines for y in (*line.loss, *line.relaxed_loss))])
    low, high = float(np.nanmin(losses)), float(np.nanmax(losses))
    ends = [
        quadratic(np.array([line.distances[0], line.distances[-1]]), result.loss, line.slope, curvature).min()
        for line in result.lines
        for curvature in (line.hessian, line.ggn)
    ]
    below = max(np.nanmin(ends), low - (high - low) / 3)
    return linear_axis(np.array([min(low, below), high]), np.zeros(2))


def contour_levels(surfaces: Sequence[Sequence[Sequence[float]]]) -> tuple[Array, Normalize]:
    """Choose contour levels that cover several surfaces.

    Args:
        surfaces: Losses of each surface [n, n].

    Returns:
        Ascending levels and their colour scale. There are no levels if the losses are constant or not finite.
    """
    values = np.concatenate([np.asarray(s, dtype=float).ravel() for s in surfaces])
    values = values[np.isfinite(values)]
    if not len(values) or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return np.empty(0), Normalize()
    low, high = float(values.min()), float(values.max())
    if value_axis(values, np.zeros(len(values))).kind == "log":
        return np.geomspace(low, high, LEVELS), LogNorm(low, high)
    return np.linspace(low, high, LEVELS), Normalize(low, high)


def draw_plane(
    ax: Axes, plane: Plane, surface: Sequence[Sequence[float]], unit: float, levels: Array, norm: Normalize
) -> None:
    """Draw the contours of a loss over a plane.

    Args:
        ax: The panel.
        plane: The plane.
        surface: Losses [n, n]; rows follow the second direction and columns the first.
        unit: Norm of the weights, the unit of the distances.
        levels: Contour levels.
        norm: Colour scale of the levels.
    """
    z = np.ma.masked_invalid(np.asarray(surface, dtype=float))
    x = np.array(plane.distances) / unit
    first, second = (title(name).replace("most negative eigenvector", "most negative") for name in plane.directions)
    if not len(levels) or z.mask.all():
        return say(ax, "no finite loss" if not z.count() else f"the loss is {z.max():.3g}\neverywhere")
    ax.contourf(x, x, z, levels=levels, norm=norm, cmap="viridis")
    ax.contour(x, x, z, levels=levels, colors="white", linewidths=0.3, alpha=0.6)
    row, column = np.unravel_index(int(z.argmin()), z.shape)
    ax.plot(0, 0, marker="+", color="white", markersize=5, markeredgewidth=0.9, label="weights")
    ax.plot(x[column], x[row], color=LEAST, label="least", **RING)
    ax.set_aspect("equal")
    _ends(ax, x)
    ax.set_yticks([x[0], 0, x[-1]], _labels(x))
    ax.set_xlabel(first)
    ax.set_ylabel(second)


def _cells(cell: SubplotSpec, rows: int, columns: int) -> Iterator[SubplotSpec]:
    """Divide a cell of a grid into rows and columns."""
    grid = cell.subgridspec(rows, columns)
    return (grid[i, j] for i in range(rows) for j in range(columns))


def colour_bar(figure: Figure, axes: Sequence[Axes], levels: Array, norm: Normalize) -> None:
    """Add the colour bar of the planes."""
    bar = figure.colorbar(
        ScalarMappable(norm, "viridis"), ax=list(axes), fraction=0.03, pad=0.015, aspect=14, shrink=0.8
    )
    bar.outline.set_visible(False)
    bar.set_label("loss")
    if isinstance(norm, LogNorm):
        log_ticks(bar.ax, float(levels[0]), float(levels[-1]))


def _legend(result: LandscapeResult, styles: dict[str, Look], relaxed: bool) -> list[Line2D | Patch]:
    """Compose the legend, shared by all panels."""
    named = {"hessian": "quadratic of the Hessian", "ggn": "quadratic of the GGN"}
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=TRUE[0], marker=".", markersize=3, linewidth=0.8, label="true loss")
    ]
    if relaxed:
        handles.append(
            Line2D(
                [],
                [],
                color=styles["relaxed"][0],
                linestyle=styles["relaxed"][1],
                linewidth=1.4,
                label="loss of the relaxed network",
            )
        )
    handles += [
        Line2D([], [], color=styles[name][0], linestyle=styles[name][1], label=text) for name, text in named.items()
    ]
    if any(line.accuracy for line in result.lines):
        handles.append(Line2D([], [], color="0.6", linestyle=ACCURACY, linewidth=0.9, label="accuracy (right axis)"))
    if result.planes:
        mark = partial(Line2D, [], [], linestyle="none")
        handles.append(mark(marker="+", color="0.2", markersize=5, markeredgewidth=0.9, label="the weights"))
        handles.append(Line2D([], [], color=LEAST, label="smallest loss on the grid", **RING))
    return handles


def landscape_caption(result: LandscapeResult) -> str:
    """Compose the caption: what the axes and the numbers in the panels mean, and the provenance."""
    text = "Loss L at w + t v with ‖v‖\u00a0=\u00a01. Distances are in units of ‖w‖\u00a0=\u00a0"
    text += f"{result.weight_norm:.3g}."
    text += " The true loss is piecewise constant." if result.network.get("surrogate") else ""
    text += " Quadratics: L(0) + t\u00a0g′v + t²/2\u00a0v′Av, where A is the surrogate’s Hessian H or GGN G. L″: "
    text += "second difference of the true loss at the circles."
    if any(math.isfinite(line.residual) or line.name == "gradient" for line in result.lines):
        text += " The eigenvectors (of H) and the gradient point uphill (g′v\u00a0≥\u00a00)."
    if any(line.name.startswith("random") for line in result.lines):
        text += " Random directions are filter-normalized."
    oblique = [p for p in result.planes if abs(p.cosine) >= OBLIQUE]
    if oblique:
        pairs = ", ".join(f"{title(p.directions[0])} and {title(p.directions[1])} {p.cosine:.2g}" for p in oblique)
        text += f" Directions that are not orthogonal: cosine of {pairs}."
    if math.isfinite(result.relaxed_loss):
        text += " The relaxed network replaces each spike by the integral of the surrogate. It is a different network: "
        text += f"its loss at w is {result.relaxed_loss:.3g}."
    return f"{text} {caption(result)}"
