"""Draw the calibrations of several networks in one figure, and summarize them in tables in Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats

from hessian_tools.plots.calibration import middle, predictions, styles, turns
from hessian_tools.plots.calibration_panels import (
    AGAINST,
    BAND,
    CALIBRATED_OPERATORS,
    LETTERS,
    TRUE,
    against,
    clipped,
    correlation_axis,
    look_of,
    name_of,
    note,
    ratio_axis,
)
from hessian_tools.plots.curves import Array
from hessian_tools.plots.style import (
    SMALL,
    WIDTH,
    Colour,
    add_caption,
    add_legend,
    layout,
    printable,
    set_title,
    settled,
    styled,
)

if TYPE_CHECKING:
    from hessian_tools.results.calibration import CalibrationResult, Scale


Results = Mapping[str, "CalibrationResult"]
Columns = Sequence[tuple[str, Colour, Array]]  # for each column: label below, colour, one value per network
_Measure = Callable[["CalibrationResult", float, str], float]  # function of a network, a noise scale and an operator
MARKERS = "os^Dv*"  # markers of the families of networks
NEGATIVE = "most negative Hessian eigenvector"


def study_figure(results: Results) -> Figure:
    """Draw the calibrations of several networks.

    The panels show (a) the rank correlation and (b) the ratio c / v'Av by operator and noise scale, with a dot for each
    network and the medians, (c, d) the same by training surrogate, and (e-g) all directions of all networks. Panels
    (c-g) are at the middle noise scale of each network.

    Args:
        results: Calibrations by name of the network.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no result.
    """
    if not results:
        raise ValueError("no calibration to draw")
    families = families_of(results)
    names = [family for family, _ in Counter(families.values()).most_common()]
    dots = [MARKERS[names.index(family) % len(MARKERS)] for family in families.values()]
    every = list(results.values())
    operators = [name for name in CALIBRATED_OPERATORS if any(name in styles(r) for r in every)]
    scales = sorted({s.scale for r in every for s in r.calibration.scales})

    def by_scale(value: _Measure) -> dict[str, Columns]:
        """Return a group of columns for each operator, with a column for each noise scale."""
        return {
            name_of(name): [(f"{s:g}", look_of(name)[0], np.array([value(r, s, name) for r in every])) for s in scales]
            for name in operators
        }

    def by_surrogate(value: _Measure) -> dict[str, Columns]:
        """Return a group of columns for each training surrogate, with a column for each operator."""
        of = np.array([surrogate_of(r) for r in every])
        found = [(look_of(name)[0], np.array([value(r, middle(r).scale, name) for r in every])) for name in AGAINST]
        return {
            name.replace(":", "\n"): [("", colour, np.where(of == name, values, math.nan)) for colour, values in found]
            for name in sorted(set(of.tolist()), key=_by_slope)
        }

    with styled():
        figure = Figure(figsize=(WIDTH, 8.4), layout=layout())
        rows = figure.add_gridspec(4, 1, height_ratios=(1, 1, 1.1, 1.25))
        third = rows[2].subgridspec(1, 2)
        a, b, c, d = (figure.add_subplot(cell) for cell in (rows[0], rows[1], third[0, 0], third[0, 1]))
        set_title(a, "a", "ranking of directions, by operator and noise scale s")
        set_title(b, "b", "size of the curvature, by operator and noise scale s")
        set_title(c, "c", f"ranking, by training surrogate, s = {_middles(every)}")
        set_title(d, "d", f"size, by training surrogate, s = {_middles(every)}")
        for ax, columns, height in ((a, by_scale(correlation), 100.0), (c, by_surrogate(correlation), 70.0)):
            draw_columns(ax, columns, dots, partial(correlation_axis, height=height))
            ax.set_ylabel("rank correlation")
        for ax, columns in ((b, by_scale(ratio)), (d, by_surrogate(ratio))):
            draw_columns(ax, columns, dots, ratio_axis)
            ax.set_ylabel("median of c / v′Av")
        draw_pooled(figure, rows[3], every)
        add_legend(figure, _legend({name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}))
        add_caption(figure, study_caption(results))
        return settled(figure)


def families_of(results: Results) -> dict[str, str]:
    """Group networks into families.

    Args:
        results: Calibrations by name of the network.

    Returns:
        The family of each network: its data set and model, with "variants" appended if its neuron, reset, time steps,
        norm, depth or loss differ from those of most networks of the family.
    """

    def built(r: CalibrationResult) -> tuple[str, ...]:
        """Return the settings that distinguish variants."""
        n, keys = r.network, ("neuron", "reset", "detach_reset", "timesteps", "norm")
        return (*(str(n.get(key)) for key in keys), str(len(n.get("hidden") or ())), str(r.data.get("loss")))

    plain = {name: _family(r) for name, r in results.items()}
    counts = {
        label: Counter(built(results[name]) for name in plain if plain[name] == label) for label in plain.values()
    }
    usual = {label: count.most_common(1)[0][0] for label, count in counts.items()}
    return {
        name: label if built(results[name]) == usual[label] else f"{label} variants" for name, label in plain.items()
    }


def _family(r: CalibrationResult) -> str:
    """Return the data set and the model."""
    data, model = str(r.data.get("name") or "?"), str(r.network.get("model") or "network")
    return printable(f"{data.replace('fashion-mnist', 'Fashion-MNIST')} {model.upper()}", 24)


def surrogate_of(r: CalibrationResult) -> str:
    """Return the surrogate with which the network was trained."""
    return printable(r.network.get("trained_surrogate") or r.network.get("surrogate") or "?", 14)


def _by_slope(surrogate: str) -> tuple[str, float, str]:
    """Return a key that sorts surrogates by name and slope."""
    name, _, slope = surrogate.partition(":")
    try:
        return name, float(slope), slope
    except ValueError:
        return name, math.nan, slope


def scale_of(r: CalibrationResult, scale: float) -> Scale | None:
    """Return the measurement at a noise scale, if there is one."""
    return next((s for s in r.calibration.scales if s.scale == scale), None)


def correlation(r: CalibrationResult, scale: float, operator: str) -> float:
    """Return the rank correlation of an operator with the truth, clipped to the axis; NaN if it was not measured."""
    s = scale_of(r, scale)
    return clipped(s.agreement[operator].correlation) if s and operator in s.agreement else math.nan


def ratio(r: CalibrationResult, scale: float, operator: str) -> float:
    """Return the median of c / v'Av, NaN if it was not measured."""
    s = scale_of(r, scale)
    return s.agreement[operator].ratio if s and operator in s.agreement else math.nan


