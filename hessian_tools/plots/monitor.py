"""Draw what a monitor measured during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hessian_tools.plots.style import WIDTH, layout, printable, set_title, settled, styled


def monitor_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw every number against the step, one panel each.

    Args:
        history: One mapping for every measurement, with "step" and the same names in all of them.

    Returns:
        The figure, two columns wide.

    Raises:
        ValueError: If nothing was measured.
    """
    if not history:
        raise ValueError("nothing was measured: call the monitor in the training loop first")
    names = [name for name in history[0] if name != "step"]
    steps = [row["step"] for row in history]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with styled():
        figure = Figure(figsize=(WIDTH, 0.3 + 1.6 * rows), layout=layout())
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, letter, name in zip(axes, "abcdefghi", names, strict=False):
            set_title(ax, letter, printable(name.replace("_", " "), 24))
            ax.plot(steps, [row[name] for row in history], color="0.1", marker="o", markersize=2.5, linewidth=0.9)
            ax.set_xlabel("step")
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(4))
        for ax in axes[len(names) :]:
            ax.remove()
        return settled(figure)
