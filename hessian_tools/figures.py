"""Publication figures, drawn from saved results alone: two columns wide, text of 7 pt or more.

Nothing here touches a model or pyplot's global state, and the user's matplotlibrc has no say: the same result gives
the same figure, and the same bytes. Every limit, threshold and floor is relative to the data, so that eigenvalues times
a constant give the same picture with other tick labels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import seaborn as sns
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import NullFormatter

from hessian_tools.curves import (
    SymlogAxis,
    cumulative,
    densities_of,
    density_curves,
    finite,
    one_eigenvalue,
    symlog_axis,
)
from hessian_tools.results import Eigenvalue, Spectrum, SpectrumResult, write_atomically

T = TypeVar("T")
Array = npt.NDArray[np.float64]
Style = tuple[tuple[float, float, float], Any]  # colour, dashes

WIDTH = 7.0  # two columns, inches
SMALL, MEDIUM, NORMAL = 7.0, 7.5, 8.0  # points
PANEL = 166.0  # points, the narrowest a panel becomes
DECADES = 4  # of |lambda| below the largest; what is smaller lies on the floor
RUG = 0.055  # height of one row of the rug, as a share of the panel
ROWS = 11  # of the heat map; the last one stands for all other layers
DASHES = ("", (4, 1.2), (1, 1), (5, 1, 1, 1), (7, 2), (3, 1, 1, 1, 1, 1), (1, 2.2), (8, 1, 2, 1))
NAMES = {"hessian": "Hessian", "ggn": "GGN", "fisher": "Fisher", "relaxed": "relaxed Hessian"}
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


def spectrum_figure(result: SpectrumResult) -> Figure:
    """(a) density, (b) CDF, (c) |eigenvalue| against rank, (d) layers of the eigenvectors, and the provenance.

    The density is that of the bulk, per unit of lambda, and integrates to its weight: every quadrature node becomes a
    Gaussian in u = asinh(lambda / linthresh), the smooth form of the symlog axis, of sigma = (range of the nodes in u)
    / steps, times du/dlambda; where the nodes are too far apart for that, a Gaussian in lambda of their spacing.
    Deflated eigenvalues are no part of it but ticks in the strip above. Grey: less than one eigenvalue.
    """
    with _style():
        figure = Figure(figsize=(WIDTH, 5.2), layout=_layout())
        styles = dict(zip(result.spectra, _styles(len(result.spectra)), strict=True))
        (a, b), (c, d) = figure.subplots(2, 2)
        axis = symlog_axis(result)
        layers = f"layers of the {_name(result.main[0])} eigenvectors"
        titles = ("bulk spectral density", "cumulative distribution", "ends of the spectrum", layers)
        for ax, letter, title in zip((a, b, c, d), "abcd", titles, strict=True):
            _set_title(ax, letter, title)
        _draw_density(a, result, styles, axis)
        _draw_cdf(b, result, styles, axis)
        _draw_ranks(c, [(s, styles[name]) for name, s in result.spectra.items()])
        _draw_layers(d, result.main[1])
        _add_legend(figure, _legend(result, styles))
        figure.supxlabel(caption(result, axis), x=0.008, ha="left", fontsize=SMALL, linespacing=1.25)
        return _settled(figure)


def layers_figure(result: SpectrumResult) -> Figure:
    """The bulk density of every layer's diagonal block, small multiples on one axis of eigenvalues.

    Raises ValueError for a result without blocks.
    """
    if not result.blocks:
        raise ValueError("no diagonal blocks to draw")
    columns = min(3, len(result.blocks))
    rows = -(-len(result.blocks) // columns)
    with _style():
        figure = Figure(figsize=(WIDTH, 1.1 + 1.7 * rows), layout=_layout())
        panels = figure.subplots(rows, columns, squeeze=False).flat
        axis = symlog_axis(replace(result, spectra=result.blocks))
        (style, *_) = _styles(1)
        for (name, block), ax in zip(result.blocks.items(), panels, strict=False):  # this order loses no panel
            ax.set_title(_text(name, 24))
            size = sum(n for parameter, n in result.parameters.items() if parameter.rpartition(".")[0] in (name, ""))
            _draw_density(ax, replace(result, spectra={name: block}, num_parameters=size), {name: style}, axis)
            if not ax.get_subplotspec().is_first_col():
                ax.set_ylabel("")
        for ax in list(panels):
            ax.axis("off")
        text = f"{_name(result.main[0])}, diagonal block of each layer; ticks: deflated eigenvalues; "
        text += "grey: less than one eigenvalue. " + caption(replace(result, spectra={}), axis)
        figure.supxlabel(_wrapped(text, (WIDTH - 0.15) * 72), x=0.008, ha="left", fontsize=SMALL, linespacing=1.25)
        return _settled(figure)


def rank_figure(results: list[tuple[str, SpectrumResult]]) -> Figure:
    """|eigenvalue| against rank, one line a labelled result: Hessians left and, if every result has one, GGNs right.

    A result without a Hessian shows its first operator instead. Raises ValueError for an empty list.
    """
    if not results:
        raise ValueError("no result to draw")
    with _style():
        figure = Figure(figsize=(WIDTH, 2.9), layout=_layout())
        styles = _styles(len(results))
        panels = [[r.spectra.get("hessian", r.main[1]) for _, r in results]]
        names = {"Hessian" if "hessian" in r.spectra else _name(r.main[0]) for _, r in results}
        titles = [", ".join(sorted(names))]
        if all("ggn" in r.spectra for _, r in results) and names != {"GGN"}:
            panels.append([r.spectra["ggn"] for _, r in results])
            titles.append("GGN")
        panel_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, letter, title, spectra in zip(panel_axes, "ab", titles, panels, strict=False):
            _set_title(ax, letter, title)
            _draw_ranks(ax, list(zip(spectra, styles, strict=True)))
        lines: list[Line2D | Patch] = [
            Line2D([], [], color=colour, linestyle=dashes, label=_text(label, 26))
            for (label, _), (colour, dashes) in zip(results, styles, strict=True)
        ]
        everything = [s for panel in panels for s in panel]
        bar = Line2D([], [], color="0.2", marker="|", markersize=6, linestyle="none", label="standard error (data)")
        known = any(_bar(e) for s in everything for e in (*s.eigenvalues, *s.smallest_eigenvalues))
        _add_legend(figure, [*lines, *_marks(everything), *([bar] if known else [])])
        return _settled(figure)


def save_figure(figure: Figure, stem: str | Path) -> list[Path]:
    """Write STEM.png (300 dpi) and STEM.pdf (TrueType fonts embedded), each whole or not at all; returns the paths.

    No time stamp goes into them.
    """
    paths = [Path(f"{stem}.png"), Path(f"{stem}.pdf")]
    with _style():
        save = partial(figure.savefig, bbox_inches=None, facecolor="white")
        write_atomically(paths[0], lambda file: save(file, format="png", dpi=300))
        write_atomically(paths[1], lambda file: save(file, format="pdf", metadata={"CreationDate": None}))
    return paths


def _draw_density(ax: Axes, result: SpectrumResult, styles: dict[str, Style], axis: SymlogAxis) -> None:
    """Panel (a). The floor is the density of a single eigenvalue; the strip above holds the deflated ones."""
    drawn = densities_of(result)
    if not drawn:
        return _say(ax, "no density computed")
    if not any(np.any(nodes) for d in drawn.values() for nodes in d.nodes):
        return _say(ax, "all eigenvalues are 0")
    curves = {n: density_curves(d, axis) for n, d in drawn.items()}
    peak = max((y.max(initial=0.0) for _, y in curves.values()), default=0.0)
    low, high = axis.forward(np.array([axis.low, axis.high]))
    grid = axis.inverse(np.linspace(low, high, 400))
    one = one_eigenvalue(list(drawn.values()), grid, axis) / max(result.num_parameters, 1)
    bottom, top = float(one.min()) / 2, max(peak, float(one.max())) * 2
    head = 1.1 * RUG * len(drawn) if any(d.atoms for d in drawn.values()) else 0.0
    ax.set_yscale("log")
    ax.set_ylim(bottom, bottom * (top / bottom) ** (1 / (1 - head)))
    if peak:
        _log_ticks(ax, bottom, top)
        ax.fill_between(grid, bottom, one, color="0.9", linewidth=0, zorder=0)
        ax.plot(grid, one, color="0.45", linestyle=":", linewidth=0.8, zorder=1, label="floor")
    else:
        _say(ax, "no bulk:\nevery eigenvalue\nis deflated")
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
    _symlog(ax, axis)
    if peak:
        ax.set_ylabel("density (per unit λ)")


def _draw_cdf(ax: Axes, result: SpectrumResult, styles: dict[str, Style], axis: SymlogAxis) -> None:
    """Panel (b): no broadening, the deflated eigenvalues included."""
    drawn = densities_of(result)
    if not drawn:
        return _say(ax, "no density computed")
    for name, density in drawn.items():
        x, y = cumulative(density)
        x = np.concatenate([[axis.low], x, [axis.high]])
        y = np.concatenate([np.zeros((len(y), 1)), y, y[:, -1:]], axis=1)
        colour, dashes = styles[name]
        ax.fill_between(x, y.min(0), y.max(0), step="post", color=colour, alpha=0.3, linewidth=0)
        ax.plot(x, y.mean(0), drawstyle="steps-post", color=colour, linestyle=dashes, label=name)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set_ylim(-0.03, 1.03)
    _symlog(ax, axis)
    ax.set_ylabel("fraction of eigenvalues ≤ λ")
    sns.despine(ax=ax)


def _draw_ranks(ax: Axes, series: Sequence[tuple[Spectrum, Style]]) -> None:
    """Panel (c): the largest eigenvalues from rank 1, the smallest up to rank P."""
    tops = max(len(s.eigenvalues) for s, _ in series)
    smalls = max(len(s.smallest_eigenvalues) for s, _ in series)
    pairs = [e for s, _ in series for e in (*s.eigenvalues, *s.smallest_eigenvalues) if math.isfinite(e.value)]
    sizes = np.abs([e.value for e in pairs])
    if not sizes.any():
        return _say(ax, "all eigenvalues are 0" if len(sizes) else "no eigenvalue found")
    floor = float(sizes.max()) * 10.0**-DECADES
    cut = bool((sizes < floor).any())
    highest = max(abs(e.value) + _bar(e) for e in pairs)
    low, high = (floor / 4 if cut else float(sizes.min()) / 2), highest * 2
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    if cut:
        ax.axhline(floor, color="0.45", linestyle=":", linewidth=0.8, zorder=0, label="floor")
        ax.text(
            0.02, math.sqrt(low * floor), "floor: smaller |λ| lie on it", transform=ax.get_yaxis_transform(),
            va="center", fontsize=SMALL, color="0.3",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    for i, (spectrum, look) in enumerate(series):
        shift = 0.5 * ((i + 0.5) / len(series) - 0.5)
        small = spectrum.smallest_eigenvalues[::-1]
        _draw_series(ax, spectrum.eigenvalues, 1 + shift, floor, low, look)
        _draw_series(ax, small, tops + 2 + smalls - len(small) + shift, floor, low, look)
    _log_ticks(ax, low, high)
    ax.set_xlim(0.3, tops + (smalls + 1 if smalls else 0) + 0.7)
    ax.set_xticks(*_rank_ticks(tops, smalls, 1))
    if smalls:
        ax.axvline(tops + 1, color="0.75", linewidth=0.6, zorder=0)
    ax.set_xlabel("rank (1: largest λ, P: smallest)" if smalls else "rank (1: largest λ)")
    ax.set_ylabel("|eigenvalue λ|")
    sns.despine(ax=ax)


def _draw_series(ax: Axes, pairs: Sequence[Eigenvalue], first: float, floor: float, low: float, look: Style) -> None:
    """Neighbouring ranks as one line; o or v by sign, hollow where not converged, bars where known."""
    colour, dashes = look
    found = [(first + i, e) for i, e in enumerate(pairs) if math.isfinite(e.value)]
    x, y = [x for x, _ in found], [max(abs(e.value), floor) for _, e in found]
    ax.plot(x, y, color=colour, linestyle=dashes, linewidth=0.7, alpha=0.7)
    bars = [(x, abs(e.value), _bar(e)) for x, e in found if _bar(e) and abs(e.value) >= floor]
    lows, highs = [max(y - bar, low) for _, y, bar in bars], [y + bar for _, y, bar in bars]
    ax.vlines([x for x, _, _ in bars], lows, highs, color=colour, linewidth=0.9)
    for negative, converged in itertools.product((False, True), repeat=2):
        at = [i for i, (_, e) in enumerate(found) if (e.value < 0, e.converged) == (negative, converged)]
        ax.plot(
            [x[i] for i in at], [y[i] for i in at], marker="v" if negative else "o", color=colour, linestyle="none",
            markeredgewidth=0.8, markerfacecolor=colour if converged else "white",
        )  # fmt: skip


def _bar(pair: Eigenvalue) -> float:
    return pair.data_stderr if math.isfinite(pair.data_stderr) else 0.0


def _draw_layers(ax: Axes, spectrum: Spectrum) -> None:
    """Panel (d): rows of parameters, columns of ranks."""
    tops, smalls = spectrum.eigenvalues, spectrum.smallest_eigenvalues[::-1]
    layers, shares = layer_shares([*tops, *smalls])
    if not layers:
        return _say(ax, "no layer shares")
    sns.heatmap(
        shares, ax=ax, vmin=0, vmax=1, cmap="viridis", xticklabels=False, yticklabels=False,
        cbar_kws={"label": "share of squared norm", "ticks": [0, 0.5, 1], "pad": 0.02, "fraction": 0.06},
    )  # fmt: skip
    ax.collections[0].colorbar.outline.set_visible(False)  # type: ignore[union-attr]
    if smalls:
        ax.axvline(len(tops), color="white", linewidth=3)
    ranks, labels = _rank_ticks(len(tops), len(smalls), 0)
    ax.set_xticks([r - 0.5 for r in ranks], labels, rotation=0)
    ax.set_yticks(np.arange(len(layers)) + 0.5, [_text(n, 20) for n in layers], rotation=0, fontsize=SMALL)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("rank")


def layer_shares(pairs: Sequence[Eigenvalue]) -> tuple[list[str], Array]:
    """Short names of the layers [n] and their shares [n, pairs], the least of too many layers added up in one row."""
    names = list(dict.fromkeys(name for e in pairs for name in e.layers))
    shares = np.array([[e.layers.get(name, math.nan) for e in pairs] for name in names]).reshape(len(names), len(pairs))
    short = [name.removeprefix("layers.") for name in names]
    if len(names) <= ROWS:
        return short, shares
    order = np.argsort(-np.nan_to_num(shares).max(1), kind="stable")
    kept, rest = np.sort(order[: ROWS - 1]), order[ROWS - 1 :]
    return [*(short[i] for i in kept), f"other ({len(rest)})"], np.vstack([shares[kept], shares[rest].sum(0)])


def caption(result: SpectrumResult, axis: SymlogAxis) -> str:
    """What the figure was computed from and how to read it, in lines as wide as the figure."""
    checkpoint, data, network = result.checkpoint, result.data, result.network
    parts = []
    if path := checkpoint.get("path"):
        digest = f" (sha256\u00a0{str(checkpoint['sha256'])[:8]})" if checkpoint.get("sha256") else ""
        parts.append(f"Checkpoint {_text(PurePath(str(path)).name, 60)}{digest}")
    model = [_text(network[key], 30) for key in ("model", "name", "architecture") if network.get(key)][:1]
    model += [f"surrogate {_text(network['surrogate'], 30)}"] if network.get("surrogate") else []
    model += [f"{_text(network['reset'], 30)} reset"] if network.get("reset") else []
    source = [_text(data[key], 40) for key in ("name", "split") if data.get(key)]
    source += [f"{data['samples']} samples"] if data.get("samples") else []
    parts += [", ".join(found) for found in (model, source) if found]
    parts += [f"{_text(result.dtype, 20)}, seed\u00a0{result.seed}", f"P\u00a0=\u00a0{result.num_parameters}"]
    parts += [f"loss\u00a0{result.loss:.4g}"] if math.isfinite(result.loss) else []
    text = "; ".join(parts) + "."
    if densities_of(result):
        sigma, unit = f"{axis.sigma:.2g}", f"{axis.linthresh:.2g}"
        text += f" (a): nodes broadened by σ\u00a0=\u00a0{sigma} in asinh(λ\u00a0/\u00a0{unit}), or by their spacing "
        text += "where that is wider; (a, b): mean and range over probes."
    if any(_bar(e) for s in result.spectra.values() for e in (*s.eigenvalues, *s.smallest_eigenvalues)):
        text += " (c): bars, where longer than the marker: standard error over the data."
    return _wrapped(text, (WIDTH - 0.15) * 72)


def _symlog(ax: Axes, axis: SymlogAxis) -> None:
    """The symlog scale, its slope continuous at linthresh, with 0 and as many decades labelled as fit."""
    ax.set_xscale("symlog", linthresh=axis.linthresh, linscale=0.9 / math.log(10))
    ax.set_xlim(axis.low, axis.high)
    furthest = max(axis.high, -axis.low)
    decades = [0.0, *(10.0**k for k in range(-300, 301) if axis.linthresh <= 10.0**k <= furthest)]
    low, high = axis.forward(np.array([axis.low, axis.high]))
    places = [float(axis.forward(np.array(t)) / (high - low)) for t in decades]
    widths = [(_width(label, MEDIUM) + 3) / PANEL for label in _numbers([-t for t in decades])]
    ticks, shown = (
        [t for t in sorted({s * t + 0.0 for t in found for s in (-1, 1)}) if axis.low <= t <= axis.high]
        for found in (decades, _apart(decades, places, widths))
    )
    ax.set_xticks(shown, _numbers(shown))
    ax.set_xticks(ticks, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("eigenvalue λ")


def _log_ticks(ax: Axes, low: float, high: float) -> None:
    """Decades, thinned to what fits, or 1-2-5 where there are too few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**k for k in exponents if low <= 10.0**k <= high]
    fine = [m * 10.0**k for k in exponents for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    ticks = decades[:: math.ceil(len(decades) / 6)] if len(decades) > 2 else fine
    ax.set_yticks(ticks, _numbers(ticks))
    ax.set_yticks(decades, minor=True)
    ax.yaxis.set_minor_formatter(NullFormatter())


def _rank_ticks(tops: int, smalls: int, gap: int) -> tuple[list[float], list[str]]:
    """Where the ranks worth a label stand: 1, 2, ... for the largest, after the gap up to P for the smallest."""
    step = next(s for s in (1, 5, 10, 20, 50, 100, 200, 500, 10**9) if tops <= 4 * s)
    ticks = {1: "1", tops: f"{tops}", **{i: f"{i}" for i in range(step, tops + 1, step)}} if tops else {}
    first = {tops + gap + 1: f"P−{smalls - 1}"} if smalls > 1 else {}
    last = {tops + gap + smalls: "P"} if smalls else {}
    ticks = {**last, **first, **ticks}
    widths = [(_width(label, MEDIUM) + 3) / PANEL for label in ticks.values()]
    kept = _apart(list(ticks), [i / (tops + gap + smalls) for i in ticks], widths)
    return [float(i) for i in kept], [ticks[i] for i in kept]


def _apart(items: Sequence[T], places: Sequence[float], widths: Sequence[float]) -> list[T]:
    """The items, first come first served, whose labels clear those kept before."""
    kept: list[int] = []
    for i, place in enumerate(places):
        if all(abs(place - places[j]) >= (widths[i] + widths[j]) / 2 for j in kept):
            kept.append(i)
    return [items[i] for i in kept]


def _numbers(ticks: Sequence[float]) -> list[str]:
    """Plain where all are short, otherwise as powers of ten."""
    if all(t == 0 or 1e-3 <= abs(t) < 1.1e3 for t in ticks):
        return [f"{t:g}".replace("-", "−") for t in ticks]
    return [_power(t) for t in ticks]


def _power(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.0e}".split("e")
    factor = {"1": "", "-1": "-"}.get(mantissa, rf"{mantissa}\times")
    return f"${factor}10^{{{int(exponent)}}}$"


def _legend(result: SpectrumResult, styles: dict[str, Style]) -> list[Line2D | Patch]:
    """One legend for all panels."""
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=colour, linestyle=dashes, label=_name(name)) for name, (colour, dashes) in styles.items()
    ]
    densities = list(densities_of(result).values())
    if densities:
        if any(d.atoms for d in densities):
            handles.append(
                Line2D([], [], color="0.2", marker="|", markersize=6, linestyle="none", label="deflated eigenvalue")
            )
        handles.append(Patch(facecolor="0.9", label="floor: one eigenvalue (1/P)"))
    return [*handles, *_marks(list(result.spectra.values()))]


