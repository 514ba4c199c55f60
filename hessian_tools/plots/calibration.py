"""The figure of a calibration: every operator's curvature against that of the true spiking loss, for one checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter, NullLocator

from hessian_tools.plots.captions import caption
from hessian_tools.plots.curves import SymlogAxis, ValueAxis, linear_axis
from hessian_tools.plots.style import (
    MEDIUM,
    PANEL,
    SMALL,
    WIDTH,
    Look,
    add_caption,
    add_legend,
    apart,
    layout,
    log_ticks,
    looks,
    numbers,
    operator_name,
    set_title,
    settled,
    styled,
    symlog_ticks,
    text_width,
    value_scale,
)

if TYPE_CHECKING:  # a figure is drawn from a result alone: nothing that computes one is imported
    from hessian_tools.results.calibration import CalibrationResult, Scale


Array = npt.NDArray[np.float64]
CALIBRATED_OPERATORS = ("hessian", "|hessian|", "fisher", "ggn", "ggn, fitted", "smoothed")
AGAINST = ("hessian", "ggn", "smoothed")  # those that stand against the truth, direction by direction
LETTERS = "abcdefg"
BAND = (0.7, 1.4)  # of a good ratio; what Agreement.within counts
LOWEST, HIGHEST = 0.1, 10.0  # of the ratios drawn; the caption names what lies beyond
DECADES = 4  # of |c| below the largest at which the axis turns linear at the latest
SURE = 0.9995  # the largest correlation that an axis in arctanh can show
TRUE = "0.1"
_DIRECTION_KINDS = {  # of directions: label, marker and size
    "hessian, top": ("Hessian, largest", "^", 3.6),
    "hessian, most negative": ("Hessian, most negative", "v", 3.6),
    "eigenvector": ("largest of GGN, Fisher, smoothed", "o", 3.0),
    "gradient": ("gradient", "*", 5.5),
    "random": ("random", "x", 2.6),
    "mixture": ("mixture", "s", 2.6),
}


def calibration_figure(result: CalibrationResult) -> Figure:
    """(a-c) The true curvature along every direction against v'Av at the middle noise scale, for Hessian, GGN and
    smoothed operator, those that were measured; against the noise scale (d) the rank correlation with its interval, (e)
    the median ratio with quartiles, (f) the trace.

    The axes of (a-c) are linear near 0 and logarithmic elsewhere, a decade as long in one as in another.
    """
    scale = middle(result)
    predicted = {name: predictions(result, scale, name) for name in AGAINST if name in scale.agreement}
    letters = LETTERS[len(predicted) :]
    near = [name for name in styles(result) if name not in beyond(result)]
    with styled():
        figure = Figure(figsize=(WIDTH, 5.6), layout=layout())
        rows = figure.add_gridspec(2, 1, height_ratios=(1.12, 1))
        c, errors = np.array(scale.curvature), np.array(scale.stderr)
        for name, ax in against(figure, rows[0], LETTERS, predicted, c, errors).items():
            draw_directions(ax, result, scale, name)
        below = rows[1].subgridspec(1, 3)
        titles = ("ranking of directions", "size of the curvature", "trace")
        axes = [figure.add_subplot(below[0, i]) for i in range(3)]
        for ax, letter, title in zip(axes, letters, titles, strict=False):
            set_title(ax, letter, title)
        draw_correlations(axes[0], result, list(styles(result)))
        draw_ratios(axes[1], result, near)
        draw_traces(axes[2], result, near)
        add_legend(figure, _legend(result))
        add_caption(figure, calibration_caption(result))
        return settled(figure)


def middle(result: CalibrationResult) -> Scale:
    scales = sorted(result.calibration.scales, key=lambda s: s.scale)
    return scales[len(scales) // 2]


def predictions(result: CalibrationResult, scale: Scale, operator: str) -> Array:
    """v'Av of every direction, NaN for an operator that was not measured."""
    name = f"ggn, {scale.fitted}" if operator == "ggn, fitted" else operator
    missing = (math.nan,) * len(result.calibration.kinds)
    return np.array({**result.calibration.predictions, **scale.predictions}.get(name, missing), dtype=float)


def group(kind: str) -> str:
    """The kind of a direction as KINDS has it."""
    return kind if kind in _DIRECTION_KINDS else "random" if kind.startswith("random") else "eigenvector"


