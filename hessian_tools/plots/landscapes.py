"""Draw the landscapes of several networks on one scale with one legend, and planes as surfaces in three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hessian_tools.plots.curves import ValueAxis, linear_axis
from hessian_tools.plots.landscape import colour_bar, contour_levels, draw_plane, title
from hessian_tools.plots.style import (
    WIDTH,
    Look,
    add_caption,
    add_legend,
    despine,
    layout,
    looks,
    printable,
    set_title,
    settled,
    styled,
    value_scale,
)

if TYPE_CHECKING:
    from hessian_tools.results.landscape import LandscapeResult, Plane

ACROSS = 4  # networks or surfaces per row
RELAXED = (0, (4, 2))  # dashes of the relaxed network


def landscapes_figure(found: Sequence[tuple[str, LandscapeResult]], captioned: bool = True) -> Figure:
    """Draw the landscapes of several networks in one figure.

    Each direction has one panel with the lines of all networks, on one loss axis. Each plane has one panel for each
    network, with common contour levels. Directions and planes that not all networks have are left out.

    Args:
        found: Labels and results.
        captioned: Whether to add a caption with the provenance.

    Returns:
        The figure, two columns wide.

    Raises:
        ValueError: If there is no direction that all networks have.
    """
    results = [r for _, r in found]
    directions = [line.name for line in results[0].lines if all(line.name in _lines(r) for r in results)]
    planes = [p.directions for p in results[0].planes if all(p.directions in _planes(r) for r in results)]
    if not directions:
        raise ValueError("the networks have no direction in common")
    columns = 2 if len(directions) in (2, 4) else min(3, len(directions))
    rows, wide = -(-len(directions) // columns), min(len(found), ACROSS)
    deep = -(-len(found) // wide) * len(planes)
    heights = [1.5 * rows, *([(2.0 if wide > 2 else 2.6) * deep] if planes else [])]
    letters = (chr(ord("a") + i) if i < 26 else f"{i + 1}" for i in range(10**6))
    names = [printable(label, 24) for label, _ in found]
    with styled():
        figure = Figure(figsize=(WIDTH, sum(heights) + 1.2), layout=layout())
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        styles, axis = looks(len(found)), _axis(results)
        cells = grid[0].subgridspec(rows, columns)
        for i, name in enumerate(directions):
            ax = figure.add_subplot(cells[i // columns, i % columns])
            set_title(ax, next(letters), title(name))
            _draw_lines(ax, name, results, styles, axis)
            if i % columns:
                ax.tick_params(labelleft=False)
                ax.set_ylabel("")
            if i + columns >= len(directions):
                ax.set_xlabel("distance t / ‖w‖")
        if planes:
            surfaces = [_planes(r)[pair].loss for pair in planes for r in results]
            levels, norm = contour_levels(surfaces)
            places = grid[1].subgridspec(deep, wide)
            axes = []
            for k, (pair, (name, r)) in enumerate(
                (pair, one) for pair in planes for one in zip(names, results, strict=True)
            ):
                row, column = k // len(found) * (deep // len(planes)) + k % len(found) // wide, k % len(found) % wide
                ax = figure.add_subplot(places[row, column])
                set_title(ax, next(letters), name)
                draw_plane(ax, _planes(r)[pair], _planes(r)[pair].loss, r.weight_norm, levels, norm)
                if column:
                    ax.set_ylabel("")
                axes.append(ax)
            if len(levels):
                colour_bar(figure, axes, levels, norm)
        add_legend(figure, _legend(names, styles, any(line.relaxed_loss for r in results for line in r.lines)))
        if captioned:
            add_caption(figure, _caption(results, bool(planes)))
        return settled(figure)


def surfaces_figure(found: Sequence[tuple[str, LandscapeResult]], captioned: bool = True) -> Figure:
    """Draw the planes of one or several networks as surfaces of the loss in three dimensions.

    Each plane has one row. Of one network, a row holds the true loss and the loss of the relaxed network; of several
    networks, it holds the true loss of each. All surfaces share one loss axis and one colour scale.

    Args:
        found: Labels and results.
        captioned: Whether to add a caption with the provenance.

    Returns:
        The figure, two columns wide.

    Raises:
        ValueError: If no plane was computed for all networks.
    """
    results = [r for _, r in found]
    planes = [p.directions for p in results[0].planes if all(p.directions in _planes(r) for r in results)]
    if not planes:
        raise ValueError("no plane was computed, so there is no surface to draw")
    views: list[tuple[str, LandscapeResult, Plane, Any]] = []
    for pair in planes:
        for label, r in found:
            plane, name = _planes(r)[pair], printable(label, 24)
            views.append((name if len(found) > 1 else "true loss", r, plane, plane.loss))
            if len(found) == 1 and plane.relaxed_loss:
                views.append(("relaxed network", r, plane, plane.relaxed_loss))
    columns = min(ACROSS, len(views) // len(planes))
    rows = -(-len(views) // columns)
    with styled():
        figure = Figure(figsize=(WIDTH, (2.9 if columns < 3 else 2.3) * rows + 0.9), layout=layout())
        levels, norm = contour_levels([surface for *_, surface in views])
        axes = []
        for k, (name, r, plane, surface) in enumerate(views):
            ax: Any = figure.add_subplot(rows, columns, k + 1, projection="3d")
            set_title(ax, chr(ord("a") + k % 26), name)
            _draw_surface(ax, plane, np.asarray(surface, dtype=float), r.weight_norm, norm, columns)
            axes.append(ax)
        if len(levels):
            colour_bar(figure, axes, levels, norm)
        add_caption(
            figure, _caption(results, True) + (" Heights are logarithmic." if isinstance(norm, LogNorm) else "")
        )
        return settled(figure)


def _lines(r: LandscapeResult) -> dict[str, Any]:
    return {line.name: line for line in r.lines}


def _planes(r: LandscapeResult) -> dict[tuple[str, str], Plane]:
    return {plane.directions: plane for plane in r.planes}


def _axis(results: Sequence[LandscapeResult]) -> ValueAxis:
    """Return one loss axis for all lines."""
    losses = np.array([v for r in results for line in r.lines for v in (*line.loss, *line.relaxed_loss)], dtype=float)
    losses = losses[np.isfinite(losses)]
    return linear_axis(losses if len(losses) else np.zeros(1), np.zeros(max(1, len(losses))))


def _draw_lines(
    ax: Axes, name: str, results: Sequence[LandscapeResult], styles: Sequence[Look], axis: ValueAxis
) -> None:
    """Draw the true loss of every network as a line, and the loss of the relaxed networks dashed."""
    value_scale(ax, axis, "loss")
    for r, (colour, _) in zip(results, styles, strict=True):
        line = _lines(r)[name]
        x = np.array(line.distances) / r.weight_norm
        if line.relaxed_loss:
            ax.plot(x, line.relaxed_loss, color=colour, linestyle=RELAXED, linewidth=0.9)
        ax.plot(x, line.loss, color=colour, marker=".", markersize=2.5, linewidth=0.9)
    ends = [line.distances[-1] / r.weight_norm for r in results for line in (_lines(r)[name],)]
    ax.set_xlim(-max(ends), max(ends))
    ax.set_xticks([-max(ends), 0, max(ends)], [f"{v:.3g}".replace("-", "−") for v in (-max(ends), 0, max(ends))])
    despine(ax)


def _draw_surface(ax: Any, plane: Plane, z: Any, unit: float, norm: Normalize, columns: int) -> None:
    """Draw one surface. Its height is the logarithm of the loss if the colour scale is logarithmic."""
    x, y = np.meshgrid(np.array(plane.distances) / unit, np.array(plane.distances) / unit)
    height = np.log10(z) if isinstance(norm, LogNorm) else z
    colours = colormaps["viridis"](norm(np.ma.masked_invalid(z)))
    ax.plot_surface(x, y, height, facecolors=colours, rstride=1, cstride=1, linewidth=0, antialiased=False, shade=False)
    ends = float(norm.vmin or 0.0), float(norm.vmax or 0.0)
    low, high = (math.log10(end) for end in ends) if isinstance(norm, LogNorm) else ends
    ax.set_zlim(low, high)
    edge = float(plane.distances[-1] / unit)
    for which, name in (("x", plane.directions[0]), ("y", plane.directions[1])):
        short = title(name).replace("most negative eigenvector", "most negative").replace("eigenvector", "eigenv.")
        getattr(ax, f"set_{which}label")(short, labelpad=-6)
        ticks = {-edge: f"−{edge:.2g}", 0.0: "0", edge: f"{edge:.2g}"}
        if which == "y":
            del ticks[-edge]  # it would touch the label of the other axis
        getattr(ax, f"set_{which}ticks")(list(ticks), list(ticks.values()))
        ax.tick_params(axis=which, pad=-4)
    ax.set_zticks(np.linspace(low, high, 3), [""] * 3)  # the colour bar says the values
    ax.view_init(elev=32, azim=-55)
    ax.set_box_aspect((1, 1, 0.75), zoom=1.0 if columns < 3 else 0.92)


def _legend(names: Sequence[str], styles: Sequence[Look], relaxed: bool) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=colour, marker=".", markersize=3, linewidth=0.9, label=name)
        for name, (colour, _) in zip(names, styles, strict=True)
    ]
    if relaxed:
        handles.append(Line2D([], [], color="0.4", linestyle=RELAXED, linewidth=0.9, label="relaxed network"))
    return handles


def _caption(results: Sequence[LandscapeResult], planes: bool) -> str:
    """Compose the caption: what is drawn, and on which data."""
    text = (
        "Loss L at w + t v with ‖v‖\u00a0=\u00a01, for each network along its own directions. Distances are in units "
    )
    text += f"of ‖w‖ ({', '.join(f'{r.weight_norm:.3g}' for r in results)})."
    text += " Planes show the true loss." if planes and len(results) > 1 else ""
    text += " The true loss is piecewise constant." if any(r.network.get("surrogate") for r in results) else ""
    data = results[0].data
    name = " ".join(printable(data[key], 40) for key in ("name", "split") if data.get(key))
    return f"{text} {name}{', ' if name else ''}{data.get('samples', '?')} samples."
