"""Write a comparison of runs to files: Markdown, rows of a CSV file and JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hessian_tools.io.text import markdown
from ikun_hessian.experiments.comparison.result import Comparison, Correlation, Row
from ikun_hessian.experiments.comparison.statistics import Interval
from ikun_hessian.reports.comparison_text import (
    blocks,
    compared_settings,
    comparison_legend,
    count_text,
    effect_interval_text,
    effect_text,
    format_number,
    interval_text,
    measure_title,
    moment_note,
    moment_title,
    p_text,
    remarks,
    runs_text,
    start_cost,
    tau_texts,
    trained,
    unit_of,
    value_text,
)

WIDEST = 80  # characters of an interval in a Markdown table


def comparison_rows(c: Comparison) -> list[dict[str, Any]]:
    """Return the table of a comparison as plain numbers.

    Args:
        c: The comparison.

    Returns:
        One row for each measure, moment and level, as `hessian_tools.io.files.write_table` takes it. A value that is
        unknown is an empty string.
    """
    rows = []
    for row in c.rows:
        cells: dict[str, Any] = {"moment": row.moment or "end", "family": row.family, "measure": row.measure}
        cells |= {c.by: row.level, "reference": c.reference, "runs": len(row.values), "without a number": row.lost}
        cells |= _interval("median", row.median) | {"pairs": row.pairs, "scale": "ratio" if row.ratio else "difference"}
        cells |= _interval("against the reference", row.shift)
        cells |= {"p": row.p, "p Holm": row.holm, "p equivalence Holm": row.equivalence}
        cells |= _interval("d_z", row.effect) | _interval("superiority", row.superiority)
        cells |= {"pairs to show it": row.needed.effect, "pairs to show equivalence": row.needed.equivalence}
        rows.append({key: "" if isinstance(v, float) and math.isnan(v) else v for key, v in cells.items()})
    return rows


def _interval(name: str, found: Interval) -> dict[str, float]:
    """Return the three cells of a number and its interval."""
    return {name: found.value, f"{name} low": found.low, f"{name} high": found.high}


def settings_rows(found: Mapping[str, Comparison | str]) -> list[dict[str, Any]]:
    """Return the rows of `comparison_rows` for all settings that could be compared, with the name of the setting."""
    compared = {name: c for name, c in found.items() if isinstance(c, Comparison)}
    return [{"setting": name, **row} for name, c in compared.items() for row in comparison_rows(c)]


def settings_json(found: Mapping[str, Comparison | str]) -> dict[str, Any]:
    """Return the comparisons as plain values for JSON.

    Args:
        found: For each setting, its comparison or the reason why its runs cannot be compared.

    Returns:
        {"settings": [...]} with one entry for each setting: its name as "setting", and either the fields of
        `Comparison` or the reason as "refused". Infinite numbers, which are worse than any other, are "inf" or "-inf",
        and unknown numbers are NaN.
    """
    parts = [
        {"setting": name, **(dataclasses.asdict(c) if isinstance(c, Comparison) else {"refused": c})}
        for name, c in found.items()
    ]
    return {"settings": _told(parts)}


def _told(value: Any) -> Any:
    """Replace infinite numbers by strings."""
    if isinstance(value, dict):
        return {key: _told(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_told(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def settings_markdown(found: Mapping[str, Comparison | str]) -> str:
    """Return the comparisons of all settings in Markdown, with the reason where runs cannot be compared."""
    parts: list[str] = []
    for name, c in found.items():
        lines = markdown_lines(c) if isinstance(c, Comparison) else [f"Not compared: {markdown(c)}", ""]
        parts += [*([f"## {markdown(name)}", ""] if name else []), *lines]
    compared = compared_settings(found)
    return "\n".join([*parts, *([comparison_legend(compared)] if compared else []), ""])


def markdown_lines(c: Comparison) -> list[str]:
    """Return one comparison in Markdown: remarks, a table for each moment and family, and the correlations."""
    levels = ", ".join(f"{name} ({count} runs)" for name, count in c.levels.items())
    lines = [markdown(f"{c.by}: {levels}; reference {c.reference}. {trained(c)}.".replace(" .", "")), ""]
    # without seconds, so that repeating a study gives the same tables
    lines += [f"- initialized: {markdown(text)}" for text in [start_cost(c, seconds=False)] if text]
    lines += [f"- {markdown(text)}" for text in remarks(c)]
    columns = [
        "",
        c.by,
        "n",
        "median",
        "95% interval",
        "effect",
        "95% interval",
        "pairs",
        "p",
        "p Holm",
    ]
    columns += ["p equivalence", "d_z", "95% interval", "P(larger)", "pairs needed"]
    noted = {""}
    for moment, family, rows in blocks(c):
        title = family if "_" in family else family.capitalize()
        lines += ["", f"### {title}, {moment_title(moment)}", ""]
        if (note := moment_note(moment)) not in noted:
            lines += [f"({note})", ""]
            noted.add(note)
        lines += [_row(columns), "|" + " --- |" * len(columns)]
        for name in dict.fromkeys(row.measure for row in rows):
            some = [row for row in rows if row.measure == name]
            lines += [_row(_cells(row, unit_of(some), row.level == c.reference)) for row in some]
    if c.correlations:
        head = ("", "moment", "runs", "tau, all runs", "95% interval", f"tau within {c.by}", "95% interval")
        lines += ["", "### Rank correlation with the accuracy gap", "", _row(head)]
        lines += ["|" + " --- |" * len(head), *(_tau_cells(row) for row in c.correlations)]
    return [*lines, ""]


def _cells(row: Row, unit: float, reference: bool) -> list[str]:
    """Return the cells of one level."""
    middle, ends = value_text(row, row.median.value, unit), interval_text(row, row.median, unit, WIDEST)
    cells = [measure_title(row, unit), row.level, runs_text(row), middle, ends]
    if reference:
        return [*cells, "reference", *[""] * 9]
    sizes = [*tau_texts(row.effect), format_number(row.superiority.value, 2)]
    cells += [effect_text(row, unit), effect_interval_text(row, unit, WIDEST), str(row.pairs)]
    return [*cells, p_text(row.p), p_text(row.holm), p_text(row.equivalence), *sizes, count_text(row.needed.effect)]


def _tau_cells(row: Correlation) -> str:
    """Return the row of one correlation."""
    cells = [row.measure, row.moment or "end", str(row.overall.n), *tau_texts(row.overall), *tau_texts(row.within)]
    return _row(cells)


def _row(cells: Sequence[str]) -> str:
    """Return a row of a table. The cells are plain text."""
    return "| " + " | ".join(map(markdown, cells)) + " |"