def name_of(operator: str) -> str:
    known = {"|hessian|": "|Hessian|", "ggn, fitted": "GGN, width fitted", "smoothed": "smoothed"}
    base, comma, variant = operator.partition(", ")
    return known.get(operator) or f"{operator_name(base)}{comma}{variant}"


def styles(result: CalibrationResult) -> dict[str, Look]:
    """Every operator compared, with its look."""
    found = {name for s in result.calibration.scales for name in s.agreement}
    ordered = [name for name in CALIBRATED_OPERATORS if name in found]
    return {name: look_of(name) for name in [*ordered, *sorted(found - set(CALIBRATED_OPERATORS))]}


def look_of(operator: str) -> Look:
    """One colour an operator in all figures of a calibration; a variant has that of its operator."""
    palette = [looks(10)[i] for i in (0, 9, 7, 1, 4, 2)]
    known = dict(zip(CALIBRATED_OPERATORS, palette, strict=True))
    colour, dashes = known.get(operator) or known.get(operator.partition(", ")[0], looks(6)[5])
    return colour, dashes if operator in known else (0, (1, 1))


def beyond(result: CalibrationResult) -> list[str]:
    """Operators all of whose median ratios lie beyond the axis."""
    ratios = {name: [s.agreement[name].ratio for s in result.calibration.scales] for name in styles(result)}
    return [name for name, found in ratios.items() if not any(LOWEST < r < HIGHEST for r in found)]


def curvature_axis(c: Array, errors: Array) -> SymlogAxis:
    """Of true curvatures [n]: linear up to the smallest that differs from 0 by two standard errors."""
    sizes = np.abs(c[np.abs(c) > 2 * np.nan_to_num(errors)])
    largest = float(np.abs(c[np.isfinite(c)]).max(initial=0.0)) or 1.0
    linthresh = float(np.clip(sizes.min(initial=largest), largest * 10.0**-DECADES, largest / 10))
    bars = np.concatenate([c - errors, c + errors, [largest]])
    low, high = float(np.nanmin(bars)), float(np.nanmax(bars))
    return _roomy(linthresh, low, high)


def _roomy(linthresh: float, low: float, high: float) -> SymlogAxis:
    ends = np.arcsinh(np.array([low, high]) / linthresh)
    ends += 0.05 * (ends[1] - ends[0]) * np.array([-1, 1])
    low, high = (float(x) for x in linthresh * np.sinh(ends))
    return SymlogAxis(linthresh, low, high, 0.0)


def prediction_axis(predicted: Array, axis: SymlogAxis) -> SymlogAxis:
    """As the axis of the true curvatures, from the smallest prediction to the larger of both largest."""
    finite = predicted[np.isfinite(predicted)]
    high = max(float(finite.max(initial=0.0)), axis.high)
    return _roomy(axis.linthresh, min(float(finite.min(initial=0.0)), max(axis.low, 0.0)), high)


def against(
    figure: Figure, cell: SubplotSpec, letters: str, predicted: Mapping[str, Array], c: Array, errors: Array
) -> dict[str, Axes]:
    """A row of panels, one an operator, of the true curvatures c [n] against the predictions [n], with the identity."""
    y = curvature_axis(c, errors)
    axes = {name: prediction_axis(values, y) for name, values in predicted.items()}
    spans = [float(np.ptp(x.forward(np.array([x.low, x.high])))) for x in axes.values()]
    grid = cell.subgridspec(1, len(axes), width_ratios=spans)
    panels = {}
    for i, (name, x) in enumerate(axes.items()):
        ax = panels[name] = figure.add_subplot(grid[0, i])
        set_title(ax, letters[i], name_of(name))
        draw_identity(ax, x, y, (WIDTH - 0.9) * 72 * spans[i] / sum(spans))
        if i:
            ax.tick_params(labelleft=False)
            ax.set_ylabel("")
    return panels


