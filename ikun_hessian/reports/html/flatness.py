"""The section of flatness metrics: networks side by side, and each metric with its meaning, error and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hessian_tools.analysis.flatness.paired_differences import incomparable
from hessian_tools.results.flatness import FlatnessResult, Metric
from ikun_hessian.reports.flatness import flatness_cautions
from ikun_hessian.reports.html.elements import (
    Html,
    details,
    html,
    html_table,
    interval,
    listed,
    number,
    tag,
    value_with_error,
)
from ikun_hessian.reports.html.provenance import provenance_list

INTERVALS = {
    "residual": "numerical bound",
    "probes": "95% over probes",
    "draws": "95% over draws of noise",
    "search": "search bound",
}


def flatness_section(found: Sequence[tuple[str, FlatnessResult]]) -> Html:
    """Return the tables of several flatness results.

    Args:
        found: Names and results.
    """
    parts: list[Html] = []
    if len(found) > 1:
        results = [r for _, r in found]
        if why := incomparable(results):
            parts += [tag("p", f"Not side by side: {why}.", class_="note")]
        else:
            names = list(results[0].main)
            rows = [
                (name, *(_cell(r.main.get(name, Metric())) for r in results), results[0].main[name].valid)
                for name in names
            ]
            parts += [tag("h4", "Side by side")]
            parts += [html_table(("metric", *(name for name, _ in found), "describes"), rows, wide=True)]
    for name, r in found:
        body = [listed(flatness_cautions(r), "warnings")]
        body += [_table(r.main), details("Other metrics", _table(r.others)), details("Provenance", provenance_list(r))]
        parts += [details(name, *body, opened=len(found) == 1)]
    note = (
        "“describes” says which loss a number is about. The surrogate loss is the one whose derivatives training uses. "
        "The spiking loss is that of the network as it computes; it is piecewise constant. ± is the standard error "
        "over the data."
    )
    return html(tag("p", note, class_="note"), *parts)


def _cell(m: Metric) -> str:
    return value_with_error(m.value, m.data_stderr, m.data_stderr_least)


def _table(metrics: Mapping[str, Metric]) -> Html:
    """Return the table of some metrics."""
    rows = []
    for name, m in metrics.items():
        over = f"{INTERVALS.get(m.over, m.over)} {interval(m.ci95)}" if math.isfinite(m.ci95[0] + m.ci95[1]) else ""
        error = "; ".join(part for part in (_data(m), over) if part) or "–"
        meaning = "; ".join(part for part in (m.meaning, m.note) if part) or "–"
        rows.append((name, number(m.value, 5), error, m.valid or "–", meaning))
    return html_table(("metric", "value", "error", "describes", "meaning"), rows)


def _data(m: Metric) -> str:
    if math.isfinite(m.data_stderr_least):
        return f"± more than {number(m.data_stderr_least, 1)} (data)"
    return f"± {number(m.data_stderr, 2)} (data)" if math.isfinite(m.data_stderr) else ""
