"""Print a spectrum, or a comparison of several spectra, for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePath

from hessian_tools.analysis.ranking import told_apart
from hessian_tools.analysis.warnings import is_spiking, percent_of
from hessian_tools.linalg.trace import LEAST_FORMS
from hessian_tools.results.comparability import by_method, common_operators, method_of
from hessian_tools.results.operator_spectrum import Eigenvalue, Functional, Trace
from hessian_tools.results.spectrum import SpectrumResult
from hessian_tools.results.spectrum_rows import layer_size
from hessian_tools.results.text import with_error
from ikun_hessian.reports.header import not_learned, opened
from ikun_hessian.reports.text import field, paragraph, shortened, warning

DEFINITE = ("ggn", "fisher")  # operators without negative eigenvalues, for a convex loss


def spectrum_lines(result: SpectrumResult) -> list[str]:
    """Return the lines that `spectrum` and `info` print for a result."""
    sections = (
        opened,
        _state,
        _minimum,
        _table,
        _search,
        _blocks,
        _steps,
        _diagonals,
        _traces,
        _functionals,
        _scales,
        _warnings,
        _cost,
    )
    lines = [line for section in sections if (part := section(result)) for line in [*part, ""]][:-1]
    return [*not_learned(result), *lines]


def _state(r: SpectrumResult) -> list[str]:
    """Return the loss, the firing rates and the norm of the gradient."""
    name, spectrum = r.main
    accuracy = "" if math.isnan(r.accuracy) else f", accuracy {r.accuracy:.2%}"
    lines = field("loss", f"{r.loss:.6g}{accuracy}")
    if r.activity:
        rates = ", ".join(f"{k} {v['firing_rate']:.3f} ({v['dead']:.0%} dead)" for k, v in r.activity.items())
        lines += field("firing", rates)
    lines += field(
        "gradient", f"norm {r.gradient_norm:.4g}; symmetry error of the {name} {spectrum.symmetry_error:.1e}"
    )
    return lines


def _minimum(r: SpectrumResult) -> list[str]:
    """Say whether the weights can be at a minimum of the surrogate loss."""
    name, s = r.main
    blind = f"unknown: the {name} cannot be negative for a convex loss (use operator hessian)"
    if not s.smallest_eigenvalues and name in DEFINITE:
        return field("minimum?", blind)
    if not s.smallest_eigenvalues:
        return field("minimum?", "unknown: the smallest eigenvalues were not computed (use --smallest)")
    top, low = s.eigenvalues[0], s.smallest_eigenvalues[0]
    if top.value == 0 == low.value:
        verdict = f"unknown: the {name} is zero"
    elif low.value < -low.residual and not (low.converged is False and abs(low.value) < low.residual):
        verdict = f"no: lambda_min of the {name} is {low.value:.4g} and lambda_max is {top.value:.4g}"
        if top.value > 0:
            verdict += f" (|lambda_min| is {-low.value / top.value:.1%} of lambda_max)"
    elif name in DEFINITE:
        verdict = blind
    else:
        verdict = f"yes, within the numerical error: lambda_min = {low.value:.3g} +- {low.residual:.1g} is not negative"
    return field("minimum?", verdict)


def _rows(pairs: tuple[Eigenvalue, ...], start: int, step: int, width: int) -> Iterator[str]:
    """Yield a row for each eigenvalue, with ranks from `start` in steps of `step`."""
    for i, p in enumerate(pairs):
        layer, share = max(p.layers.items(), key=lambda item: item[1]) if p.layers else ("-", math.nan)
        yield (
            f"{start + step * i:>{width}} {p.value:>11.5g} {p.residual:>8.1e} {_error(p):>10} "
            f"{'yes' if p.converged else 'NO':>9} {_percent(p.gradient):>8}  {shortened(layer, 22 - width)} {share:.0%}"
        )


def _table(r: SpectrumResult) -> list[str]:
    """Return the tables of eigenvalues, one for each operator, and their legend."""
    lines: list[str] = []
    width = max(5, len(str(r.num_parameters)))
    for name, s in r.spectra.items():
        lines += ["", f"{name}: eigenvalues, largest first"] if lines else [f"{name}: eigenvalues, largest first"]
        head = f"{'rank':>{width}} {'value':>11} {'residual':>8} {'data error':>10} {'converged':>9} {'gradient':>8}"
        lines += [f"{head}  main layer"]
        lines += _rows(s.eigenvalues, 1, 1, width)
        if s.smallest_eigenvalues:
            lines += ["  ..."]
            lines += _rows(s.smallest_eigenvalues, r.num_parameters, -1, width)
    legend = (
        "data error: standard error over the data; > if only a lower limit is known, because a few samples carry it. "
        "gradient: squared cosine between the gradient and the eigenvector. "
        "main layer: the layer with the largest share of the eigenvector."
    )
    return [*lines, *paragraph(legend)]


def _search(r: SpectrumResult) -> list[str]:
    """Say whether larger eigenvalues may be missing, how accurate the density is, and where the gradient points."""
    lines = []
    for name, s in r.spectra.items():
        if s.search is not None and math.isfinite(s.search.excess):
            others = "another start" if s.search.starts == 1 else f"{s.search.starts} other starts"
            text = (
                f"{name}: with 95% probability, no eigenvalue is more than {s.search.excess:.2g} outside the "
                f"printed range ({s.search.steps} steps from a random start)"
            )
            if math.isfinite(s.search.largest):
                text += (
                    f"; orthogonal to the converged eigenvectors, {others} found {s.search.smallest:.3g} to "
                    f"{s.search.largest:.3g}"
                )
            lines += field("missed?", text)
    for name, s in r.spectra.items():
        if s.density is not None:
            d = s.density
            if s.trace is not None and not s.trace.probes:
                lines += field("density", f"{name}: all {d.steps} eigenvalues that are not zero, without probes")
                continue
            text = (
                f"{name}: {d.probes} probes with at most {d.steps} steps. The Wasserstein distance to the density "
                f"from half of the steps is {d.accuracy:.1g} of the range"
            )
            lines += field("density", text)
    name, s = r.main
    if math.isfinite(s.gradient_share):
        text = f"{_percent(s.gradient_share)} of its squared norm is in the span of the converged {name} eigenvectors"
        lines += field("gradient", f"{text} of rank 1 to {len(s.eigenvalues)} (column gradient: along each of them)")
    return lines


def _blocks(r: SpectrumResult) -> list[str]:
    """Return the table of the diagonal blocks, one row for each layer."""
    if not r.blocks:
        return []
    lines = [f"{r.main[0]}: diagonal block of each layer"]
    lines.append(f"{'layer':<14} {'P':>9} {'lambda_max':>19} {'lambda_min':>10} {'trace':>21}")
    for name, s in r.blocks.items():
        size = layer_size(r, name)
        top = with_error(s.eigenvalues[0].value, s.eigenvalues[0])
        low = f"{s.smallest_eigenvalues[0].value:.3g}" if s.smallest_eigenvalues else "-"
        trace = with_error(s.trace.estimate, s.trace) if s.trace else "-"
        lines.append(f"{shortened(name, 14):<14} {size:>9,} {top:>19} {low:>10} {trace:>21}")
    return lines


def _steps(r: SpectrumResult) -> list[str]:
    """Return the table of the GGN of the loss at each time step."""
    if not r.steps:
        return []
    lines = [f"{'step':<9}{'trace':>11}  {'95% interval (probes)':<24}{'data error':>11}  {'loss':>9}"]
    for s in r.steps:
        interval = _interval(s.trace.ci95)
        lines.append(f"{s.step:<9}{s.trace.estimate:>11.5g}  {interval:<24}{_error(s.trace):>11}  {s.loss:>9.4g}")
    return [*lines, "trace of the GGN of the loss of the outputs of one step"]


def _diagonals(r: SpectrumResult) -> list[str]:
    """Say how the diagonals were computed."""
    found = {name: s.diagonal for name, s in r.spectra.items() if s.diagonal}
    how = (f"{name}: {f'from {d.products} probes' if d.method == 'probes' else 'exact'}" for name, d in found.items())
    return field("diagonals", f"{'; '.join(how)} (in the .npz file)") if found else []


def _traces(r: SpectrumResult) -> list[str]:
    """Return the table of traces and the difference between the Hessian and the GGN."""
    lines = [f"{'':<9}{'trace':>11}  {'95% interval (probes)':<24}{'data error':>11}  {'trace/P':>9}  {'Frobenius':>9}"]
    for name, s in r.spectra.items():
        if s.trace is not None:
            t = s.trace
            interval = _interval(t.ci95) if t.probes else "exact"
            lines.append(
                f"{name:<9}{t.estimate:>11.5g}  {interval:<24}{_error(t):>11}  "
                f"{t.estimate / r.num_parameters:>9.2e}  {s.frobenius_norm:>9.4g}"
            )
    if any(s.trace is not None and math.isnan(s.trace.ci95[0]) for s in r.spectra.values()):
        lines.append(_FEW)
    traces: dict[str, Trace] = {k: s.trace for k, s in r.spectra.items() if s.trace is not None}
    if {"hessian", "ggn"} <= set(traces) and traces["ggn"].estimate:
        h, g = traces["hessian"].estimate, traces["ggn"].estimate
        lines += [""]
        lines += paragraph(
            f"tr(H - GGN) is {h - g:.4g}, {percent_of(h - g, g)} of tr GGN in size. It comes from the second "
            f"derivatives of the outputs{_SPIKING if is_spiking(r) else _SMOOTH}"
        )
    return lines


_FEW = f"-: fewer than {LEAST_FORMS} probes give no 95% interval"
_GGN = (
    " The GGN leaves them out and keeps only the curvature of the loss in the outputs; it has no negative eigenvalues "
    "if the loss is convex in the outputs."
)
_SPIKING = (
    f": from f'' of the surrogate and, unless detached, from the reset.{_GGN} Neither operator is the curvature of "
    "the spiking loss itself, which is piecewise constant."
)
_SMOOTH = f".{_GGN}"


def _functionals(r: SpectrumResult) -> list[str]:
    """Return the table of functions of the spectrum."""
    rows = []
    found: list[tuple[str, Functional | None]] = []
    for name, s in r.spectra.items():
        z = s.effective_dimension.damping if s.effective_dimension else math.nan
        kinds = (
            ("sum |negative| / sum |all|", s.negative_share),
            (f"effective dimension, z={z:.3g}", s.effective_dimension),
            (f"log det(A + z I), z={z:.3g}", s.log_determinant),
        )
        found += kinds
        for label, f in kinds:
            if f is not None:
                interval = _interval(f.ci95) if f.probes else "exact"
                rows.append(f"{name:<9}{label:<31}{f.estimate:>9.5g}  {interval:<22} {f.quadrature_error:.0e}")
    legend = "error: change of the Lanczos quadrature from half of the steps to all of them"
    few = any(f is not None and math.isnan(f.ci95[0]) for *_, f in found)
    notes = [legend, _FEW] if few else [legend]
    return [f"{'':<51}{'95% interval (probes)':<22} error", *rows, *notes] if rows else []


def _scales(r: SpectrumResult) -> list[str]:
    """Return the scale-free eigenvalues and the sensitivity of lambda_max to the surrogate."""
    lines = []
    for name, s in r.spectra.items():
        lines += field(
            "scale-free",
            f"{name} lambda_max {_number(s.scale_free_lambda_max)} (weights in units of filter norm)",
        )
        if s.scale_free:
            lines += field("", f"largest {len(s.scale_free)}: {', '.join(map(_number, s.scale_free))}")
    if r.sensitivity:
        top = r.main[1].eigenvalues[0].value
        text = ", ".join(f"{k}: {_number(v)}" for k, v in r.sensitivity.items())
        lines += field("sensitivity", f"{r.main[0]} lambda_max {top:.4g} becomes {text}")
    return lines


def _warnings(r: SpectrumResult) -> list[str]:
    """Return the warnings."""
    return [line for text in r.warnings for line in warning(text)] or ["no warnings"]


def _cost(r: SpectrumResult) -> list[str]:
    """Return the number of products and the time."""
    products = sum(s.hessian_vector_products for s in r.spectra.values())
    return field("cost", f"{products} products with the operators, {r.seconds:.1f} s")


def compare_lines(labelled: list[tuple[str, SpectrumResult]]) -> list[str]:
    """Return the lines that `compare` prints for several spectra.

    Args:
        labelled: Labels and results.

    Returns:
        What tells the networks apart, a table of losses, a table of lambda_max, lambda_min and trace for each common
        operator, and, if one checkpoint was analysed with two methods, their eigenvalues side by side.
    """
    width = min(16, max(len(label) for label, _ in labelled))
    lines = [line for label, r in labelled if (said := not_learned(r)) for line in (f"{label}:", *said)]
    pairs = by_method(labelled)
    if not pairs:
        lines += [*_apart(labelled), ""]
    lines += [f"{'':<{width}} {'loss':>9} {'accuracy':>8} {'weight norm':>11}"]
    for label, r in labelled:
        norm = math.sqrt(sum(v**2 for v in r.weight_norms.values()))
        accuracy = "-" if math.isnan(r.accuracy) else f"{r.accuracy:.1%}"
        lines.append(f"{shortened(label, width):<{width}} {r.loss:>9.4g} {accuracy:>8} {norm:>11.3g}")
    common = common_operators(labelled)
    for kind in common:
        lines += ["", kind]
        lines.append(f"{'':<{width}} {'lambda_max':>19} {'scale-free':>10} {'lambda_min':>10} {'trace':>21}")
        for label, r in labelled:
            s = r.spectra[kind]
            low = f"{s.smallest_eigenvalues[0].value:.3g}" if s.smallest_eigenvalues else "-"
            trace = with_error(s.trace.estimate, s.trace) if s.trace else "-"
            top = with_error(s.eigenvalues[0].value, s.eigenvalues[0])
            lines.append(
                f"{shortened(label, width):<{width}} {top:>19} {s.scale_free_lambda_max:>10.3g} {low:>10} {trace:>21}"
            )
    if rest := [f"{kind} ({label})" for label, r in labelled for kind in r.spectra if kind not in common]:
        lines += ["", *paragraph(f"left out because not all results have it: {', '.join(rest)}")]
    for ours, theirs in pairs:
        lines += _two_methods(ours, theirs, common)
    if pairs:
        lines += ["", *paragraph(_METHODS)]
    return [*lines, "", *paragraph(_ERRORS)]


def _apart(labelled: list[tuple[str, SpectrumResult]]) -> list[str]:
    """Return the lines that say which numbers tell the networks apart."""
    found = told_apart(labelled)
    lines = [line for text in found.told for line in field("told apart", text)]
    if found.close:
        lines += field("not apart", f"{', '.join(found.close)}: the difference is at most twice its error")
    if found.unknown:
        lines += field(
            "unknown", f"{', '.join(found.unknown)}: a few samples carry the error, which is known only from below"
        )
    if any(r.network.get("norm") not in (None, "none") for _, r in labelled):
        lines += field("BatchNorm", "lambda_max and trace depend on the scale of the weights: look at scale-free too")
    return lines


_ERRORS = (
    "+-: one standard error over the data for these weights, (>): at least that, because a few samples carry it. It "
    "does not include the variation between seeds. "
    "scale-free: with the weights in units of their filter norm; use it if the weights are followed by a BatchNorm."
)
_METHODS = (
    "An exact eigenvalue lies within the residual of each value, but not always the one of that rank: a method that "
    "misses an eigenvalue shifts all later ranks. Trust the smaller residual. products: all products with the operator."
)


def _two_methods(ours: SpectrumResult, theirs: SpectrumResult, kinds: list[str]) -> list[str]:
    """Return the eigenvalues that two methods found for one checkpoint, rank by rank."""
    lines = []
    name, first, second = PurePath(str(ours.checkpoint.get("path", "result"))).name, method_of(ours), method_of(theirs)
    for kind in kinds:
        a, b = ours.spectra[kind], theirs.spectra[kind]
        lines += ["", *paragraph(f"{name}, {kind}: {second} compared to {first}")]
        lines += [f"{'rank':>9} {first:>13} {'residual':>9} {second:>13} {'residual':>9} {'converged':>10}"]
        last = ours.num_parameters
        for mine, other, start, step in (
            (a.eigenvalues, b.eigenvalues, 1, 1),
            (a.smallest_eigenvalues, b.smallest_eigenvalues, last, -1),
        ):
            for i, e in enumerate(other):
                left = f"{mine[i].value:>13.5g} {mine[i].residual:>9.1e}" if i < len(mine) else f"{'-':>13} {'-':>9}"
                right = f"{e.value:>13.5g} {e.residual:>9.1e} {'yes' if e.converged else 'NO':>10}"
                lines.append(f"{start + step * i:>9} {left} {right}")
        lines.append(f"{'products':>9} {a.hessian_vector_products:>13} {'':>9} {b.hessian_vector_products:>13}")
    return lines


def _number(value: float) -> str:
    """Format an eigenvalue that may not have converged."""
    return "not converged" if math.isnan(value) else f"{value:.4g}"


def _interval(ci95: tuple[float, float]) -> str:
    """Format an interval, "-" if there is none."""
    return "-" if math.isnan(ci95[0]) else f"[{ci95[0]:.5g}, {ci95[1]:.5g}]"


def _error(e: Eigenvalue | Trace) -> str:
    """Format the standard error over the data, its lower limit as "> x", or "-" if it is unknown."""
    if not math.isnan(e.data_stderr_least):
        return f"> {e.data_stderr_least:.2g}"
    return "-" if math.isnan(e.data_stderr) else f"{e.data_stderr:.2g}"


def _percent(value: float) -> str:
    """Format a fraction in percent, "-" if it is unknown."""
    return "-" if math.isnan(value) else f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}"
