"""Draw the figure of a calibration: the curvature of each operator against that of the true spiking loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from hessian_tools.plots.calibration_panels import (
    AGAINST,
    BAND,
    CALIBRATED_OPERATORS,
    HIGHEST,
    LETTERS,
    LOWEST,
    TRUE,
    against,
    clipped,
    correlation_axis,
    curvature_axis,
    look_of,
    name_of,
    note,
    ratio_axis,
)
from hessian_tools.plots.captions import caption
from hessian_tools.plots.curves import Array, linear_axis
from hessian_tools.plots.style import (
    PANEL,
    WIDTH,
    Look,
    add_caption,
    add_legend,
    despine,
    layout,
    log_x_ticks,
    numbers,
    set_title,
    settled,
    styled,
    value_scale,
)

if TYPE_CHECKING:  # a figure only needs the saved result
    from hessian_tools.results.calibration import CalibrationResult, Scale


_DIRECTION_KINDS = {  # kind of direction: label, marker and marker size
    "hessian, top": ("Hessian, largest", "^", 3.6),
    "hessian, most negative": ("Hessian, most negative", "v", 3.6),
    "eigenvector": ("largest of GGN, Fisher, smoothed", "o", 3.0),
    "gradient": ("gradient", "*", 5.5),
    "random": ("random", "x", 2.6),
    "mixture": ("mixture", "s", 2.6),
}


def calibration_figure(result: CalibrationResult, captioned: bool = True) -> Figure:
    """Draw how well the operators predict the curvature of the true spiking loss of one checkpoint.

    Panels (a-c) show the true curvature along each direction v against the prediction v'Av at the middle noise scale,
    for the Hessian, the GGN and the smoothed operator, as far as they were measured. Their axes are linear near 0 and
    logarithmic elsewhere, and a decade has the same length on all of them. The other panels show, against the noise
    scale, (d) the rank correlation with its 95% interval, (e) the median ratio with its quartiles and (f) the trace.

    Args:
        result: The calibration of one checkpoint.
        captioned: Whether to add a caption with the provenance.

    Returns:
        The figure, two columns wide.
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
        if captioned:
            add_caption(figure, calibration_caption(result))
        return settled(figure)