def draw_identity(ax: Axes, x: SymlogAxis, y: SymlogAxis, width: float) -> None:
    """Both axes, the identity, the band of good ratios, and the lines at 0; width: of the panel, in points."""
    value_scale(ax, ValueAxis("symlog", y.low, y.high, y.linthresh), "true curvature c")
    exponents = range(math.ceil(math.log10(y.linthresh)), math.ceil(math.log10(max(y.high, -y.low))))
    ticks = [t for t in (0.0, *(sign * 10.0**k for k in exponents for sign in (1, -1))) if y.low <= t <= y.high]
    low, high = y.forward(np.array([y.low, y.high]))
    places = [float(y.forward(np.array(t)) / (high - low)) for t in ticks]
    shown = sorted(apart(ticks, places, [1.4 * MEDIUM / (0.7 * PANEL)] * len(ticks)))
    if len(shown) > 2:  # otherwise also what lies between the decades
        ax.set_yticks(shown, numbers(shown))
    symlog_ticks(ax, x, "prediction v′Av", width)
    low, high = y.forward(np.array([min(y.low, 0.0), max(x.high, y.high)]))
    t = y.inverse(np.linspace(low, high, 200))
    ax.fill_between(t, BAND[0] * t, BAND[1] * t, color="0.88", linewidth=0, zorder=0)
    ax.plot(t, t, color="0.4", linewidth=0.7, zorder=1, label="identity")
    ax.axvline(0, color="0.75", linewidth=0.6, zorder=0)
    if y.low < 0:
        ax.axhline(0, color="0.75", linewidth=0.6, zorder=0)
    sns.despine(ax=ax)


def draw_directions(ax: Axes, result: CalibrationResult, scale: Scale, operator: str) -> None:
    """One marker a direction, with the standard error of c, and the numbers of the agreement."""
    x, c, errors = predictions(result, scale, operator), np.array(scale.curvature), np.array(scale.stderr)
    kinds = np.array([group(kind) for kind in result.calibration.kinds])
    colour, _ = look_of(operator)
    ax.vlines(x, c - errors, c + errors, color=colour, linewidth=0.6, alpha=0.7)
    for kind, (_, marker, size) in _DIRECTION_KINDS.items():
        at = kinds == kind
        ax.plot(
            x[at], c[at], marker=marker, markersize=size, linestyle="none", color=colour, alpha=0.85, label=kind,
            markeredgewidth=0.7 if marker == "x" else 0,
        )  # fmt: skip
    found = scale.agreement[operator]
    note(ax, f"rank corr. {found.correlation:.3f}\nratio {found.ratio:.2f}\nin band {100 * found.within:.0f}%")


def note(ax: Axes, text: str) -> None:
    """Numbers above or below the identity, where fewer markers lie."""
    marked = [each.get_xydata() for each in ax.lines if each.get_linestyle() == "None"]
    x, y = (ax.transData - ax.transAxes).transform(np.concatenate(marked)).T
    above = ((x < 0.35) & (y > 0.75)).sum() < ((x > 0.65) & (y < 0.25)).sum()
    place, side, end = ((0.03, 0.97), "left", "top") if above else ((0.98, 0.03), "right", "bottom")
    ax.text(
        *place, text.replace("-", "−"), transform=ax.transAxes, ha=side, va=end, fontsize=SMALL, color="0.2",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
    )  # fmt: skip


def draw_correlations(ax: Axes, result: CalibrationResult, operators: Sequence[str]) -> None:
    found = {name: [s.agreement[name] for s in _ascending(result)] for name in operators}
    ends = [e for values in found.values() for a in values for e in (a.correlation, *a.ci95)]
    correlation_axis(ax, ends)
    for name, x in _dodged(ax, result, operators).items():
        bars = [(clipped(a.ci95[0]), clipped(a.ci95[1])) for a in found[name]]
        _draw_path(ax, x, [clipped(a.correlation) for a in found[name]], bars, name)
    ax.set_ylabel("rank correlation")


def draw_ratios(ax: Axes, result: CalibrationResult, operators: Sequence[str]) -> None:
    found = {name: [s.agreement[name] for s in _ascending(result)] for name in operators}
    ratio_axis(ax, [e for values in found.values() for a in values for e in (a.ratio, *a.quartiles)])
    for name, x in _dodged(ax, result, operators).items():
        _draw_path(ax, x, [a.ratio for a in found[name]], [a.quartiles for a in found[name]], name)
    ax.set_ylabel("median of c / v′Av")


