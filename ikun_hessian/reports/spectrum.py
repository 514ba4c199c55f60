"""What the terminal shows of a spectrum: 80 columns, from the saved result alone, and the warnings that it earns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from pathlib import PurePath

from hessian_tools.analysis.warnings import _ratio, _spiking
from hessian_tools.results.comparability import by_method, common_operators, method_of
from hessian_tools.results.spectrum import Eigenvalue, SpectrumResult, Trace
from ikun_hessian.reports.header import SCREEN_WIDTH, field, opened


def spectrum_lines(result: SpectrumResult) -> list[str]:
    """The whole screen."""
    sections = (opened, _state, _minimum, _table, _search, _blocks, _traces, _functionals, _scales, _cautions, _cost)
    return [line for section in sections if (lines := section(result)) for line in [*lines, ""]][:-1]


def _state(r: SpectrumResult) -> list[str]:
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
    """Whether this is a minimum of the surrogate loss at all."""
    name, s = r.main
    if not s.smallest_eigenvalues:
        return field("minimum?", "the smallest eigenvalues were not computed (--smallest)")
    top, low = s.eigenvalues[0], s.smallest_eigenvalues[0]
    if low.value < -low.residual and not (low.converged is False and abs(low.value) < low.residual):
        verdict = f"no: the {name} has lambda_min = {low.value:.4g} against lambda_max = {top.value:.4g}"
        if top.value > 0:
            verdict += f" ({-low.value / top.value:.1%} of it)"
    else:
        verdict = f"yes, to this accuracy: lambda_min = {low.value:.3g} +- {low.residual:.1g} is not negative"
    return field("minimum?", verdict)


def _rows(pairs: tuple[Eigenvalue, ...], start: int, step: int, width: int) -> Iterator[str]:
    for i, p in enumerate(pairs):
        layer, share = max(p.layers.items(), key=lambda item: item[1]) if p.layers else ("-", math.nan)
        yield (
            f"{start + step * i:>{width}} {p.value:>12.5g} {p.residual:>9.1e} {_error(p.data_stderr):>11} "
            f"{'yes' if p.converged else 'NO':>4} {_percent(p.gradient):>5}  {_short(layer, 26 - width)} {share:.0%}"
        )


def _table(r: SpectrumResult) -> list[str]:
    lines: list[str] = []
    width = max(5, len(str(r.num_parameters)))
    for name, s in r.spectra.items():
        lines += ["", f"{name}: eigenvalues, largest first"] if lines else [f"{name}: eigenvalues, largest first"]
        head = (
            f"{'rank':>{width}} {'value':>12} {'residual':>9} {'data stderr':>11} {'conv':>4} {'grad':>5}  main layer"
        )
        lines += [head]
        lines += _rows(s.eigenvalues, 1, 1, width)
        if s.smallest_eigenvalues:
            lines += ["  ..."]
            lines += _rows(s.smallest_eigenvalues, r.num_parameters, -1, width)
    return lines


def _search(r: SpectrumResult) -> list[str]:
    """How sure it is that nothing beyond the printed ends was missed, and where the gradient points."""
    lines = []
    for name, s in r.spectra.items():
        if s.search is not None and math.isfinite(s.search.excess):
            others = "another start" if s.search.starts == 1 else f"{s.search.starts} other starts"
            text = (
                f"{name}: with 95% probability nothing lies more than {s.search.excess:.2g} beyond the outermost "
                f"values ({s.search.steps} steps from a random start)"
            )
            if math.isfinite(s.search.largest):
                text += (
                    f"; outside the converged pairs {others} found {s.search.smallest:.3g} to {s.search.largest:.3g}"
                )
            lines += field("missed?", text)
    for name, s in r.spectra.items():
        if s.density is not None:
            d = s.density
            text = (
                f"{name}: {d.probes} probes of at most {d.steps} steps; all the steps moved it by {d.accuracy:.1g} of"
            )
            lines += field("density", f"{text} the range from half of them (Wasserstein distance)")
    name, s = r.main
    if math.isfinite(s.gradient_share):
        text = f"{_percent(s.gradient_share)} of the gradient's squared norm lies along the converged {name}"
        lines += field("grad", f"{text} eigenvectors of rank 1 to {len(s.eigenvalues)} (column grad: along each)")
    return lines


def _blocks(r: SpectrumResult) -> list[str]:
    """The diagonal blocks, a row a layer."""
    if not r.blocks:
        return []
    lines = [f"{r.main[0]}: each layer's diagonal block"]
    lines.append(f"{'layer':<14} {'P':>9} {'lambda_max':>19} {'lambda_min':>10} {'trace':>21}")
    for name, s in r.blocks.items():
        size = sum(n for parameter, n in r.parameters.items() if parameter.rpartition(".")[0] in (name, ""))
        top = _with_error(s.eigenvalues[0].value, s.eigenvalues[0].data_stderr)
        low = f"{s.smallest_eigenvalues[0].value:.3g}" if s.smallest_eigenvalues else "-"
        trace = _with_error(s.trace.estimate, s.trace.data_stderr) if s.trace else "-"
        lines.append(f"{_short(name, 14):<14} {size:>9,} {top:>19} {low:>10} {trace:>21}")
    return lines


def _traces(r: SpectrumResult) -> list[str]:
    lines = [f"{'':<9}{'trace':>11}  {'95% interval (probes)':<24}{'data stderr':>11}  {'trace/P':>9}  {'||.||_F':>8}"]
    for name, s in r.spectra.items():
        if s.trace is not None:
            t = s.trace
            interval = f"[{t.ci95[0]:.5g}, {t.ci95[1]:.5g}]"
            lines.append(
                f"{name:<9}{t.estimate:>11.5g}  {interval:<24}{_error(t.data_stderr):>11}  "
                f"{t.estimate / r.num_parameters:>9.2e}  {s.frobenius_norm:>8.4g}"
            )
    traces: dict[str, Trace] = {k: s.trace for k, s in r.spectra.items() if s.trace is not None}
    if {"hessian", "ggn"} <= set(traces) and traces["ggn"].estimate:
        h, g = traces["hessian"].estimate, traces["ggn"].estimate
        lines += [""]
        lines += textwrap.wrap(
            f"tr(H - GGN) is {h - g:.4g}, {_ratio(h - g, g)} of tr GGN in size: the part that comes from "
            f"second derivatives of the outputs{_SPIKING if _spiking(r) else _SMOOTH}",
            SCREEN_WIDTH,
        )
    return lines


_SPIKING = (
    ": the surrogate's f'', and the reset unless detached. The GGN leaves it out, keeps the curvature of the loss "
    "alone, and is never negative. Neither is the curvature of the spiking loss itself, which is piecewise constant."
)
_SMOOTH = ". The GGN leaves it out, keeps the curvature of the loss alone, and is never negative."


def _functionals(r: SpectrumResult) -> list[str]:
    rows = []
    for name, s in r.spectra.items():
        z = s.effective_dimension.damping if s.effective_dimension else math.nan
        kinds = (
            ("sum |negative| / sum |all|", s.negative_share),
            (f"effective dimension, z={z:.3g}", s.effective_dimension),
            (f"log det(A + z I), z={z:.3g}", s.log_determinant),
        )
        for label, f in kinds:
            if f is not None:
                interval = f"[{f.ci95[0]:.5g}, {f.ci95[1]:.5g}]"
                rows.append(f"{name:<9}{label:<31}{f.estimate:>9.5g}  {interval:<22} {f.quadrature_error:.0e}")
    return [f"{'':<51}{'95% interval (probes)':<22} quad.", *rows] if rows else []


def _scales(r: SpectrumResult) -> list[str]:
    lines = []
    for name, s in r.spectra.items():
        lines += field(
            "scale-free", f"{name} lambda_max {_number(s.scale_free_lambda_max)} (weights in units of filter norm)"
        )
        if s.scale_free:
            lines += field("", f"largest {len(s.scale_free)}: {', '.join(map(_number, s.scale_free))}")
    if r.sensitivity:
        top = r.main[1].eigenvalues[0].value
        text = ", ".join(f"{k}: {_number(v)}" for k, v in r.sensitivity.items())
        lines += field("sensitivity", f"{r.main[0]} lambda_max {top:.4g} becomes, {text}")
    return lines


def _cautions(r: SpectrumResult) -> list[str]:
    lines = []
    for text in r.warnings:
        lines += textwrap.wrap(text, SCREEN_WIDTH, initial_indent="! ", subsequent_indent="  ")
    return lines or ["no warnings"]


def _cost(r: SpectrumResult) -> list[str]:
    products = sum(s.hessian_vector_products for s in r.spectra.values())
    return field("cost", f"{products} products with the operators, {r.seconds:.1f} s")


def compare_lines(labelled: list[tuple[str, SpectrumResult]]) -> list[str]:
    """A table an operator, one row a result: lambda_max raw and scale-free, lambda_min, trace, errors from the data."""
    width = min(16, max(len(label) for label, _ in labelled))
    lines = [f"{'':<{width}} {'loss':>9} {'accuracy':>8} {'|weights|':>9}"]
    for label, r in labelled:
        norm = math.sqrt(sum(v**2 for v in r.weight_norms.values()))
        accuracy = "-" if math.isnan(r.accuracy) else f"{r.accuracy:.1%}"
        lines.append(f"{_short(label, width):<{width}} {r.loss:>9.4g} {accuracy:>8} {norm:>9.3g}")
    common = common_operators(labelled)
    for kind in common:
        lines += ["", kind]
        lines.append(f"{'':<{width}} {'lambda_max':>19} {'scale-free':>10} {'lambda_min':>10} {'trace':>21}")
        for label, r in labelled:
            s = r.spectra[kind]
            low = f"{s.smallest_eigenvalues[0].value:.3g}" if s.smallest_eigenvalues else "-"
            trace = _with_error(s.trace.estimate, s.trace.data_stderr) if s.trace else "-"
            top = _with_error(s.eigenvalues[0].value, s.eigenvalues[0].data_stderr)
            lines.append(
                f"{_short(label, width):<{width}} {top:>19} {s.scale_free_lambda_max:>10.3g} {low:>10} {trace:>21}"
            )
    if rest := [f"{kind} ({label})" for label, r in labelled for kind in r.spectra if kind not in common]:
        lines += ["", *textwrap.wrap(f"left out, for not all results have it: {', '.join(rest)}", SCREEN_WIDTH)]
    pairs = by_method(labelled)
    for ours, theirs in pairs:
        lines += _two_methods(ours, theirs, common)
    if pairs:
        lines += ["", *textwrap.wrap(_METHODS, SCREEN_WIDTH)]
    lines += [""]
    lines += textwrap.wrap(
        "+- is one standard error from the data, for these weights: it says nothing about other seeds. scale-free: "
        "weights in units of their filter's norm, which a BatchNorm behind them makes necessary.",
        SCREEN_WIDTH,
    )
    return lines


_METHODS = (
    "Within its residual of a value lies some eigenvalue, not always the one of that rank: a method that misses one "
    "shifts all that follow. Trust the smaller residual. products: with the operator, for all that was measured."
)


def _two_methods(ours: SpectrumResult, theirs: SpectrumResult, kinds: list[str]) -> list[str]:
    """The eigenvalues of one checkpoint by two methods, rank by rank, as far as the second found them."""
    lines = []
    name, first, second = PurePath(str(ours.checkpoint.get("path", "result"))).name, method_of(ours), method_of(theirs)
    for kind in kinds:
        a, b = ours.spectra[kind], theirs.spectra[kind]
        lines += ["", *textwrap.wrap(f"{name}, {kind}: {second} against {first}", SCREEN_WIDTH)]
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


def _with_error(value: float, error: float) -> str:
    return f"{value:.3g}" if math.isnan(error) else f"{value:.3g} +- {error:.1g}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


def _number(value: float) -> str:
    return "not converged" if math.isnan(value) else f"{value:.4g}"


def _error(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}"
