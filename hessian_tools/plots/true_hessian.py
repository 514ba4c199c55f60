"""Draw the Hessian of the smoothed loss itself: eigenvalues with intervals, and what other operators predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hessian_tools.plots.captions import caption
from hessian_tools.plots.style import WIDTH, add_caption, layout, looks, operator_name, say, set_title, settled, styled
from hessian_tools.results.true_hessian import DrawMean, TrueHessianResult


def true_hessian_figure(result: TrueHessianResult) -> Figure:
    """Draw the curvature along the estimated eigenvectors, and along the eigenvectors of other operators.

    Args:
        result: The result of `true_hessian`.

    Returns:
        The figure, two columns wide, with 95% intervals over the draws.
    """
    with styled():
        figure = Figure(figsize=(WIDTH, 2.6), layout=layout())
        left, right = figure.subplots(1, 2)
        _eigenvalues(left, result)
        _directions(right, result)
        text = (
            f"Smoothed loss at noise {result.noise:g}, in units of the noise. Bars: 95% intervals over the draws. The "
            "largest eigenvalue is at least as large as every point on the left. "
        )
        add_caption(figure, text + caption(result))
        return settled(figure)


def _bars(ax: Axes, x: Sequence[float], means: Sequence[DrawMean], **look: Any) -> None:
    """Draw means with their intervals."""
    for place, mean in zip(x, means, strict=True):
        low, high = mean.ci95
        if math.isfinite(low) and math.isfinite(high):
            ax.plot([place, place], [low, high], color="0.6", linewidth=0.9, zorder=1)
    ax.plot(list(x), [mean.value for mean in means], linestyle="none", markersize=3.5, **look)


def _eigenvalues(ax: Axes, result: TrueHessianResult) -> None:
    set_title(ax, "a", "estimated eigenvectors")
    top, low = result.eigenvalues, result.smallest_eigenvalues
    ax.axhline(0, color="0.8", linewidth=0.6, zorder=0)
    if not top:
        say(ax, "too many weights for the draws")
        return
    _bars(ax, range(1, len(top) + 1), [e.form for e in top], marker="o", color="0.1")
    places = range(len(top) + 2, len(top) + 2 + len(low))
    _bars(ax, places, [e.form for e in reversed(low)], marker="s", color="0.1")
    ax.set_xticks([1, *([places[-1]] if low else [])], ["largest", *(["smallest"] if low else [])])
    ax.set_ylabel("curvature v'Hv")


def _directions(ax: Axes, result: TrueHessianResult) -> None:
    set_title(ax, "b", "eigenvectors of other operators")
    names = list(dict.fromkeys(d.operator for d in result.directions))
    if not names:
        say(ax, "no other operator was named")
        return
    for name, (colour, _) in zip(names, looks(len(names)), strict=True):
        some = [d for d in result.directions if d.operator == name]
        _bars(
            ax,
            [d.predicted for d in some],
            [d.form for d in some],
            marker="o",
            color=colour,
            label=operator_name(name),
        )
    values = [d.predicted for d in result.directions]
    ax.axline((0, 0), slope=1, color="0.8", linewidth=0.6, zorder=0)
    ax.set_xlim(min(0.0, *values) * 1.05, max(0.0, *values) * 1.05 or 1.0)
    ax.set_xlabel("eigenvalue of the operator")
    ax.set_ylabel("measured curvature")
    ax.legend(loc="best", frameon=False)