def draw_traces(ax: Axes, result: CalibrationResult, operators: Sequence[str]) -> None:
    """The true trace with its standard error, and those of the operators that have one."""
    scales = _ascending(result)
    fixed = {name: value for name, value in result.calibration.traces.items() if name in operators}
    moving = {name: [s.traces[name] for s in scales] for name in scales[0].traces}
    truth, errors = np.array([s.trace for s in scales]), np.array([s.trace_stderr for s in scales])
    others = np.array([0.0, *fixed.values(), *(v for found in moving.values() for v in found)])
    axis = linear_axis(np.append(truth, others), np.append(errors, np.zeros(len(others))))
    value_scale(ax, axis, "trace of DAD")
    ax.axhline(0, color="0.75", linewidth=0.6, zorder=0)
    x = _scale_axis(ax, result)
    for name, value in fixed.items():
        colour, dashes = look_of(name)
        ax.axhline(value, color=colour, linestyle=dashes, label=name)
    for name, found in moving.items():
        _draw_path(ax, x, found, [(v, v) for v in found], name)
    ax.vlines(x, truth - errors, truth + errors, color=TRUE, linewidth=0.9)
    ax.plot(x, truth, color=TRUE, marker="D", markersize=3, linewidth=0.8, label="true")


def _ascending(result: CalibrationResult) -> list[Scale]:
    return sorted(result.calibration.scales, key=lambda s: s.scale)


def _draw_path(ax: Axes, x: Array, values: Sequence[float], bars: Sequence[tuple[float, float]], operator: str) -> None:
    colour, dashes = look_of(operator)
    low, high = np.array(bars).T
    ax.vlines(x, low, high, color=colour, linewidth=0.8)
    ax.plot(x, values, color=colour, linestyle=dashes, linewidth=0.8, marker="o", markersize=2.6, label=operator)


def _scale_axis(ax: Axes, result: CalibrationResult) -> Array:
    """The logarithmic x axis of noise scales; returns them, ascending."""
    x = np.array([s.scale for s in _ascending(result)])
    ax.set_xscale("log")
    low, high = float(x[0]) / 1.5, float(x[-1]) * 1.5
    ax.set_xlim(low, high)
    places = [math.log(s / low) / math.log(high / low) for s in x]
    labels = numbers(x.tolist())
    shown = apart(list(range(len(x))), places, [(text_width(text, MEDIUM) + 4) / (0.7 * PANEL) for text in labels])
    ax.set_xticks(x[shown], [labels[i] for i in shown])
    ax.set_xticks(x, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("noise scale s")
    sns.despine(ax=ax)
    return x


def _dodged(ax: Axes, result: CalibrationResult, operators: Sequence[str]) -> dict[str, Array]:
    """Where the operators' markers stand, side by side at every scale."""
    x = _scale_axis(ax, result)
    gap = float(np.diff(np.log(x)).min()) if len(x) > 1 else math.log(2)
    places = np.linspace(-0.25, 0.25, len(operators)) if len(operators) > 1 else np.zeros(len(operators))
    return {name: x * math.exp(gap * place) for name, place in zip(operators, places, strict=True)}


def clipped(correlation: float) -> float:
    """To what an axis in Fisher's z can show."""
    return min(max(correlation, -SURE), SURE)


def correlation_axis(ax: Axes, shown: Iterable[float], height: float = 0.7 * PANEL) -> None:
    """A y axis of correlations in Fisher's z: equal lengths are equal evidence. height: of the panel, in points."""

    def z(r: Any) -> Any:
        return np.arctanh(np.clip(r, -1 + 1e-9, 1 - 1e-9))

    finite = [clipped(r) for r in shown if math.isfinite(r)]
    low, high = z(min([*finite, 0.5])), z(max([*finite, 0.99]))
    ax.set_yscale("function", functions=(z, np.tanh))
    room = 0.05 * (high - low)
    ends = float(np.tanh(low - room)), float(np.tanh(high + room))
    ax.set_ylim(*ends)
    ticks = [t for t in (-0.99, -0.9, -0.5, 0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999) if ends[0] <= t <= ends[1]]
    places = [float((z(t) - z(ends[0])) / (z(ends[1]) - z(ends[0]))) for t in ticks]
    kept = sorted(apart(ticks[::-1], places[::-1], [1.4 * MEDIUM / height] * len(ticks)))
    ax.set_yticks(kept, numbers(kept))
    ax.yaxis.set_minor_locator(NullLocator())
    if low < 0:
        ax.axhline(0, color="0.75", linewidth=0.6, zorder=0)


def ratio_axis(ax: Axes, shown: Iterable[float]) -> None:
    """A logarithmic y axis of ratios, within LOWEST and HIGHEST, with the band of good ones and a line at 1."""
    finite = [min(max(r, LOWEST), HIGHEST) for r in shown if math.isfinite(r) and r > 0]
    low, high = min([*finite, 0.5]) / 1.15, max([*finite, 2.0]) * 1.15
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    log_ticks(ax, low, high)
    ax.axhspan(*BAND, color="0.88", linewidth=0, zorder=0, label="band")
    ax.axhline(1, color="0.4", linewidth=0.7, zorder=1)


def _legend(result: CalibrationResult) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=colour, linestyle=dashes, marker="o", markersize=2.6, label=name_of(name))
        for name, (colour, dashes) in styles(result).items()
    ]
    handles.append(Line2D([], [], color=TRUE, marker="D", markersize=3, linewidth=0.8, label="truth"))
    handles.append(Patch(facecolor="0.88", label=f"ratio {BAND[0]} to {BAND[1]}"))
    kinds = {group(kind) for kind in result.calibration.kinds}
    return handles + [
        Line2D(
            [], [], color="0.2", marker=marker, markersize=size, linestyle="none", label=label,
            markeredgewidth=0.7 if marker == "x" else 0,
        )
        for kind, (label, marker, size) in _DIRECTION_KINDS.items()
        if kind in kinds
    ]  # fmt: skip