def middle(result: CalibrationResult) -> Scale:
    """Return the measurement at the middle noise scale."""
    scales = sorted(result.calibration.scales, key=lambda s: s.scale)
    return scales[len(scales) // 2]


def predictions(result: CalibrationResult, scale: Scale, operator: str) -> Array:
    """Return the predictions v'Av of an operator for all directions [n].

    Args:
        result: The calibration.
        scale: The measurement at one noise scale, for operators that depend on it.
        operator: Name of the operator.

    Returns:
        The predictions, all NaN if the operator was not measured.
    """
    name = f"ggn, {scale.fitted}" if operator == "ggn, fitted" else operator
    missing = (math.nan,) * len(result.calibration.kinds)
    return np.array({**result.calibration.predictions, **scale.predictions}.get(name, missing), dtype=float)


def group(kind: str) -> str:
    """Return the group of a kind of direction: the kind itself, "random" or "eigenvector"."""
    return kind if kind in _DIRECTION_KINDS else "random" if kind.startswith("random") else "eigenvector"


def styles(result: CalibrationResult) -> dict[str, Look]:
    """Return the looks of all operators compared, in the order of the legend."""
    found = {name for s in result.calibration.scales for name in s.agreement}
    ordered = [name for name in CALIBRATED_OPERATORS if name in found]
    return {name: look_of(name) for name in [*ordered, *sorted(found - set(CALIBRATED_OPERATORS))]}


def beyond(result: CalibrationResult) -> list[str]:
    """Return the operators whose median ratios all lie outside the range that is drawn."""
    ratios = {name: [s.agreement[name].ratio for s in result.calibration.scales] for name in styles(result)}
    return [name for name, found in ratios.items() if not any(LOWEST < r < HIGHEST for r in found)]


def draw_directions(ax: Axes, result: CalibrationResult, scale: Scale, operator: str) -> None:
    """Draw one marker per direction with the standard error of c, and write the measures of agreement.

    Args:
        ax: The panel of the operator.
        result: The calibration.
        scale: The measurement at one noise scale.
        operator: Name of the operator.
    """
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


def draw_correlations(ax: Axes, result: CalibrationResult, operators: Sequence[str]) -> None:
    """Draw the rank correlation of each operator with the truth, and its 95% interval, against the noise scale."""
    found = {name: [s.agreement[name] for s in _ascending(result)] for name in operators}
    ends = [e for values in found.values() for a in values for e in (a.correlation, *a.ci95)]
    correlation_axis(ax, ends)
    for name, x in _dodged(ax, result, operators).items():
        bars = [(clipped(a.ci95[0]), clipped(a.ci95[1])) for a in found[name]]
        _draw_path(ax, x, [clipped(a.correlation) for a in found[name]], bars, name)
    ax.set_ylabel("rank correlation")


def draw_ratios(ax: Axes, result: CalibrationResult, operators: Sequence[str]) -> None:
    """Draw the median ratio of true to predicted curvature, and its quartiles, against the noise scale."""
    found = {name: [s.agreement[name] for s in _ascending(result)] for name in operators}
    ratio_axis(ax, [e for values in found.values() for a in values for e in (a.ratio, *a.quartiles)])
    for name, x in _dodged(ax, result, operators).items():
        _draw_path(ax, x, [a.ratio for a in found[name]], [a.quartiles for a in found[name]], name)
    ax.set_ylabel("median of c / v′Av")


def draw_traces(ax: Axes, result: CalibrationResult, operators: Sequence[str]) -> None:
    """Draw the true trace with its standard error, and the traces of the operators, against the noise scale."""
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
    """Return the measurements in ascending order of the noise scale."""
    return sorted(result.calibration.scales, key=lambda s: s.scale)


def _draw_path(ax: Axes, x: Array, values: Sequence[float], bars: Sequence[tuple[float, float]], operator: str) -> None:
    """Draw the values of an operator as a line with markers and vertical bars."""
    colour, dashes = look_of(operator)
    low, high = np.array(bars).T
    ax.vlines(x, low, high, color=colour, linewidth=0.8)
    ax.plot(x, values, color=colour, linestyle=dashes, linewidth=0.8, marker="o", markersize=2.6, label=operator)


def _scale_axis(ax: Axes, result: CalibrationResult) -> Array:
    """Set the logarithmic x axis of noise scales and return the scales in ascending order."""
    x = np.array([s.scale for s in _ascending(result)])
    low, high = float(x[0]) / 1.5, float(x[-1]) * 1.5
    log_x_ticks(ax, low, high, x.tolist(), numbers(x.tolist()), 0.7 * PANEL)
    ax.set_xticks(x, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("noise scale s")
    despine(ax)
    return x


def _dodged(ax: Axes, result: CalibrationResult, operators: Sequence[str]) -> dict[str, Array]:
    """Set the x axis and return the positions of the operators' markers, which are side by side at each scale."""
    x = _scale_axis(ax, result)
    gap = float(np.diff(np.log(x)).min()) if len(x) > 1 else math.log(2)
    places = np.linspace(-0.25, 0.25, len(operators)) if len(operators) > 1 else np.zeros(len(operators))
    return {name: x * math.exp(gap * place) for name, place in zip(operators, places, strict=True)}


def _legend(result: CalibrationResult) -> list[Line2D | Patch]:
    """Compose the legend of the operators, the truth, the band and the kinds of directions."""
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
    """Count how the true loss curves along the most negative eigenvectors of the Hessian.

    Args:
        result: The calibration.
        scale: The measurement at one noise scale.

    Returns:
        The number of these eigenvectors with v'Hv < 0, and the numbers of those along which the true loss curves up
        and down by more than two standard errors.
    """
    at = np.array([kind == "hessian, most negative" for kind in result.calibration.kinds], dtype=bool)
    at &= predictions(result, scale, "hessian") < 0
    c, error = np.array(scale.curvature)[at], np.array(scale.stderr)[at]
    return int(at.sum()), int((c > 2 * error).sum()), int((c < -2 * error).sum())


def calibration_caption(result: CalibrationResult) -> str:
    """Compose the caption: what the panels show, what is not drawn, and the provenance."""
    scale, draws = middle(result), result.settings.get("draws")
    c, errors = np.array(scale.curvature), np.array(scale.stderr)
    panels = sum(name in scale.agreement for name in AGAINST)
    last, d, e, f = list(LETTERS[panels - 1 : panels + 3])
    text = f"(a–{last}) {len(c)} unit directions v. c: second difference of the mean true spiking loss under noise of "
    text += f"s\u00a0=\u00a0{scale.scale:g} times each filter’s rms, with a step that moves the outputs as far as the "
    text += f"noise does ({draws} draws; bars: standard error). " if draws else "noise does (bars: standard error). "
    text += f"The axes are linear within ±{curvature_axis(c, errors).linthresh:.1g}. "
    negative, up, down = turns(result, scale)
    if negative:
        text += f"The true loss curves up by more than two standard errors along {up} of the {negative} most negative "
        text += f"eigenvectors of the surrogate Hessian, and down along {down}. "
    text += f"({d}) Bars: 95% bootstrap intervals over directions. ({e}) Median and quartiles over the directions with "
    text += "positive c and v′Av"
    left = {name: len(c) - int(((predictions(result, scale, name) > 0) & (c > 0)).sum()) for name in styles(result)}
    left_out = [f"{name_of(name)} {n}" for name, n in left.items() if n]
    text += f"; left out of {len(c)}: {', '.join(left_out)}" if left_out else ""
    for name in beyond(result):
        found = [s.agreement[name].ratio for s in _ascending(result) if name in s.agreement]
        span = f"{min(found):.3g} to {max(found):.3g}" if np.isfinite(found).all() else "not positive"
        text += f"; {name_of(name)}, not drawn in ({e}, {f}): {span}"
    text += f". ({f}) D: diagonal matrix of each filter’s rms. Truth: from the change of the mean loss with s² (bars: "
    text += "standard error)."
    if any(s.fitted for s in result.calibration.scales):
        text += " Width fitted: at each s, the Gaussian surrogate whose median ratio is closest to 1."
    losses = ", ".join(f"{s.loss:.2g}" for s in _ascending(result))
    return f"{text} Mean loss at these s: {losses}. {caption(result)}"
