"""The section of spectra: figures of all networks, and for each network its numbers with meaning and error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from hessian_tools.plots.curves import Array, ValueAxis, density_curves, symlog_axis
from hessian_tools.results.operator_spectrum import Density, Eigenvalue, Functional, Spectrum
from hessian_tools.results.spectrum import SpectrumResult
from hessian_tools.results.spectrum_rows import layer_size
from ikun_hessian.reports.html.chart import COLOURS, SvgChart, chosen_axis, legend, panels
from ikun_hessian.reports.html.elements import (
    Html,
    details,
    html,
    html_table,
    interval,
    listed,
    number,
    percent,
    tag,
    value_with_error,
)
from ikun_hessian.reports.html.provenance import provenance_list

LEAST_DENSITY = 1e-5  # relative to the highest density in the panel; smaller ones are not drawn
NAMES = {"hessian": "Hessian", "ggn": "GGN", "fisher": "Fisher"}
ERRORS = (
    "The value after ± is the standard error over the data: how much the number would change with other samples of the "
    "same kind. “More than” means that only a lower limit is known, because a few samples carry the variance. None of "
    "these errors include the variation between training seeds."
)


def operator_title(key: str) -> str:
    """Return the name of an operator in a text."""
    return NAMES.get(key, key)


def spectrum_section(found: Sequence[tuple[str, SpectrumResult]]) -> Html:
    """Return figures and tables of several spectra.

    Args:
        found: Names and results.
    """
    shown = found[:COLOURS]
    parts: list[Html] = [legend([(name, i, "") for i, (name, _) in enumerate(shown)])] if len(found) > 1 else []
    operators = list(dict.fromkeys(op for _, r in shown for op in r.spectra))
    charts = [_ranks(op, shown) for op in operators]
    charts += [chart for op in operators if (chart := _density(op, shown))]
    parts += [panels(*charts)]
    note = (
        "Move the pointer over a figure, or touch it, to read the numbers of the nearest point. The density of the "
        "bulk leaves out the eigenvalues of the figure by rank."
    )
    if len(found) > len(shown):
        note += f" The figures show the first {len(shown)} of {len(found)} networks."
    parts += [tag("p", note, class_="note screen")]
    parts += [tag("p", ERRORS, class_="note")]
    return html(*parts, *(details(name, _numbers(r), opened=len(found) == 1) for name, r in found))


def _ranks(op: str, shown: Sequence[tuple[str, SpectrumResult]]) -> Html:
    """Return the panel of eigenvalues by rank: the largest from the left, the smallest at the right."""
    spectra = [(i, name, r, r.spectra[op]) for i, (name, r) in enumerate(shown) if op in r.spectra]
    tops = max(len(s.eigenvalues) for *_, s in spectra)
    lows = max(len(s.smallest_eigenvalues) for *_, s in spectra)
    places = [
        (i, name, _place(end, k, tops, lows), f"rank {k + 1}" if end else f"rank {k + 1} from below", e)
        for i, name, _, s in spectra
        for end, pairs in ((True, s.eigenvalues), (False, s.smallest_eigenvalues))
        for k, e in enumerate(pairs)
    ]
    y = chosen_axis([e.value for *_, e in places], [_bar(e) for *_, e in places])
    last = tops + (lows + 1 if lows else 0)
    ticks = [(float(k), str(k)) for k in sorted({1, tops // 2 + 1, tops})]
    ticks += [(float(_place(False, 0, tops, lows)), "min")] if lows else []
    chart = SvgChart(
        f"{operator_title(op)}: eigenvalues by rank",
        ValueAxis("linear", 0.5, last + 0.5),
        y,
        "rank",
        "eigenvalue",
        ticks,
    )
    chart.reference(0.0)
    offset = 0.5 / max(4, len(spectra))
    for i, _, x, _, e in places:
        at = x + offset * (i - (len(spectra) - 1) / 2)
        if _bar(e) > 0:
            chart.bar(
                at, e.value - _bar(e), e.value + _bar(e), i, "limit" if math.isfinite(e.data_stderr_least) else ""
            )
    for i, name, x, rank, e in places:
        at = x + offset * (i - (len(spectra) - 1) / 2)
        chart.point(at, e.value, i, _says(name, op, rank, e), "" if e.converged else "open")
    return chart.svg()


def _place(largest: bool, k: int, tops: int, lows: int) -> int:
    return k + 1 if largest else tops + lows + 1 - k


def _bar(e: Eigenvalue) -> float:
    """Return half the length of the error bar: the data error or its lower limit, at least the residual."""
    known = [x for x in (e.data_stderr, e.data_stderr_least, e.residual) if math.isfinite(x)]
    return max(known, default=0.0)


def _says(name: str, op: str, rank: str, e: Eigenvalue) -> str:
    """Return what the figure says about an eigenvalue."""
    lines = [f"{name}, {operator_title(op)}, {rank}", value_with_error(e.value, e.data_stderr, e.data_stderr_least)]
    lines.append(f"numerical error at most {number(e.residual, 2)}{'' if e.converged else ' (not converged)'}")
    if e.layers:
        layer, share = max(e.layers.items(), key=lambda item: item[1])
        lines.append(f"{share:.0%} of the eigenvector in {layer}")
    if math.isfinite(e.gradient):
        lines.append(f"{e.gradient:.1%} of the gradient along it")
    return "\n".join(lines)


def _density(op: str, shown: Sequence[tuple[str, SpectrumResult]]) -> Html | None:
    """Return the panel of spectral densities, None if there are none."""
    curves = []
    for i, (name, r) in enumerate(shown):
        density = r.spectra[op].density if op in r.spectra else None
        if density is None:
            continue
        axis = symlog_axis(replace(r, spectra={op: r.spectra[op]}))
        grid, probes = density_curves(density, axis)
        if len(grid):
            curves.append((i, name, axis, density, grid, probes.mean(0)))
    if not curves:
        return None
    highest = max(float(y.max()) for *_, y in curves)
    kept = [(i, name, axis, *_visible(op, density, x, y, highest)) for i, name, axis, density, x, y in curves]
    low, high = min(float(x.min()) for *_, x, _ in kept), max(float(x.max()) for *_, x, _ in kept)
    span = ValueAxis("symlog", low, high, min(axis.linthresh for _, _, axis, _, _ in kept))
    chart = SvgChart(
        f"{operator_title(op)}: spectral density of the bulk",
        span,
        chosen_axis(np.concatenate([y for *_, y in kept])),
        "eigenvalue",
        "density",
    )
    for i, name, _, x, y in kept:
        step = max(1, len(x) // 160)
        chart.line(x[::step].tolist(), y[::step].tolist(), i)
        for a, b in list(zip(x.tolist(), y.tolist(), strict=True))[:: max(1, len(x) // 24)]:
            chart.point(
                a, b, i, f"{name}, {operator_title(op)}\neigenvalue {number(a, 3)}\ndensity {number(b, 3)}", "hidden"
            )
    return chart.svg()


def _visible(op: str, density: Density, x: Array, y: Array, highest: float) -> tuple[Array, Array]:
    """Return the part of a density that is drawn: NaN where it is far below the highest one.

    The Gaussians that broaden the nodes reach below 0. An operator without negative eigenvalues has no density there.
    """
    nodes = np.concatenate([np.array(found) for found in density.nodes])
    definite = op in ("ggn", "fisher") and nodes.min() > -1e-5 * np.abs(nodes).max()
    shown = (y > highest * LEAST_DENSITY) & ((x >= 0) | (not definite))
    if not shown.any():
        return x, y
    inner = slice(int(shown.argmax()), len(x) - int(shown[::-1].argmax()))
    return x[inner], np.where(shown, y, np.nan)[inner]


def _numbers(r: SpectrumResult) -> Html:
    """Return the tables, warnings and provenance of one spectrum."""
    parts = [listed(r.warnings, "warnings") or tag("p", "No warnings.", class_="note")]
    head = ("quantity", *map(operator_title, r.spectra), "meaning")
    parts += [html_table(head, [(name, *cells, meaning) for name, cells, meaning in _quantities(r)], label="Numbers")]
    share = "" if math.isnan(r.accuracy) else f", accuracy {percent(r.accuracy)}"
    said = (
        f"At these weights: loss {number(r.loss, 6)}{share}; norm of the surrogate gradient {number(r.gradient_norm)}."
    )
    if rise := r.loss_rise:
        value = value_with_error(rise.estimate, rise.data_stderr, rise.data_stderr_least)
        said += (
            f" The loss itself, without a surrogate, rises by {value} if each weight is disturbed by {rise.radius:.0%} "
            f"of its magnitude (mean of {rise.draws} draws, which adds a standard error of {number(rise.stderr, 2)})."
        )
    if r.sensitivity:
        others = "; ".join(f"{name}: {_known(value)}" for name, value in r.sensitivity.items())
        said += f" λ max of the {operator_title(r.main[0])} under other conventions of the derivative: {others}."
    parts += [tag("p", said)]
    for op, s in r.spectra.items():
        parts += [details(f"Eigenvalues of the {operator_title(op)}", _eigenvalues(r, s))]
    if r.blocks:
        parts += [details(f"Layers: diagonal blocks of the {operator_title(r.main[0])}", _blocks(r))]
    rows = [
        (name, percent(_get(v, "firing_rate")), percent(_get(v, "dead")))
        for name, v in r.activity.items()
        if isinstance(v, dict)
    ]
    if rows:
        parts += [details("Firing of the neurons", html_table(("layer", "firing rate", "never fire"), rows))]
    return html(*parts, details("Provenance", provenance_list(r)))


def _get(values: dict[str, object], key: str) -> float:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _known(value: float) -> str:
    return "not converged" if math.isnan(value) else number(value)


def _quantities(r: SpectrumResult) -> Iterator[tuple[str, list[str], str]]:
    """Yield the quantities of a spectrum: name, value with error of each operator, and meaning."""
    rows: tuple[tuple[str, Callable[[Spectrum], str], str], ...] = (
        ("λ max", lambda s: _top(s.eigenvalues), "largest curvature along any direction of the weights"),
        (
            "λ min",
            lambda s: _top(s.smallest_eigenvalues),
            "smallest curvature; if it is negative, the surrogate loss curves down along its eigenvector",
        ),
        ("trace", _trace, f"sum of all {r.num_parameters:,} eigenvalues; in brackets 95% over the probes"),
        ("Frobenius norm", lambda s: number(s.frobenius_norm), "root of the sum of all squared eigenvalues"),
        (
            "scale-free λ max",
            lambda s: number(s.scale_free_lambda_max),
            "λ max with the weights in units of their filters’ norms: rescaling before a BatchNorm keeps it",
        ),
        (
            "negative share",
            lambda s: _functional(s.negative_share),
            "sum of |negative eigenvalues| / sum of |all eigenvalues|",
        ),
        (
            "effective dimension",
            lambda s: _functional(s.effective_dimension),
            "sum of λ / (λ + z): number of directions that the data determine",
        ),
        (
            "log det",
            lambda s: _functional(s.log_determinant),
            "log det(A + z I): volume of the minimum, as in Laplace’s approximation",
        ),
        (
            "missed eigenvalues",
            lambda s: number(s.search.excess, 2) if s.search else "–",
            "with 95% probability no eigenvalue lies further than this outside the range shown",
        ),
        (
            "symmetry error",
            lambda s: number(s.symmetry_error, 2),
            "relative asymmetry of the operator; about the round-off if the computation is correct",
        ),
    )
    for name, show, meaning in rows:
        cells = [show(s) for s in r.spectra.values()]
        if any(cell != "–" for cell in cells):
            yield name, cells, meaning


def _top(pairs: Sequence[Eigenvalue]) -> str:
    """Return the first eigenvalue with its error over the data; "–" if there is none."""
    if not pairs:
        return "–"
    e = pairs[0]
    return value_with_error(e.value, e.data_stderr, e.data_stderr_least) + ("" if e.converged else " (not converged)")


def _trace(s: Spectrum) -> str:
    t = s.trace
    if t is None:
        return "–"
    ends = f" {interval(t.ci95)}" if math.isfinite(t.ci95[0]) else ""
    return value_with_error(t.estimate, t.data_stderr, t.data_stderr_least) + ends


def _functional(f: Functional | None) -> str:
    if f is None:
        return "–"
    ends = f" {interval(f.ci95)}" if math.isfinite(f.ci95[0]) else ""
    return number(f.estimate) + ends + ("" if math.isnan(f.damping) else f" at z = {number(f.damping, 2)}")


def _value(e: Eigenvalue) -> tuple[str, str]:
    """Return the value of an eigenvalue, and its error over the data and in the computation."""
    data = value_with_error(0.0, e.data_stderr, e.data_stderr_least).removeprefix("0 ")
    error = "" if data == "0" else f"{data} (data); "
    return number(e.value, 5), f"{error}{number(e.residual, 1)} (numerical){'' if e.converged else ', not converged'}"


def _eigenvalues(r: SpectrumResult, s: Spectrum) -> Html:
    """Return the table of eigenvalues."""
    rows = []
    for pairs, start, step in ((s.eigenvalues, 1, 1), (s.smallest_eigenvalues, r.num_parameters, -1)):
        for i, e in enumerate(pairs):
            layer, share = max(e.layers.items(), key=lambda item: item[1]) if e.layers else ("–", math.nan)
            value, error = _value(e)
            rows.append(
                (
                    f"{start + step * i:,}",
                    value,
                    error,
                    percent(e.gradient),
                    f"{layer} {percent(share)}" if e.layers else "–",
                )
            )
    note = (
        "numerical: an exact eigenvalue lies within this distance. gradient: share of the squared norm of the gradient "
        "along the eigenvector. main layer: the layer with the largest share of the eigenvector."
    )
    return html(
        html_table(("rank", "eigenvalue", "error", "gradient", "main layer"), rows, wide=True),
        tag("p", note, class_="note"),
    )


def _blocks(r: SpectrumResult) -> Html:
    """Return the table of the diagonal blocks."""
    rows = []
    for name, s in r.blocks.items():
        size = layer_size(r, name)
        top, t = s.eigenvalues[0], s.trace
        trace = "–" if t is None else value_with_error(t.estimate, t.data_stderr, t.data_stderr_least)
        low = number(s.smallest_eigenvalues[0].value) if s.smallest_eigenvalues else "–"
        rows.append(
            (name, f"{size:,}", value_with_error(top.value, top.data_stderr, top.data_stderr_least), low, trace)
        )
    return html_table(("layer", "parameters", "λ max", "λ min", "trace"), rows, wide=True)
