"""Print a comparison of runs for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping

from ikun_hessian.experiments.comparison.result import Comparison, Row
from ikun_hessian.reports.comparison_text import (
    SIGNIFICANT,
    blocks,
    compared_settings,
    comparison_legend,
    count_text,
    effect_interval_text,
    effect_text,
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
from ikun_hessian.reports.text import field, paragraph, warning

LABEL, ENDS = 11, 16  # widths of a level's name and of an interval


def comparison_lines(c: Comparison) -> list[str]:
    """Return the lines that `compare` prints for one comparison, without the legend."""
    others = [name for name in c.levels if name != c.reference]
    lines = field("compared", f"{c.by}: {', '.join(others)} to the reference {c.reference} (--reference)")
    if text := trained(c):
        lines += field("trained", text)
    counts = ", ".join(f"{name} {count}" for name, count in c.levels.items())
    pairs = f"seed ({len(c.seeds)} seeds)" if len(c.seeds) > 1 else "all other settings"
    lines += field("runs", f"{counts}; paired by {pairs}")
    if text := start_cost(c):
        lines += field("initialized", text)
    for text in remarks(c):
        lines += warning(text)
    shown = ""
    for moment, family, rows in blocks(c):
        if moment != shown or rows[0] is c.rows[0]:
            lines += ["", moment_title(moment).upper(), *paragraph(moment_note(moment))]
        shown = moment
        head = f"{family:<{LABEL + 6}}{'median':>8} {'95% interval':<{ENDS}}{'effect':>9}  {'95% interval':<{ENDS}}"
        lines += ["", f"{head}{'p':>5}{'pairs':>6}"]
        for name in dict.fromkeys(row.measure for row in rows):
            some = [row for row in rows if row.measure == name]
            unit = unit_of(some)
            lines += [f"{measure_title(some[0], unit)}:", *(_line(row, unit, row.level == c.reference) for row in some)]
    return [*lines, *_tau_lines(c)]


def settings_lines(found: Mapping[str, Comparison | str]) -> list[str]:
    """Return the lines that `compare` prints.

    Args:
        found: For each setting, its comparison or the reason why its runs cannot be compared, as returned by
            `ikun_hessian.experiments.comparison.comparison.compare_settings`.

    Returns:
        The lines of all comparisons, followed by the legend.
    """
    lines: list[str] = []
    refused: dict[str, list[str]] = {}
    for name, c in found.items():
        if isinstance(c, Comparison):
            lines += [*([""] if lines else []), *(field("setting", name) if name else []), *comparison_lines(c)]
        else:
            refused.setdefault(c, []).append(name)
    for why, names in refused.items():
        lines += ["", *warning(f"Not compared: {'; '.join(names)}: {why}")]
    compared = compared_settings(found)
    return [*lines, *(["", *paragraph(comparison_legend(compared))] if compared else [])]


def _line(row: Row, unit: float, reference: bool) -> str:
    """Return the line of one level."""
    text = f"  {_short(row.level, LABEL - 1):<{LABEL}}{runs_text(row):>4}{value_text(row, row.median.value, unit):>8} "
    text += f"{interval_text(row, row.median, unit, ENDS):<{ENDS}}"
    if not reference:
        mark, star = "~" if row.equivalence <= SIGNIFICANT else " ", "*" if row.holm <= SIGNIFICANT else " "
        text += f"{effect_text(row, unit):>9}{mark} {effect_interval_text(row, unit, ENDS):<{ENDS}}"
        text += f"{p_text(row.holm):>5}{star}{count_text(row.needed.effect):>5}"
    return text.rstrip()


def _tau_lines(c: Comparison) -> list[str]:
    """Return the tables of rank correlations and their legend."""
    lines: list[str] = []
    for moment in dict.fromkeys(row.moment for row in c.correlations):
        some = [row for row in c.correlations if row.moment == moment]
        lines += ["", *paragraph(f"RANK CORRELATION WITH THE ACCURACY GAP, {moment_title(moment).upper()}")]
        lines += [f"{'Kendall tau':<28}{'n':>4}{'all runs':>9} {'95% interval':<16}{'within':>7} 95% interval"]
        for row in some:
            (tau, ends), (within, within_ends) = tau_texts(row.overall), tau_texts(row.within)
            text = f"{_short(row.measure, 27):<28}{row.overall.n:>4}{tau:>9} {ends:<16}{within:>7} {within_ends}"
            lines.append(text.rstrip())
    note = (
        f"n: number of runs. within: over pairs of runs with the same {c.by}. A correlation over all runs that is "
        f"absent within a level may be caused by other effects of {c.by}."
    )
    return [*lines, *paragraph(note)] if lines else []


def _short(text: str, width: int) -> str:
    """Return the text, without its end if it is longer than `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"
