"""Draw the main metrics of a flatness analysis."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hessian_tools.plots.captions import caption
from hessian_tools.plots.style import WIDTH, add_caption, layout, printable, settled, styled
from hessian_tools.results.flatness import FlatnessResult


def flatness_figure(result: FlatnessResult) -> Figure:
    """Draw every main metric with its errors, each on its own axis, because their units differ.

    Args:
        result: The metrics of one checkpoint.

    Returns:
        The figure, two columns wide. Thick bars are standard errors over the data, thin ones 95% intervals over probes
        or draws.
    """
    shown = {name: m for name, m in result.main.items() if math.isfinite(m.value)}
    with styled():
        figure = Figure(figsize=(WIDTH, 0.7 + 0.42 * max(1, len(shown))), layout=layout())
        for ax, (name, m) in zip(
            figure.subplots(max(1, len(shown)), 1, squeeze=False).flat, shown.items(), strict=False
        ):
            low, high = m.ci95 if all(map(math.isfinite, m.ci95)) else (m.value, m.value)
            ax.plot([low, high], [0, 0], color="0.4", linewidth=0.8)
            if math.isfinite(m.data_stderr):
                ax.plot([m.value - m.data_stderr, m.value + m.data_stderr], [0, 0], color="0.4", linewidth=2.5)
            ax.plot([m.value], [0], marker="o", markersize=4, color="0.1")
            ends = [0.0, low, high, m.value - _known(m.data_stderr), m.value + _known(m.data_stderr)]
            margin = 0.06 * (max(ends) - min(ends) or 1.0)
            ax.set_xlim(min(ends) - margin, max(ends) + margin)
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.set_yticks([0], [printable(name, 34)])
            ax.set_ylim(-1, 1)
            ax.axvline(0, color="0.8", linewidth=0.6, zorder=0)
            ax.spines[["left", "right", "top"]].set_visible(False)
            ax.tick_params(axis="y", length=0)
        text = "Thick: one standard error over the data. Thin: 95% interval over probes or draws, or an error bound. "
        add_caption(figure, text + caption(result))
        return settled(figure)


def _known(error: float) -> float:
    return error if math.isfinite(error) else 0.0