def turns(result: CalibrationResult, scale: Scale) -> tuple[int, int, int]:
    """Of the Hessian's most negative eigenvectors: how many have v'Hv < 0, along how many of these the true loss curves
    up by more than two standard errors, and along how many down."""
    at = np.array([kind == "hessian, most negative" for kind in result.calibration.kinds], dtype=bool)
    at &= predictions(result, scale, "hessian") < 0
    c, error = np.array(scale.curvature)[at], np.array(scale.stderr)[at]
    return int(at.sum()), int((c > 2 * error).sum()), int((c < -2 * error).sum())


def calibration_caption(result: CalibrationResult) -> str:
    scale, draws = middle(result), result.settings.get("draws")
    c, errors = np.array(scale.curvature), np.array(scale.stderr)
    panels = sum(name in scale.agreement for name in AGAINST)
    last, d, e, f = list(LETTERS[panels - 1 : panels + 3])
    text = f"(a–{last}) {len(c)} unit directions v; c: second difference, over a step that moves the outputs as far as "
    text += (
        f"the noise, of the mean true spiking loss under noise of s\u00a0=\u00a0{scale.scale:g} of each filter’s rms"
    )
    text += f" ({draws} draws; bars: standard error). " if draws else " (bars: standard error). "
    text += f"Axes linear within ±{curvature_axis(c, errors).linthresh:.1g}. "
    negative, up, down = turns(result, scale)
    if negative:
        text += (
            f"Along {up} of the {negative} most negative eigenvectors of the surrogate Hessian the true loss curves "
        )
        text += f"up by more than two standard errors, along {down} down. "
    text += f"({d}) 95% bootstrap intervals over directions. ({e}) Median and quartiles where c and v′Av are positive"
    left = {name: len(c) - int(((predictions(result, scale, name) > 0) & (c > 0)).sum()) for name in styles(result)}
    left_out = [f"{name_of(name)} {n}" for name, n in left.items() if n]
    text += f"; left out of {len(c)}: {', '.join(left_out)}" if left_out else ""
    for name in beyond(result):
        found = [s.agreement[name].ratio for s in _ascending(result) if name in s.agreement]
        span = f"{min(found):.3g} to {max(found):.3g}" if np.isfinite(found).all() else "not positive"
        text += f"; {name_of(name)}, not drawn in ({e}, {f}): {span}"
    text += f". ({f}) D: each filter’s rms; truth: from the change of the mean loss with s² (bars: standard error)."
    if any(s.fitted for s in result.calibration.scales):
        text += " Width fitted: for every s the Gaussian surrogate whose median ratio is nearest to 1."
    losses = ", ".join(f"{s.loss:.2g}" for s in _ascending(result))
    return f"{text} Mean loss at these s: {losses}. {caption(result)}"