def _add_legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """Above all panels, in as few rows as the width allows; matplotlib fills columns first."""
    widths = [_width(str(h.get_label())) + 36 for h in handles]
    count = len(handles)
    for rows in range(1, count + 1):
        if sum(max(widths[i : i + rows]) for i in range(0, count, rows)) <= WIDTH * 72:
            break
    figure.legend(
        handles=handles, loc="outside upper center", ncols=math.ceil(count / rows), handlelength=2.4, columnspacing=1.2,
        handletextpad=0.5,
    )  # fmt: skip


def _marks(spectra: Sequence[Spectrum]) -> list[Line2D | Patch]:
    """What the markers of these spectra say."""
    pairs = [e for s in spectra for e in (*s.eigenvalues, *s.smallest_eigenvalues)]
    mark = partial(Line2D, [], [], color="0.2", linestyle="none", markeredgewidth=0.8)
    handles: list[Line2D | Patch] = [mark(marker="o", label="λ ≥ 0"), mark(marker="v", label="λ < 0")]
    if not all(e.converged for e in pairs):
        handles.append(mark(marker="o", markerfacecolor="white", label="not converged"))
    return handles


def _set_title(ax: Axes, letter: str, title: str) -> None:
    ax.set_title(rf"$\mathbf{{({letter})}}$  {title}", loc="left")


