"""Draw the largest eigenvalue as a histogram over mini-batches."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hessian_tools.plots.captions import caption
from hessian_tools.plots.style import WIDTH, add_caption, layout, operator_name, settled, styled
from hessian_tools.results.batch_eigenvalues import BatchEigenvaluesResult


def batch_figure(result: BatchEigenvaluesResult) -> Figure:
    """Draw a histogram of the eigenvalues, with their mean and the eigenvalue on all batches together.

    Args:
        result: The eigenvalues.

    Returns:
        The figure, one column wide.
    """
    values = np.array(result.values)
    with styled():
        figure = Figure(figsize=(0.62 * WIDTH, 2.6), layout=layout())
        ax = figure.subplots()
        ax.hist(values, bins="auto", color="0.75", edgecolor="0.35", linewidth=0.6)
        ax.axvline(result.mean, color="0.1", linewidth=1.2, label=f"mean {result.mean:.3g}")
        ax.axvline(result.whole, color="C0", linewidth=1.2, linestyle="--", label=f"all together {result.whole:.3g}")
        ax.plot(values, np.zeros_like(values), "|", color="0.1", markersize=7, clip_on=False)
        ax.set_xlabel(f"largest eigenvalue of the {operator_name(result.settings['operator'])}")
        ax.set_ylabel("mini-batches")
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.legend(frameon=False)
        size = result.settings["batch_size"]
        text = f"{len(values)} mini-batches of {size} samples at the same weights, one tick each. "
        add_caption(figure, text + caption(result))
        return settled(figure)