def trace_ratio(r: CalibrationResult, scale: float, operator: str) -> float:
    """Return the true trace divided by that of an operator, NaN if it was not measured."""
    s = scale_of(r, scale)
    trace = {**r.calibration.traces, **(s.traces if s else {})}.get(operator, math.nan)
    return s.trace / trace if s and trace else math.nan


def draw_columns(
    ax: Axes, groups: Mapping[str, Columns], dots: Sequence[str], scale: Callable[[Axes, Iterable[float]], None]
) -> None:
    """Draw groups of columns, with a dot for each network and a bar at the median.

    Args:
        ax: The panel.
        groups: Columns by name of the group. Values outside the axis are counted at its ends.
        dots: Marker of each network.
        scale: Function that sets the y axis for given values.
    """
    everything = [v for columns in groups.values() for _, _, values in columns for v in values]
    scale(ax, everything)
    low, high = ax.get_ylim()
    ticks: dict[float, str] = {}
    for g, columns in enumerate(groups.values()):
        step = 0.84 / len(columns)
        for k, (below, colour, values) in enumerate(columns):
            x = g + (k - (len(columns) - 1) / 2) * step
            ticks |= {x: below} if below else {}
            jitter = step * 0.6 * ((np.arange(len(values)) * 0.618) % 1 - 0.5)
            for marker in dict.fromkeys(dots):
                at = (low <= values) & (values <= high) & (np.array(dots) == marker)
                ax.plot(
                    x + jitter[at], values[at], marker=marker, markersize=2.8, linestyle="none", color=colour,
                    alpha=0.65, markeredgewidth=0,
                )  # fmt: skip
            median = float(np.median(values[np.isfinite(values)])) if np.isfinite(values).any() else math.nan
            if low <= median <= high:
                ax.plot([x - 0.42 * step, x + 0.42 * step], [median] * 2, color=TRUE, linewidth=1.3, label="median")
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.set_xticks(list(ticks), list(ticks.values()), minor=True)
    ax.tick_params(axis="x", which="minor", length=0, labelsize=SMALL, pad=1.5)
    ax.set_xticks(range(len(groups)), [f"\n{name}" if ticks else name for name in groups])
    ax.tick_params(axis="x", which="major", length=0, pad=1.5)
    for g in range(1, len(groups)):
        ax.axvline(g - 0.5, color="0.85", linewidth=0.5, zorder=0)
    sns.despine(ax=ax)
    _count_beyond(ax, list(groups.values()), low, high)


