"""The section that compares the levels of a condition over several seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ikun_hessian.experiments.comparison.result import Comparison, Row
from ikun_hessian.reports.comparison_text import (
    SIGNIFICANT,
    blocks,
    compared_settings,
    comparison_legend,
    effect_interval_text,
    effect_text,
    interval_text,
    measure_title,
    moment_note,
    moment_title,
    p_text,
    remarks,
    runs_text,
    tau_texts,
    trained,
    unit_of,
    value_text,
)
from ikun_hessian.reports.html.elements import Html, details, html, html_table, listed, tag

WIDEST = 40  # characters of an interval


def comparison_section(found: Mapping[str, Comparison | str]) -> Html:
    """Return the comparisons of all settings (see `experiments.comparison.comparison.compare_settings`)."""
    parts: list[Html] = []
    for name, c in found.items():
        body = _comparison(c) if isinstance(c, Comparison) else tag("p", f"Not compared: {c}", class_="note")
        parts += [details(name, body) if name else body]
    compared = compared_settings(found)
    return html(*parts, *([tag("p", comparison_legend(compared), class_="note")] if compared else []))


def _comparison(c: Comparison) -> Html:
    """Return one comparison: a table for each moment and family of measures, and the correlations."""
    levels = ", ".join(f"{name} ({count} runs)" for name, count in c.levels.items())
    said = f"{c.by}: {levels}; reference {c.reference}. Paired by seed. {trained(c)}"
    parts = [tag("p", said), listed(remarks(c), "warnings")]
    head = ("measure", c.by, "runs", "median", "95% interval", "effect", "95% interval of the effect", "p (Holm)")
    for i, (moment, family, rows) in enumerate(blocks(c)):
        cells = []
        for name in dict.fromkeys(row.measure for row in rows):
            some = [row for row in rows if row.measure == name]
            cells += [_row(row, unit_of(some), row.level == c.reference) for row in some]
        note = moment_note(moment)
        body = [*([tag("p", note, class_="note")] if note else []), html_table(head, cells, wide=True)]
        parts += [details(f"{family.capitalize()}, {moment_title(moment)}", *body, opened=i == 0)]
    if c.correlations:
        titles = ("measure", "moment", "tau, all runs", "95% interval", f"tau within {c.by}", "95% interval within")
        taus = [
            (r.measure, moment_title(r.moment), *tau_texts(r.overall), *tau_texts(r.within)) for r in c.correlations
        ]
        parts += [details("Rank correlation with the accuracy gap", html_table(titles, _plain(taus), wide=True))]
    return html(*parts)


def _plain(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    return [tuple(cell or "–" for cell in row) for row in rows]


def _row(row: Row, unit: float, reference: bool) -> tuple[str, ...]:
    """Return the cells of one level."""
    middle, ends = value_text(row, row.median.value, unit), interval_text(row, row.median, unit, WIDEST) or "–"
    cells = (measure_title(row, unit), row.level, runs_text(row), middle, ends)
    if reference:
        return (*cells, "reference", "–", "–")
    star = "" if math.isnan(row.holm) or row.holm > SIGNIFICANT else " *"
    like = " ~" if row.equivalence <= SIGNIFICANT else ""
    return (
        *cells,
        effect_text(row, unit) + like,
        effect_interval_text(row, unit, WIDEST) or "–",
        f"{p_text(row.holm) or '–'}{star}",
    )
