"""Print the Hessian of the smoothed loss itself, for a terminal of 80 columns."""

from __future__ import annotations

import math

from hessian_tools.results.text import rounded
from hessian_tools.results.true_hessian import DrawMean, TrueEigenvalue, TrueHessianResult, shown
from ikun_hessian.reports.header import opened
from ikun_hessian.reports.summary import closed, entry, more, one_line_entry, opened_lines
from ikun_hessian.reports.text import field, paragraph, shortened, warning

BIAS = (
    "Every value is unbiased for its own direction, because it comes from draws that did not choose the direction. The "
    "direction is estimated, so the first value is on average at most the largest eigenvalue of H, and the value of "
    "rank P at least the smallest. Errors are over the draws; the error over the samples is not in them."
)


def true_hessian_summary(result: TrueHessianResult, files: str = "", terminal: bool = True) -> str:
    """Summarize the Hessian of the smoothed loss.

    Args:
        result: The result.
        files: Names of the written files; "" for none.
        terminal: Whether to name the option --full of the command line.

    Returns:
        At most 12 lines of at most 80 columns.
    """
    lines = opened_lines(result)
    smooth = f"smoothed loss {shown(result.smoothed_loss)} at noise {result.noise:g}; unit of weights: filter RMS"
    lines += entry("true", smooth)
    if result.eigenvalues:
        lines += entry("lambda_max", _bound(result.eigenvalues[0], "more"))
    if result.smallest_eigenvalues:
        lines += entry("lambda_min", _bound(result.smallest_eigenvalues[0], "less"))
    lines += entry("trace", _mean(result.trace))
    for name in dict.fromkeys(d.operator for d in result.directions):
        first = next(d for d in result.directions if d.operator == name)
        lines.append(
            one_line_entry(name, f"largest eigenvalue {first.predicted:.3g}; true curvature there {shown(first.form)}")
        )
    note = f"+-: standard error (draws); {more(len(result.warnings), terminal)}"
    return closed(lines, [text.partition(". ")[0].rstrip(".") + "." for text in result.warnings], files, note)


def true_hessian_lines(result: TrueHessianResult) -> list[str]:
    """Return the lines that `spectrum --operator true --full` prints."""
    sections = (opened, _what, _numbers, _table, _given, _search, _warnings, _cost)
    return [line for section in sections if (part := section(result)) for line in [*part, ""]][:-1]


def true_hessian_brief(result: TrueHessianResult) -> str:
    """Return one line about a result, for --brief."""
    top = f" lambda_max {shown(result.eigenvalues[0].form)} or more;" if result.eigenvalues else ""
    path = result.checkpoint.get("path", "-")
    return f"{path}: true Hessian, noise {result.noise:g}:{top} trace {shown(result.trace)}"


def _mean(mean: DrawMean) -> str:
    """Format a mean with its error and its interval."""
    if mean.value == mean.stderr == 0:
        return shown(mean)
    low, high = mean.ci95
    interval = f", 95% interval {low:.3g} to {high:.3g}" if math.isfinite(low) else ""
    return f"{mean.value:.3g} +- {rounded(mean.stderr, 2)}{interval}"


def _bound(pair: TrueEigenvalue, side: str) -> str:
    """Format the first eigenvalue of one end as a bound. `side` is "more" for the largest, "less" for the smallest."""
    end, kind = (pair.form.ci95[0], "lower") if side == "more" else (pair.form.ci95[1], "upper")
    limit = f" (97.5% {kind} limit: {end:.3g})" if math.isfinite(end) else ""
    return f"{shown(pair.form)} or {side}{limit}"


def _what(r: TrueHessianResult) -> list[str]:
    """Say which Hessian is printed."""
    name = "spiking loss" if r.network.get("surrogate") else "loss"
    text = (
        f"L_s(w) = E L(w + s D z) is the {name} under weight noise, with s = {r.noise:g}, z standard normal and D the "
        "root mean square of each filter. Printed is H = D (Hessian of L_s) D: curvature with the weights in units of "
        "D. It comes from values of the loss only; no surrogate is in it."
    )
    return field("true", text)


def _numbers(r: TrueHessianResult) -> list[str]:
    lines = field("loss", f"{r.loss:.6g} at the weights; smoothed: {_mean(r.smoothed_loss)}")
    return lines + field("trace", f"{_mean(r.trace)} (unbiased)")


def _table(r: TrueHessianResult) -> list[str]:
    """Return the table of eigenvalues and its legend."""
    if not r.eigenvalues:
        return []
    width = max(5, len(str(r.num_parameters)))
    lines = [
        "curvature along the estimated eigenvectors",
        f"{'rank':>{width}} {'value':>10} {'error':>9}  {'95% interval (draws)':<23} {'given':>5}  main layer",
    ]
    lines += [_row(i, e, width) for i, e in enumerate(r.eigenvalues, 1)]
    if r.smallest_eigenvalues:
        lines += ["  ..."]
        ranks = range(r.num_parameters, 0, -1)
        lines += [_row(i, e, width) for i, e in zip(ranks, r.smallest_eigenvalues, strict=False)]
    legend = (
        f"{BIAS} given: share of the direction in the span of the eigenvectors of the other operators. main layer: the "
        "layer with the largest share of the direction."
    )
    return [*lines, *paragraph(legend)]


def _row(rank: int, e: TrueEigenvalue, width: int) -> str:
    layer, share = max(e.layers.items(), key=lambda item: item[1]) if e.layers else ("-", math.nan)
    return (
        f"{rank:>{width}} {e.form.value:>10.4g} {e.form.stderr:>9.2g}  {_interval(e.form):<23} {e.given:>5.0%}  "
        f"{shortened(layer, 16)} {share:.0%}"
    )


def _interval(mean: DrawMean) -> str:
    low, high = mean.ci95
    return f"{low:.3g} to {high:.3g}" if math.isfinite(low) else "-"


def _given(r: TrueHessianResult) -> list[str]:
    """Return the table of the curvature along the eigenvectors of other operators."""
    if not r.directions:
        return []
    lines = [
        "curvature along the eigenvectors of other operators (of D A D)",
        f"{'operator':<10} {'rank':>6} {'eigenvalue':>11} {'true value':>11} {'error':>9}  95% interval (draws)",
    ]
    for d in r.directions:
        lines.append(
            f"{shortened(d.operator, 10):<10} {d.rank:>6} {d.predicted:>11.4g} {d.form.value:>11.4g} "
            f"{d.form.stderr:>9.2g}  {_interval(d.form)}"
        )
    return lines


def _search(r: TrueHessianResult) -> list[str]:
    """Say what the search for eigenvectors could find."""
    if r.search is None:
        return []
    s = r.search
    agreed = sum(c > 0.5 for c in s.agreement)
    return field(
        "search",
        f"{s.draws:,} pairs of draws for each of {r.groups} groups of samples cannot find an eigenvalue below "
        f"{s.threshold:.3g}. The two halves of the draws agree on {agreed} of {len(s.agreement)} directions. On "
        f"average, no eigenvalue is above {s.largest:.3g} or below {s.smallest:.3g}, the ends of the sample estimate.",
    )


def _warnings(r: TrueHessianResult) -> list[str]:
    return [line for text in r.warnings for line in warning(text)] or ["no warnings"]


def _cost(r: TrueHessianResult) -> list[str]:
    """Return the forward passes of every stage and the time."""
    stages = ", ".join(f"{name} {count:,}" for name, count in r.passes.items())
    total = sum(r.passes.values())
    return field("cost", f"{total:,} forward passes over all samples ({stages}), {r.seconds:.1f} s")