def _count_beyond(ax: Axes, groups: Sequence[Columns], low: float, high: float) -> None:
    """Write beyond the limits how many dots of each group are not drawn, and the most distant value."""
    values = [np.concatenate([v for _, _, v in columns]) for columns in groups]
    above, below = ([v[v > high] for v in values], [v[v < low] for v in values])
    texts = [(g, high, f"{len(v)} ↑{short(v.max())}") for g, v in enumerate(above) if len(v)]
    texts += [(g, low, f"{len(v)} ↓{short(v.min())}") for g, v in enumerate(below) if len(v)]
    room = (high / low) ** 0.07 if texts else 1.0  # factor from the limit to the middle of the strip
    ends = {high: high * room, low: low / room}
    for g, end, text in texts:
        ax.text(g, ends[end], text.replace("-", "−"), ha="center", va="center", fontsize=SMALL, color="0.3")
    if any(len(v) for v in above):
        ax.set_ylim(top=high * room**2)
    if any(len(v) for v in below):
        ax.set_ylim(bottom=low / room**2)


def draw_pooled(figure: Figure, cell: SubplotSpec, every: Sequence[CalibrationResult]) -> None:
    """Draw panels (e-g): all directions of all networks at their middle noise scales, rasterized."""
    at = [middle(r) for r in every]
    c, errors = (np.concatenate([getattr(s, key) for s in at]) for key in ("curvature", "stderr"))
    kinds = np.array([kind for r in every for kind in r.calibration.kinds])
    pooled = {
        name: np.concatenate([predictions(r, s, name) for r, s in zip(every, at, strict=True)]) for name in AGAINST
    }
    pooled = {name: values for name, values in pooled.items() if np.isfinite(values).any()}
    negative = kinds == "hessian, most negative"
    for name, ax in against(figure, cell, LETTERS[4:], pooled, c, errors).items():
        x, colour = pooled[name], look_of(name)[0]
        alpha = float(np.clip(600 / len(c), 0.15, 0.8))
        for rows, marker, ink, size in ((~negative, "o", colour, 2.0), (negative, "v", TRUE, 2.6)):
            ax.plot(
                x[rows], c[rows], marker=marker, markersize=size, linestyle="none", color=ink, alpha=alpha,
                markeredgewidth=0, rasterized=True,
            )  # fmt: skip
        known = np.isfinite(x)
        x, y = x[known], c[known]
        within = float(np.mean((x > 0) & (y > BAND[0] * x) & (y < BAND[1] * x)))
        rank = stats.spearmanr(x, y).statistic if np.ptp(x) and np.ptp(y) else math.nan
        text = f"rank corr. {rank:.2f}\nin band {100 * within:.0f}%"
        note(ax, text + (f"\nv′Av ≤ 0: {100 * np.mean(x <= 0):.0f}%" if (x <= 0).any() else ""))


def _middles(every: Iterable[CalibrationResult]) -> str:
    """Return the middle noise scales of the networks."""
    return " or ".join(f"{s:g}" for s in sorted({middle(r).scale for r in every}))


def _legend(families: Mapping[str, str]) -> list[Line2D | Patch]:
    """Compose the legend from the markers of the families."""
    handles: list[Line2D | Patch] = [
        Line2D([], [], color="0.3", marker=marker, markersize=3, linestyle="none", label=family)
        for family, marker in families.items()
    ]
    handles += [Patch(facecolor=look_of(name)[0], label=name_of(name)) for name in AGAINST]
    handles.append(Line2D([], [], color=TRUE, linewidth=1.3, label="median"))
    handles.append(Patch(facecolor="0.88", label=f"ratio {BAND[0]} to {BAND[1]}"))
    handles.append(Line2D([], [], color=TRUE, marker="v", markersize=3, linestyle="none", label=NEGATIVE))
    return handles


