"""Draw publication figures of spectra from saved results.

The figures are two columns wide and their text is at least 7 pt. No model is needed, pyplot's global state is not used,
and the user's matplotlib settings are ignored: the same result gives the same figure and the same bytes. All limits,
thresholds and floors are relative to the data, so multiplying all eigenvalues by a constant only changes tick labels.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hessian_tools.plots.captions import (
    caption,
    samples_caption,
    samples_legend,
    spectrum_caption,
    spectrum_legend,
    trajectory_caption,
    trajectory_legend,
)
from hessian_tools.plots.curves import densities_of, finite, symlog_axis
from hessian_tools.plots.line_panels import column, draw_eigenvalue_paths, draw_paths, draw_resamples, name_ends
from hessian_tools.plots.spectrum_panels import draw_cdf, draw_density, draw_layers, draw_ranks, has_data_error, marks
from hessian_tools.plots.style import (
    WIDTH,
    Look,
    add_caption,
    add_legend,
    layout,
    looks,
    operator_name,
    printable,
    set_title,
    settled,
    shades,
    share_log_range,
    styled,
)
from hessian_tools.results.comparability import common_operators
from hessian_tools.results.spectrum import SpectrumResult
from hessian_tools.results.spectrum_rows import layer_size
from hessian_tools.results.trajectory import RANKS, snapshots, stability_limit, trace_error, trajectory_rows


def spectrum_figure(result: SpectrumResult, captioned: bool = True) -> Figure:
    """Draw the spectrum of one checkpoint.

    The panels show (a) the density of the bulk, (b) the cumulative distribution, (c) |eigenvalue| against rank and (d)
    the share of each layer in the eigenvectors.

    The density in (a) is per unit of lambda and integrates to the weight of the bulk. Every quadrature node becomes a
    Gaussian in u = asinh(lambda / linthresh), a smooth form of the symlog axis, with sigma = (range of the nodes in u)
    / steps, multiplied by du/dlambda. If the nodes are further apart than sigma, the Gaussian is in lambda and as wide
    as their spacing. Deflated eigenvalues are not part of the density; they are ticks in the strip above it. The grey
    area is below the density of a single eigenvalue.

    Without a density, only (c) and (d) are drawn, as (a) and (b).

    Args:
        result: The spectrum.
        captioned: Whether to add a caption with the provenance.

    Returns:
        The figure. Without a density it has no panels (a) and (b), and the others get these letters.
    """
    with styled():
        dense = bool(densities_of(result))
        figure = Figure(figsize=(WIDTH, 5.2 if dense else 2.9), layout=layout())
        styles = dict(zip(result.spectra, looks(len(result.spectra)), strict=True))
        panels = list(figure.subplots(2 if dense else 1, 2, squeeze=False).flat)
        axis = symlog_axis(result)
        titles = ["ends of the spectrum", f"layers of the {operator_name(result.main[0])} eigenvectors"]
        titles = ["bulk spectral density", "cumulative distribution", *titles] if dense else titles
        for ax, letter, title in zip(panels, "abcd", titles, strict=False):
            set_title(ax, letter, title)
        if dense:
            draw_density(panels[0], result, styles, axis)
            draw_cdf(panels[1], result, styles, axis)
        draw_ranks(panels[-2], [(s, styles[name]) for name, s in result.spectra.items()])
        draw_layers(panels[-1], result.main[1])
        add_legend(figure, spectrum_legend(result, styles))
        if captioned:
            add_caption(figure, spectrum_caption(result, axis))
        return settled(figure)


def layers_figure(result: SpectrumResult, captioned: bool = True) -> Figure:
    """Draw the bulk density of the diagonal block of each layer, all on the same eigenvalue axis.

    Args:
        result: A spectrum with diagonal blocks.
        captioned: Whether to add a caption with the provenance.

    Returns:
        The figure.

    Raises:
        ValueError: If the result has no diagonal blocks.
    """
    if not result.blocks:
        raise ValueError("the result has no diagonal blocks to draw")
    columns = min(3, len(result.blocks))
    rows = -(-len(result.blocks) // columns)
    with styled():
        figure = Figure(figsize=(WIDTH, 1.1 + 1.7 * rows), layout=layout())
        panels = figure.subplots(rows, columns, squeeze=False).flat
        axis = symlog_axis(replace(result, spectra=result.blocks))
        (style, *_) = looks(1)
        # the blocks come first, so that zip does not consume an unused panel at the end
        for (name, block), ax in zip(result.blocks.items(), panels, strict=False):
            ax.set_title(printable(name, 24))
            size = layer_size(result, name)
            draw_density(ax, replace(result, spectra={name: block}, num_parameters=size), {name: style}, axis)
            if not ax.get_subplotspec().is_first_col():
                ax.set_ylabel("")
        drawn = figure.axes[: len(result.blocks)]
        share_log_range([ax for ax in drawn if ax.get_yscale() == "log"])
        for ax in list(panels):
            ax.axis("off")
        text = f"Diagonal block of the {operator_name(result.main[0])} for each layer. Ticks: deflated eigenvalues. "
        text += f"Grey: less than one eigenvalue. {caption(result)}"
        if captioned:
            add_caption(figure, text)
        return settled(figure)


def rank_figure(results: list[tuple[str, SpectrumResult]]) -> Figure:
    """Draw |eigenvalue| against rank for several results, in one panel for each operator that all results have.

    Args:
        results: Labels and results.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no result, or if the results have no operator in common.
    """
    if not results:
        raise ValueError("no result to draw")
    common = common_operators(results)
    if not common:
        raise ValueError("the results have no operator in common: compute all spectra with the same operator")
    rows = -(-len(common) // 2)
    with styled():
        figure = Figure(figsize=(WIDTH, 0.5 + 2.4 * rows), layout=layout())
        styles = looks(len(results))
        axes = list(figure.subplots(rows, min(2, len(common)), squeeze=False).flat)
        for ax, letter, name in zip(axes, "abcdefgh", common, strict=False):
            set_title(ax, letter, operator_name(name))
            draw_ranks(ax, [(r.spectra[name], look) for (_, r), look in zip(results, styles, strict=True)])
        share_log_range(axes[: len(common)])
        for ax in axes[len(common) :]:
            ax.remove()
        lines: list[Line2D | Patch] = [
            Line2D([], [], color=colour, linestyle=dashes, label=printable(label, 26))
            for (label, _), (colour, dashes) in zip(results, styles, strict=True)
        ]
        everything = [r.spectra[name] for name in common for _, r in results]
        bar = Line2D([], [], color="0.2", marker="|", markersize=6, linestyle="none", label="standard error (data)")
        known = any(has_data_error(e) for s in everything for e in (*s.eigenvalues, *s.smallest_eigenvalues))
        add_legend(figure, [*lines, *marks(everything), *([bar] if known else [])])
        return settled(figure)


def trajectory_figure(results: list[SpectrumResult], captioned: bool = True) -> Figure:
    """Draw the spectra of snapshots of one training run against the epoch.

    The panels show (a) the largest eigenvalues and the smallest eigenvalue of the first operator and the GGN, with the
    stability limit of SGD, (b) the traces, and, as far as they are known, E[f'^2] of each layer, the loss and the
    accuracy. `hessian_tools.results.trajectory.trajectory_rows` returns the numbers drawn.

    Args:
        results: Results of two or more snapshots, in any order, or in the order of training if they record no epoch.
        captioned: Whether to add a caption with the provenance.

    Returns:
        The figure.

    Raises:
        ValueError: If the results are not two or more snapshots of one run at different epochs. The message says what
            differs.
    """
    rows, ordered = trajectory_rows(results), snapshots(results)
    operators = common_operators([("", r) for r in ordered])
    layers = [key for key in rows[0] if key.endswith(".derivative_square")]
    accurate = bool(np.isfinite(column(rows, "accuracy")).any())
    limit = stability_limit(ordered[0].training)
    dark: Look = ((0.2, 0.2, 0.2), "-")
    with styled():
        figure = Figure(figsize=(WIDTH, 5.2), layout=layout())
        styles = dict(zip(operators, looks(len(operators)), strict=True))
        traces = {f"{name}.trace": look for name, look in styles.items()}
        ends = {name: look for name, look in styles.items() if name in (operators[0], "ggn")}
        grid = figure.add_gridspec(2, 2)
        lower = [grid[1, 0], grid[1, 1]] if layers or accurate else [grid[1, :]]
        if layers and accurate:
            stacked = lower.pop().subgridspec(2, 1)
            lower += [stacked[0, 0], stacked[1, 0]]
        cells = iter([grid[0, 0], grid[0, 1], *lower])
        letters = iter("abcde")

        def panel(title: str) -> Axes:
            """Add the next panel."""
            ax = figure.add_subplot(next(cells))
            set_title(ax, next(letters), title)
            return ax

        first, limited = draw_eigenvalue_paths(panel("ends of the spectrum"), rows, ends, limit)
        axes = [first, draw_paths(panel("trace"), rows, traces, "trace", errors=".stderr")]
        if layers:
            ax = panel("surrogate derivative")
            draw_paths(ax, rows, dict(zip(layers, shades(len(layers)), strict=True)), "E[f′(h)²]")
            name_ends(ax, {key: printable(key.removesuffix(".derivative_square"), 14) for key in layers}, 1.6 * 72)
        height = (0.7 if layers and accurate else 1.6) * 72
        draw_paths(panel("loss"), rows, {"loss": dark}, "loss", height=height)
        if accurate:
            draw_paths(panel("accuracy"), rows, {"accuracy": dark}, "accuracy", linear=True, height=height)
        if layers and accurate:
            *_, above, below = figure.axes
            above.set_xlabel("")
            above.tick_params(labelbottom=False)
            for ax in (above, below):
                ax.set_ylabel("")
        add_legend(figure, trajectory_legend(ordered, ends, styles, limited))
        if captioned:
            add_caption(figure, trajectory_caption(ordered, axes, limit, limited))
        return settled(figure)


def samples_figure(result: SpectrumResult, captioned: bool = True) -> Figure:
    """Draw how the curvature depends on the number of samples on which it is measured.

    The panels show (a) the largest eigenvalues and (b) the trace of the first operator on random subsets of the data,
    and their values on all samples with the standard error.

    Args:
        result: A spectrum with a curve over the number of samples.
        captioned: Whether to add a caption with the provenance.

    Returns:
        The figure.

    Raises:
        ValueError: If the result has no such curve.
    """
    curve = sorted(result.samples_curve, key=lambda point: point.samples)
    if not curve:
        raise ValueError("the result has no curve over the number of samples: set samples_curve in the settings")
    name, spectrum = result.main
    count = max((len(values) for point in curve for values in point.eigenvalues), default=0)
    ranks = [
        [finite(values[rank] for values in point.eigenvalues if len(values) > rank) for point in curve]
        for rank in range(min(RANKS, count))
    ]
    samples = int(result.data.get("samples") or 0)
    top = spectrum.eigenvalues[0] if spectrum.eigenvalues else None
    largest = (top.value, top.data_stderr) if top else (math.nan, math.nan)
    trace = (spectrum.trace.estimate, trace_error(spectrum.trace)) if spectrum.trace else (math.nan, math.nan)
    colours = (looks(10)[0][0], looks(10)[9][0])  # blue and sky blue
    with styled():
        figure = Figure(figsize=(WIDTH, 3.1), layout=layout())
        a, b = figure.subplots(1, 2)
        set_title(a, "a", f"largest eigenvalues of the {operator_name(name)}")
        set_title(b, "b", f"trace of the {operator_name(name)}")
        axes = [draw_resamples(a, curve, ranks, (*largest, samples), colours, "eigenvalue λ")]
        axes += [draw_resamples(b, curve, [[finite(p.traces) for p in curve]], (*trace, samples), colours, "trace")]
        add_legend(figure, samples_legend(curve, len(ranks), samples, colours))
        if captioned:
            add_caption(figure, samples_caption(result, curve, ranks, largest[0], axes))
        return settled(figure)
