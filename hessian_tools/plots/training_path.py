"""Draw the path of a training run in a plane, on the contours of the loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hessian_tools.plots.captions import caption
from hessian_tools.plots.curves import Array
from hessian_tools.plots.landscape import colour_bar, contour_levels, title
from hessian_tools.plots.style import WIDTH, add_caption, add_legend, layout, say, set_title, settled, styled

if TYPE_CHECKING:
    from hessian_tools.results.training_path import TrainingPath

PATH, START, END = "#ffffff", "#ff9e1b", "#ff3b30"


def training_path_figure(result: TrainingPath, captioned: bool = True) -> Figure:
    """Draw the snapshots of a run in their plane, on the contours of the true loss and of the relaxed network.

    Distances are in units of the norm of the last snapshot's weights. Both panels share their contour levels.

    Args:
        result: The path.
        captioned: Whether to add a caption with the provenance.

    Returns:
        The figure, two columns wide.
    """
    surfaces = [("true loss", result.plane_loss)]
    surfaces += [("relaxed network", result.relaxed_loss)] if result.relaxed_loss else []
    with styled():
        figure = Figure(figsize=(WIDTH, 3.6), layout=layout())
        levels, norm = contour_levels([surface for _, surface in surfaces])
        axes = []
        for i, (name, surface) in enumerate(surfaces):
            ax = figure.add_subplot(1, len(surfaces), i + 1)
            set_title(ax, "ab"[i], name)
            _draw(ax, result, np.asarray(surface, dtype=float), levels, norm)
            if i:
                ax.set_ylabel("")
                ax.tick_params(labelleft=False)
            axes.append(ax)
        if len(levels):
            colour_bar(figure, axes, levels, norm)
        add_legend(figure, _legend(result))
        if captioned:
            add_caption(figure, training_path_caption(result))
        return settled(figure)


def direction_label(name: str, share: float) -> str:
    """Return the label of an axis: the direction, and its share of the snapshots' variance."""
    direction = f"principal component {name[2:]}" if name.startswith("pc") else title(name)
    return f"{direction} ({100 * share:.3g}% of the variance)"


def _draw(ax: Axes, result: TrainingPath, surface: Array, levels: Array, norm: Normalize) -> None:
    """Draw contours and path in one panel."""
    z, unit = np.ma.masked_invalid(surface), result.weight_norm
    x, y = np.array(result.first) / unit, np.array(result.second) / unit
    if not len(levels) or z.mask.all():
        return say(ax, "no finite loss" if not z.count() else f"the loss is {z.max():.3g}\neverywhere")
    ax.contourf(x, y, z, levels=levels, norm=norm, cmap="viridis", extend="both")
    ax.contour(x, y, z, levels=levels, colors="white", linewidths=0.3, alpha=0.6)
    at = np.array([s.position for s in result.snapshots]) / unit
    ax.plot(*at.T, color="black", linewidth=2.2, solid_joinstyle="round")
    ax.plot(*at.T, color=PATH, linewidth=1.1, marker="o", markersize=3, markeredgecolor="black", markeredgewidth=0.4)
    for place, colour in ((at[0], START), (at[-1], END)):
        ax.plot(*place, marker="o", markersize=5, color=colour, markeredgecolor="black", markeredgewidth=0.5)
    ax.set_xlabel(direction_label(result.directions[0], result.explained[0]))
    ax.set_ylabel(direction_label(result.directions[1], result.explained[1]))
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
    return None


def _legend(result: TrainingPath) -> list[Line2D | Patch]:
    dot: dict[str, Any] = {
        "linestyle": "none",
        "marker": "o",
        "markersize": 5,
        "markeredgecolor": "black",
        "markeredgewidth": 0.5,
    }
    first, last = (_moment(result, k) for k in (0, -1))
    return [
        Line2D([], [], color=START, label=f"first snapshot{first}", **dot),
        Line2D([], [], color=PATH, label="snapshots", **{**dot, "markersize": 3.5}),
        Line2D([], [], color=END, label=f"last snapshot{last}", **dot),
    ]


def _moment(result: TrainingPath, k: int) -> str:
    epoch = result.snapshots[k].epoch
    return "" if epoch is None else f" (epoch {epoch})"


def training_path_caption(result: TrainingPath) -> str:
    """Compose the caption: what the plane is, how far the path is from it, and the provenance."""
    farthest = max(s.off_plane for s in result.snapshots) / result.weight_norm
    text = "Snapshots of one run, projected onto the plane through the last one. Distances are in units of "
    text += (
        f"‖w‖\u00a0=\u00a0{result.weight_norm:.3g}. The contours are the loss in the plane; the snapshots are up to "
    )
    text += f"{farthest:.2g}\u00a0‖w‖ away from it. "
    if result.directions[0].startswith("pc"):
        text += "The principal components of a random walk show an arc too, so the shape of the path by itself says "
        text += "little. "
    elif abs(result.cosine) > 0.05:
        text += f"The second direction was made orthogonal to the first (cosine {result.cosine:.2g}). "
    if math.isfinite(result.loss) and result.network.get("norm") == "bn":
        text += "Running statistics of BatchNorm are those of the last snapshot. "
    return text + caption(result)