def study_caption(results: Results) -> str:
    """Compose the caption of the figure."""
    every = list(results.values())
    counts = Counter(families_of(results).values()).most_common()
    s = f"s\u00a0=\u00a0{_middles(every)}"
    text = f"{len(every)} network{'' if len(every) == 1 else 's'} "
    text += f"({', '.join(f'{n} {family}' for family, n in counts)}), one dot each. c: second difference of the mean "
    text += "true spiking loss under noise of s times each filter’s rms. (a, c) Rank correlation of v′Av and c over "
    text += (
        "directions v. (b, d) Median of c / v′Av over the directions where both are positive; arrows: number of dots "
    )
    text += "beyond the axis and the most distant value. "
    count = sum(len(r.calibration.kinds) for r in every)
    text += f"(e–g) All {count} directions of all networks, {s}; line: identity. "
    negative, up, down = np.sum([turns(r, middle(r)) for r in every], axis=0)
    if negative:
        text += f"The true loss curves up by more than two standard errors along {up} of the {negative} most negative "
        text += f"Hessian eigenvectors (v′Hv\u00a0<\u00a00), and down along {down}. "
    if any(s.fitted for r in every for s in r.calibration.scales):
        text += "Width fitted: for each network and s, the Gaussian surrogate whose median ratio is closest to 1."
    return text.strip()


def study_tables(results: Results) -> str:
    """Return tables of the agreement and of the most negative eigenvectors in Markdown.

    Args:
        results: Calibrations by name of the network.

    Returns:
        For each family, a table by noise scale and operator, and a table of the most negative eigenvectors. Numbers are
        medians over networks with the range in parentheses; "within" and "both > 0" are shares of all directions.

    Raises:
        ValueError: If there is no result.
    """
    if not results:
        raise ValueError("no calibration for a table")
    families = families_of(results)
    blocks = []
    for family, _ in Counter(families.values()).most_common():
        members = [r for name, r in results.items() if families[name] == family]
        scales = sorted({s.scale for r in members for s in r.calibration.scales})
        rows = [
            "| s | operator | rank correlation | median c / v'Av | both > 0 | within 0.7 to 1.4 | true trace / trace "
            "| networks |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for s in scales:
            known = {name for r in members if (scale := scale_of(r, s)) for name in scale.agreement}
            for name in [*(n for n in CALIBRATED_OPERATORS if n in known), *sorted(known - set(CALIBRATED_OPERATORS))]:
                label = name_of(name).replace("|Hessian|", "abs. Hessian")
                rows.append(f"| {s:g} | {label} | {_row(members, s, name)} |")
        rows += [
            "",
            "| s | most negative eigenvectors of the Hessian | true loss curves up | down |",
            "| --- " * 4 + "|",
        ]
        for s in scales:
            found = [turns(r, scale) for r in members if (scale := scale_of(r, s))]
            negative, up, down = (int(n) for n in np.sum(found, axis=0))
            shares = [f"{100 * n / negative:.0f}%" if negative else "" for n in (up, down)]
            rows.append(f"| {s:g} | {negative} | {shares[0]} | {shares[1]} |")
        blocks.append("\n".join([f"**{family}** (networks: {len(members)})", "", *rows]))
    return "\n\n".join(blocks) + "\n"


def _row(members: Sequence[CalibrationResult], s: float, name: str) -> str:
    """Return the cells of an operator at a noise scale for the networks of a family."""
    agreed = [(r, scale) for r in members if (scale := scale_of(r, s)) and name in scale.agreement]
    positive = [(predictions(r, scale, name) > 0) & (np.array(scale.curvature) > 0) for r, scale in agreed]
    within = np.average([scale.agreement[name].within for _, scale in agreed], weights=[len(p) for p in positive])
    cells = [
        _median([correlation(r, s, name) for r, _ in agreed], "{:.2f}".format),
        _median([ratio(r, s, name) for r, _ in agreed], short),
        *(f"{100 * share:.0f}%" for share in (np.mean(np.concatenate(positive)), within)),
        _median([trace_ratio(r, s, name) for r, _ in agreed], short),
        f"{len(agreed)}",
    ]
    return " | ".join(cells)


def _median(values: Iterable[float], form: Callable[[float], str]) -> str:
    """Format the median and the range of the finite values."""
    known = sorted(v for v in values if math.isfinite(v))
    if len(known) < 2:
        return form(known[0]) if known else ""
    return f"{form(float(np.median(known)))} ({form(known[0])}..{form(known[-1])})"


def short(value: float) -> str:
    """Format a number with two significant digits, without an exponent unless it is very large or small."""
    return f"{float(f'{value:.2g}'):g}"
