"""Draw the panels of the figure of a spectrum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hessian_tools.plots.curves import (
    Array,
    SymlogAxis,
    cumulative,
    densities_of,
    density_curves,
    finite,
    is_positive,
    one_eigenvalue,
)
from hessian_tools.plots.style import (
    MEDIUM,
    PANEL,
    SMALL,
    Look,
    apart,
    despine,
    log_ticks,
    printable,
    say,
    symlog_ticks,
    text_width,
)
from hessian_tools.results.operator_spectrum import Eigenvalue, Spectrum
from hessian_tools.results.spectrum import SpectrumResult

DECADES = 4  # range of |lambda| drawn against rank; smaller values are drawn on the floor
RUG = 0.055  # height of the row of ticks of one operator, as a fraction of the panel
ROWS = 11  # rows of the heat map; the last one sums all other layers


def draw_density(ax: Axes, result: SpectrumResult, styles: dict[str, Look], axis: SymlogAxis) -> None:
    """Draw the density of the bulk, the floor of a single eigenvalue, and ticks for the deflated eigenvalues.

    Args:
        ax: The panel.
        result: The spectrum.
        styles: Looks of the operators.
        axis: The eigenvalue axis.
    """
    drawn = densities_of(result)
    if not drawn:
        return say(ax, "no density computed")
    if not any(np.any(nodes) for d in drawn.values() for nodes in d.nodes):
        return say(ax, "all eigenvalues are 0")
    curves = {n: density_curves(d, axis, is_positive(n, d)) for n, d in drawn.items()}
    peak = max((y.max(initial=0.0) for _, y in curves.values()), default=0.0)
    low, high = axis.forward(np.array([axis.low, axis.high]))
    grid = axis.inverse(np.linspace(low, high, 400))
    one = one_eigenvalue(list(drawn.values()), grid, axis) / max(result.num_parameters, 1)
    bottom, top = float(one.min()) / 2, max(peak, float(one.max())) * 2
    head = 1.1 * RUG * len(drawn) if any(d.atoms for d in drawn.values()) else 0.0
    ax.set_yscale("log")
    ax.set_ylim(bottom, bottom * (top / bottom) ** (1 / (1 - head)))
    if peak:
        log_ticks(ax, bottom, top)
        ax.fill_between(grid, bottom, one, color="0.9", linewidth=0, zorder=0)
        ax.plot(grid, one, color="0.45", linestyle=":", linewidth=0.8, zorder=1, label="floor")
    else:
        say(ax, "no bulk:\nevery eigenvalue\nis deflated")
    for i, (name, density) in enumerate(drawn.items()):
        x, y = curves[name]
        colour, dashes = styles[name]
        if len(x):
            least, mean, most = (part.clip(bottom / 10) for part in (y.min(0), y.mean(0), y.max(0)))
            ax.fill_between(x, least, most, color=colour, alpha=0.3, linewidth=0)
            ax.plot(x, mean, color=colour, linestyle=dashes, label=name)
        rows = (1 - RUG * (i + 0.9), 1 - RUG * (i + 0.15))
        atoms = finite(density.nodes[0][: density.atoms])
        ax.vlines(atoms, *rows, color=colour, linewidth=0.8, transform=ax.get_xaxis_transform(), label=f"rug {name}")
    if head:
        ax.axhline(top, color="0.6", linewidth=0.5)
    symlog_ticks(ax, axis)
    if peak:
        ax.set_ylabel("density (per unit λ)")


def draw_cdf(ax: Axes, result: SpectrumResult, styles: dict[str, Look], axis: SymlogAxis) -> None:
    """Draw the cumulative distribution, without broadening and including the deflated eigenvalues.

    Args:
        ax: The panel.
        result: The spectrum.
        styles: Looks of the operators.
        axis: The eigenvalue axis.
    """
    drawn = densities_of(result)
    if not drawn:
        return say(ax, "no density computed")
    for name, density in drawn.items():
        x, y = cumulative(density)
        x = np.concatenate([[axis.low], x, [axis.high]])
        y = np.concatenate([np.zeros((len(y), 1)), y, y[:, -1:]], axis=1)
        colour, dashes = styles[name]
        ax.fill_between(x, y.min(0), y.max(0), step="post", color=colour, alpha=0.3, linewidth=0)
        ax.plot(x, y.mean(0), drawstyle="steps-post", color=colour, linestyle=dashes, label=name)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set_ylim(-0.03, 1.03)
    symlog_ticks(ax, axis)
    ax.set_ylabel("fraction of eigenvalues ≤ λ")
    despine(ax)


def draw_ranks(ax: Axes, series: Sequence[tuple[Spectrum, Look]]) -> None:
    """Draw |eigenvalue| against rank for several spectra: the largest from rank 1, the smallest up to rank P."""
    tops = max(len(s.eigenvalues) for s, _ in series)
    smalls = max(len(s.smallest_eigenvalues) for s, _ in series)
    pairs = [e for s, _ in series for e in (*s.eigenvalues, *s.smallest_eigenvalues) if math.isfinite(e.value)]
    sizes = np.abs([e.value for e in pairs])
    if not sizes.any():
        return say(ax, "all eigenvalues are 0" if len(sizes) else "no eigenvalue found")
    floor = float(sizes.max()) * 10.0**-DECADES
    cut = bool((sizes < floor).any())
    highest = max(abs(e.value) + has_data_error(e) for e in pairs)
    ends = [abs(e.value) - has_data_error(e) for e in pairs if abs(e.value) > has_data_error(e)]
    least = max(min(min(ends, default=math.inf) / 1.2, float(sizes.min()) / 2), floor / 4)  # bars are not cut off
    low, high = (floor / 4 if cut else least), highest * 2
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    if cut:
        ax.axhline(floor, color="0.45", linestyle=":", linewidth=0.8, zorder=0, label="floor")
        ax.text(
            0.02, math.sqrt(low * floor), "floor: smaller |λ| are drawn on it", transform=ax.get_yaxis_transform(),
            va="center", fontsize=SMALL, color="0.3",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    for i, (spectrum, look) in enumerate(series):
        shift = 0.5 * ((i + 0.5) / len(series) - 0.5)
        small = spectrum.smallest_eigenvalues[::-1]
        _draw_series(ax, spectrum.eigenvalues, 1 + shift, floor, low, look)
        _draw_series(ax, small, tops + 2 + smalls - len(small) + shift, floor, low, look)
    log_ticks(ax, low, high)
    set_rank_axis(ax, tops, smalls)
    ax.set_xlabel("rank (1: largest λ, P: smallest)" if smalls else "rank (1: largest λ)")
    ax.set_ylabel("|eigenvalue λ|")
    despine(ax)


def _draw_series(ax: Axes, pairs: Sequence[Eigenvalue], first: float, floor: float, low: float, look: Look) -> None:
    """Draw consecutive ranks as one line, with markers that show the sign and the convergence, and error bars."""
    colour, dashes = look
    found = [(first + i, e) for i, e in enumerate(pairs) if math.isfinite(e.value)]
    x, y = [x for x, _ in found], [max(abs(e.value), floor) for _, e in found]
    ax.plot(x, y, color=colour, linestyle=dashes, linewidth=0.7, alpha=0.7)
    for limited in (False, True):
        drawn = [(x, e) for x, e in found if is_lower_limit(e) == limited and abs(e.value) >= floor]
        bars = [(x, abs(e.value), has_data_error(e)) for x, e in drawn if has_data_error(e)]
        lows, highs = [max(y - bar, low) for _, y, bar in bars], [y + bar for _, y, bar in bars]
        dots: Any = (0, (1, 1.5)) if limited else "-"
        ax.vlines([x for x, _, _ in bars], lows, highs, color=colour, linewidth=0.9, linestyles=dots)
    for negative, converged in itertools.product((False, True), repeat=2):
        at = [i for i, (_, e) in enumerate(found) if (e.value < 0, e.converged) == (negative, converged)]
        ax.plot(
            [x[i] for i in at], [y[i] for i in at], marker="v" if negative else "o", color=colour, linestyle="none",
            markeredgewidth=0.8, markerfacecolor=colour if converged else "white",
        )  # fmt: skip


def has_data_error(pair: Eigenvalue) -> float:
    """Return the standard error of an eigenvalue over the data, or a lower limit of it; 0 if neither is known."""
    known = (e for e in (pair.data_stderr, pair.data_stderr_least) if math.isfinite(e))
    return next(known, 0.0)


def is_lower_limit(pair: Eigenvalue) -> bool:
    """Return whether only a lower limit of the standard error over the data is known."""
    return not math.isfinite(pair.data_stderr) and math.isfinite(pair.data_stderr_least)


def draw_layers(ax: Axes, spectrum: Spectrum) -> None:
    """Draw a heat map of the share of each layer (rows) in the eigenvectors of each rank (columns)."""
    tops, smalls = spectrum.eigenvalues, spectrum.smallest_eigenvalues[::-1]
    layers, shares = share_table([*tops, *smalls])
    if not layers:
        return say(ax, "no layer shares")
    # rasterized: viewers draw hairlines between the cells of a vector image
    image = ax.pcolormesh(shares, vmin=0, vmax=1, cmap="viridis", rasterized=True)
    ax.invert_yaxis()
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, label="share of squared norm", ticks=[0, 0.5, 1], pad=0.02, fraction=0.06)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set_rasterized(True)
    if smalls:
        ax.axvline(len(tops), color="white", linewidth=3)
    ranks, labels = rank_ticks(len(tops), len(smalls), 0)
    ax.set_xticks([r - 0.5 for r in ranks], labels, rotation=0)
    ax.set_yticks(np.arange(len(layers)) + 0.5, [printable(n, 20) for n in layers], rotation=0, fontsize=SMALL)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("rank")


def share_table(pairs: Sequence[Eigenvalue]) -> tuple[list[str], Array]:
    """Collect the share of each layer in the eigenvectors.

    Args:
        pairs: The k eigenvalues, with the shares of the layers.

    Returns:
        Short names of the layers [n] and their shares [n, k], with n at most `ROWS`. If there are more layers, the last
        row is the sum over the layers with the smallest shares.
    """
    names = list(dict.fromkeys(name for e in pairs for name in e.layers))
    shares = np.array([[e.layers.get(name, math.nan) for e in pairs] for name in names]).reshape(len(names), len(pairs))
    short = [name.removeprefix("layers.") for name in names]
    if len(names) <= ROWS:
        return short, shares
    order = np.argsort(-np.nan_to_num(shares).max(1), kind="stable")
    kept, rest = np.sort(order[: ROWS - 1]), order[ROWS - 1 :]
    return [*(short[i] for i in kept), f"other ({len(rest)})"], np.vstack([shares[kept], shares[rest].sum(0)])


def rank_ticks(tops: int, smalls: int, gap: int, width: float = PANEL) -> tuple[list[float], list[str]]:
    """Choose the labelled ticks of an axis of ranks: 1, 2, ... for the largest eigenvalues, then up to P.

    Args:
        tops: Number of largest eigenvalues.
        smalls: Number of smallest eigenvalues.
        gap: Number of positions left free between the two groups.
        width: Width of the panel in points.

    Returns:
        Positions and labels of the ticks that fit.
    """
    step = next(s for s in (1, 5, 10, 20, 50, 100, 200, 500, 10**9) if tops <= 4 * s)
    ticks = {1: "1", tops: f"{tops}", **{i: f"{i}" for i in range(step, tops + 1, step)}} if tops else {}
    first = {tops + gap + 1: f"P−{smalls - 1}"} if smalls > 1 else {}
    last = {tops + gap + smalls: "P"} if smalls else {}
    ticks = {**last, **first, **ticks}
    widths = [(text_width(label, MEDIUM) + 3) / width for label in ticks.values()]
    kept = apart(list(ticks), [i / (tops + gap + smalls) for i in ticks], widths)
    return [float(i) for i in kept], [ticks[i] for i in kept]


def set_rank_axis(ax: Axes, tops: int, smalls: int, width: float = PANEL) -> None:
    """Set an x axis of ranks, with a line between the largest and the smallest eigenvalues.

    Args:
        ax: The panel.
        tops: Number of largest eigenvalues.
        smalls: Number of smallest eigenvalues.
        width: Width of the panel in points.
    """
    ax.set_xlim(0.3, tops + (smalls + 1 if smalls else 0) + 0.7)
    ax.set_xticks(*rank_ticks(tops, smalls, 1, width))
    if smalls:
        ax.axvline(tops + 1, color="0.75", linewidth=0.6, zorder=0)


def marks(spectra: Sequence[Spectrum]) -> list[Line2D | Patch]:
    """Return the legend entries of the markers of these spectra."""
    pairs = [e for s in spectra for e in (*s.eigenvalues, *s.smallest_eigenvalues)]
    mark = partial(Line2D, [], [], color="0.2", linestyle="none", markeredgewidth=0.8)
    handles: list[Line2D | Patch] = [mark(marker="o", label="λ ≥ 0"), mark(marker="v", label="λ < 0")]
    if not all(e.converged for e in pairs):
        handles.append(mark(marker="o", markerfacecolor="white", label="not converged"))
    return handles