def _say(ax: Axes, message: str) -> None:
    """A message instead of a panel's content."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.minorticks_off()
    ax.spines[:].set_color("0.8")
    ax.text(0.5, 0.5, message, transform=ax.transAxes, ha="center", va="center", color="0.3")


def _style() -> AbstractContextManager[None]:
    return style.context(["default", STYLE])


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04, wspace=0.03, hspace=0.03)


def _settled(figure: Figure) -> Figure:
    """The layout made and kept, so that drawing again changes nothing."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def _styles(count: int) -> list[Style]:
    """Colour and dashes, both different for neighbours, no pair twice in 40."""
    colours = sns.color_palette("colorblind")
    dashes = [(0, d) if d else "-" for d in DASHES]
    return [(colours[i % len(colours)], dashes[i % len(dashes)]) for i in range(count)]


def _name(operator: str) -> str:
    return NAMES.get(operator, _text(operator, 18))


def _text(value: Any, longest: int) -> str:
    """What matplotlib can print as it stands: no mathematics, no line break, nothing the font lacks, not too long."""
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    text = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in str(value))
    if len(text) > longest:
        text = f"{text[: (longest - 1) // 2]}…{text[len(text) - longest // 2 :]}"
    return text.replace("$", r"\$") if not text.startswith("_") else " " + text.replace("$", r"\$")


@functools.lru_cache(maxsize=4096)
def _width(text: str, size: float = SMALL) -> float:
    """In points, of text as matplotlib takes it."""
    font = FontProperties(family="DejaVu Sans", size=size)
    math_text = text.startswith("$")
    shown = text if math_text else text.replace(r"\$", "$")
    return float(text_to_path.get_text_width_height_descent(shown, font, ismath=math_text)[0])


def _wrapped(text: str, width: float) -> str:
    """Lines of at most `width` points."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".lstrip()
        lines = [*lines[:-1], joined] if _width(joined) <= width else [*lines, word]
    return "\n".join(lines)
