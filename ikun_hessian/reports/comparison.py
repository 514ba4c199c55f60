"""What a person reads of a comparison of runs: 80 columns for the terminal, Markdown for a study, rows for a CSV."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ikun_hessian.experiments import statistics as inference
from ikun_hessian.experiments.comparison import Comparison, Correlation, Row
from ikun_hessian.experiments.grouping import moment_of
from ikun_hessian.experiments.measures import OUTCOME, SPEED
from ikun_hessian.experiments.statistics import LEAST, Interval
from ikun_hessian.reports.header import SCREEN_WIDTH

SIGNIFICANT = 0.05
LABEL, ENDS = 11, 16  # columns of a level's name and of an interval


# --- words that the screen and Markdown share
def moment_title(moment: str) -> str:
    """What a moment is, in words."""
    where, tag = moment_of(moment)
    kinds = {
        "loss": "at the first epoch of training loss <= {}",
        "epoch": "after epoch {}",
        "": "at the end of training",
    }
    kind = next(k for k in kinds if where.startswith(k))
    value = where.removeprefix(kind)
    return kinds[kind].format(value.lstrip("0") if kind == "epoch" else value) + (f", {tag}" if tag else "")


def moment_note(moment: str) -> str:
    """Which training loss a moment goes by, "" for one that goes by none."""
    matched = moment_of(moment)[0].startswith("loss")
    return "training loss: the log's mean over the batches of an epoch, in training mode" if matched else ""


def trained(c: Comparison) -> str:
    """What all runs were trained on, and the surrogate of the curvatures where it is not that of the training."""
    moments: dict[str, list[str]] = {}
    for moment, name in c.surrogates.items():
        moments.setdefault(name, []).append(moment_title(moment))
    everywhere = len(moments) == 1 and len(c.surrogates) == len(c.moments)
    under = [
        f"curvature under {name}" + ("" if everywhere else f" {' and '.join(some)}") for name, some in moments.items()
    ]
    return "; ".join([*([c.data] if c.data else []), *under])


def start_cost(c: Comparison, seconds: bool = True) -> str:
    """What the initializers cost, once; "" where it is not known. seconds: they too, which no two runs share."""
    shown = "median seconds and forward passes" if seconds else "median forward passes"
    costs = [
        f"{name} {f'{format_number(s.seconds, 2)}, ' if seconds else ''}{format_number(s.forward_passes)}"
        for name, s in c.start.items()
    ]
    return f"{shown}, once: {'; '.join(costs)}" if costs else ""


def remarks(c: Comparison) -> Iterator[str]:
    """What to know before the numbers: what is compared with what, and what is missing."""
    for key, values in c.follows.items():
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        yield f"{key} goes with {c.by} ({shown}): what is compared is both together."
    for name, runs in c.unpaired.items():
        yield f"Without a partner: {len(runs)} of {c.levels[name]} runs of {name} ({_some(runs)})."
    for run, why in c.lost.items():
        yield f"{run}: {why}"
    for gap in c.left_out:
        what = "the surrogate's curvatures" if gap.curvatures_alone else "all"
        shown = ", ".join(dict.fromkeys(_shortened(value) for value in gap.difference.values))
        remedy = "; analyse all with one --surrogate to compare them" if gap.difference.key == "surrogate" else ""
        where = f"Left out {moment_title(gap.moment)}: {what} from the {gap.source}"
        yield f"{where}: {gap.difference.meaning} differs ({shown}){remedy}."
    families = {(row.moment, row.family) for row in c.rows}
    if not c.logged:
        yield "No log (NAME.train.jsonl): train loss and accuracy are those of the samples analysed; no epochs."
    elif ("", OUTCOME) in families and ("", SPEED) not in families:
        yield f"No run reached {100 * c.accuracy:g}% test accuracy: ask for less with --accuracy."
    if c.most_pairs < LEAST:
        need = inference.least_pairs()
        yield (
            f"No p-values and no intervals of differences: {c.most_pairs} pair{'s' * (c.most_pairs != 1)} at most, and "
            f"{LEAST} are the least. No exact paired test reaches 0.05 with fewer than {need}; "
            + (_plan(c) if c.most_pairs > 1 else "the pairs to plan with are estimated from two or more.")
        )
        return
    if hopeless := list(_hopeless(c)):
        least = ", ".join(f"{least} for {family} ({n} comparison{'s' * (n != 1)})" for family, n, least in hopeless)
        yield f"No p can pass Holm's correction with so few pairs: read the intervals. It takes {least}."


def _plan(c: Comparison) -> str:
    if all(row.effect.n < 2 for row in c.rows):
        return "fewer than two differences are finite, which is nothing to plan with."
    needed = [row.needed.effect for row in c.rows if math.isfinite(row.needed.effect)]
    if not needed:
        return "the differences seen are too small to plan for."
    return f"the effects seen here would take {_count(min(needed))} to {_count(max(needed))} (column pairs)."


def _hopeless(c: Comparison) -> Iterator[tuple[str, int, int]]:
    """(family, its comparisons, pairs that it takes) where even the least exact p stays above 0.05 adjusted."""
    seen: dict[str, tuple[int, int]] = {}
    for _, family, rows in _blocks(c):
        tested = [row for row in rows if not math.isnan(row.p)]
        least = inference.least_pairs(SIGNIFICANT / len(tested)) if tested else 0
        if tested and max(row.pairs for row in tested) < least:
            seen.setdefault(family, (len(tested), least))
    for family, (count, least) in seen.items():
        yield family, count, least


def comparison_legend(found: Sequence[Comparison]) -> str:
    """How to read the tables of these comparisons."""
    references, margin = {c.reference for c in found}, found[0].margin
    reference, low = references.pop() if len(references) == 1 else "the reference", f"{1 / margin:.3g}"
    return (
        "median: over the runs of a level, n + those without a number. against: ratio (x) or difference (+, -) to "
        f"{reference}, in pairs of one seed, by Hodges and Lehmann. Intervals hold the truth over seeds with 95% "
        "(93.75% of five, which allow no more), each by itself. p: exact signed-rank test (of epochs, log-rank by "
        f"pairs), Holm's correction over its block; * at most 0.05. ~ the ratio lies within {low} to {margin:.3g}, "
        "shown by two one-sided tests at 0.05, Holm's correction too. pairs: so many would show a true effect of this "
        "size with probability 0.8, as far as these runs can tell. inf, never: in loss, accuracy and epochs, runs that "
        "diverged or did not get there count as worse than all others; of curvatures they have none, and drop out with "
        "their pairs."
    )


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shortened(value: object) -> str:
    text = f"{sum(n for _, n in value):,} weights" if isinstance(value, tuple) else str(value)
    return text if len(text) <= 40 else text[:12] + "…"


# --- numbers
def format_number(x: float, digits: int = 3, infinite: str = "inf") -> str:
    if math.isinf(x):
        return infinite if x > 0 else f"-{infinite}"
    return "-" if math.isnan(x) else f"{x:.{digits}g}"


def _unit(rows: Sequence[Row]) -> float:
    """What the numbers of one measure are shown in: 0.01 for a share in percent, a power of ten for the very small or
    large, else 1."""
    if rows[0].unit == "%":
        return 0.01
    size = max((abs(row.median.value) for row in rows if math.isfinite(row.median.value)), default=1.0)
    return 1.0 if size == 0 or 0.01 <= size < 1000 else 10.0 ** math.floor(math.log10(size))


def _value(row: Row, x: float, unit: float, digits: int = 3) -> str:
    return format_number(x / unit, digits, "never" if row.family == SPEED else "inf")


def _ends(row: Row, interval: Interval, unit: float, width: int) -> str:
    """In as many digits, up to three, as fit; "" where there is no interval."""
    if math.isnan(interval.low):
        return ""
    texts = [f"[{_value(row, interval.low, unit, d)}, {_value(row, interval.high, unit, d)}]" for d in (3, 2, 1)]
    texts.append(f"[{interval.low / unit:.0e}, {interval.high / unit:.0e}]")
    return next((text for text in texts if len(text) <= width), texts[-1])


def _shift(row: Row, unit: float) -> str:
    """The ratio, or the difference in the unit of the measure."""
    x = row.shift.value
    if math.isnan(x):
        return "-"
    return f"x {_value(row, x, 1)}" if row.ratio else ("+" if x > 0 else "") + _value(row, x, unit)


def _shift_ends(row: Row, unit: float, width: int) -> str:
    return _ends(row, row.shift, 1 if row.ratio else unit, width)


def _p(p: float) -> str:
    if math.isnan(p):
        return ""
    return "<.001" if p < 0.001 else "1" if p > 0.9995 else f"{p:.3f}".removeprefix("0")


def _count(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.0f}" if x < 10_000 else ">9999"


def _n(row: Row) -> str:
    return f"{len(row.values) - row.lost}" + (f"+{row.lost}" if row.lost else "")


def _title(row: Row, unit: float) -> str:
    return row.measure + (", %" if row.unit == "%" else "" if unit == 1 else f", in {unit:.0e}")


def _blocks(c: Comparison) -> Iterator[tuple[str, str, list[Row]]]:
    """(moment, family, rows)"""
    for moment, family in dict.fromkeys((row.moment, row.family) for row in c.rows):
        yield moment, family, [row for row in c.rows if (row.moment, row.family) == (moment, family)]


# --- the screen
def comparison_lines(c: Comparison) -> list[str]:
    """What the screen shows of one comparison."""
    others = [name for name in c.levels if name != c.reference]
    lines = _field("compared", f"{c.by}: {', '.join(others)} against {c.reference} (--reference)")
    if text := trained(c):
        lines += _field("trained", text)
    counts = ", ".join(f"{name} {count}" for name, count in c.levels.items())
    pairs = f"seed ({len(c.seeds)})" if len(c.seeds) > 1 else "all else"
    lines += _field("runs", f"{counts}; pairs agree in {pairs}")
    if text := start_cost(c):
        lines += _field("initialized", text)
    for text in remarks(c):
        lines += _remark(text)
    shown = ""
    for moment, family, rows in _blocks(c):
        if moment != shown or rows[0] is c.rows[0]:
            lines += ["", moment_title(moment).upper(), *textwrap.wrap(moment_note(moment), SCREEN_WIDTH)]
        shown = moment
        head = f"{family:<{LABEL + 6}}{'median':>8} {'95% interval':<{ENDS}}{'against':>9}  {'95% interval':<{ENDS}}"
        lines += ["", f"{head}{'p':>5}{'pairs':>6}"]
        for name in dict.fromkeys(row.measure for row in rows):
            some = [row for row in rows if row.measure == name]
            unit = _unit(some)
            lines += [f"{_title(some[0], unit)}:", *(_line(row, unit, row.level == c.reference) for row in some)]
    return [*lines, *_tau_lines(c)]


def settings_lines(found: Mapping[str, Comparison | str]) -> list[str]:
    """The whole screen: what comparison.compare_settings found, each under the name of its setting."""
    lines: list[str] = []
    refused: dict[str, list[str]] = {}
    for name, c in found.items():
        if isinstance(c, Comparison):
            lines += [*([""] if lines else []), *(_field("setting", name) if name else []), *comparison_lines(c)]
        else:
            refused.setdefault(c, []).append(name)
    for why, names in refused.items():
        lines += ["", *_remark(f"Not compared: {'; '.join(names)}: {why}")]
    compared = _compared(found)
    return [*lines, *(["", *textwrap.wrap(comparison_legend(compared), SCREEN_WIDTH)] if compared else [])]


def _compared(found: Mapping[str, Comparison | str]) -> list[Comparison]:
    return [c for c in found.values() if isinstance(c, Comparison)]


def _remark(text: str) -> list[str]:
    return textwrap.wrap(text, SCREEN_WIDTH, initial_indent="! ", subsequent_indent="  ", break_on_hyphens=False)


def _line(row: Row, unit: float, reference: bool) -> str:
    text = f"  {_short(row.level, LABEL - 1):<{LABEL}}{_n(row):>4}{_value(row, row.median.value, unit):>8} "
    text += f"{_ends(row, row.median, unit, ENDS):<{ENDS}}"
    if not reference:
        mark, star = "~" if row.equivalence <= SIGNIFICANT else " ", "*" if row.holm <= SIGNIFICANT else " "
        text += f"{_shift(row, unit):>9}{mark} {_shift_ends(row, unit, ENDS):<{ENDS}}{_p(row.holm):>5}{star}"
        text += f"{_count(row.needed.effect):>5}"
    return text.rstrip()


def _tau_lines(c: Comparison) -> list[str]:
    lines: list[str] = []
    for moment in dict.fromkeys(row.moment for row in c.correlations):
        some = [row for row in c.correlations if row.moment == moment]
        lines += [
            "",
            *textwrap.wrap(f"RANK CORRELATION WITH THE ACCURACY GAP, {moment_title(moment).upper()}", SCREEN_WIDTH),
        ]
        lines += [f"{'Kendall tau':<28}{'n':>4}{'all runs':>9} {'95% interval':<16}{'within':>7} 95% interval"]
        lines += [
            f"{_short(row.measure, 27):<28}{row.overall.n:>4}{_tau(row.overall)[0]:>9} {_tau(row.overall)[1]:<16}"
            f"{_tau(row.within)[0]:>7} {_tau(row.within)[1]}".rstrip()
            for row in some
        ]
    note = (
        f"within: pairs of runs of one {c.by} alone, pooled. A correlation that is there over all runs but not within"
    )
    return (
        [*lines, *textwrap.wrap(f"{note} may come from anything else that {c.by} does.", SCREEN_WIDTH)] if lines else []
    )


def _tau(interval: Interval) -> tuple[str, str]:
    value = "-" if math.isnan(interval.value) else f"{interval.value:.2f}"
    return value, "" if math.isnan(interval.low) else f"[{interval.low:.2f}, {interval.high:.2f}]"


# --- tables in files
def comparison_rows(c: Comparison) -> list[dict[str, Any]]:
    """One row a level and measure, plain numbers, for results.write_table; blank where there is none."""
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
    return {name: found.value, f"{name} low": found.low, f"{name} high": found.high}


def settings_rows(found: Mapping[str, Comparison | str]) -> list[dict[str, Any]]:
    """`comparison_rows` of every setting that could be compared, with its name."""
    compared = {name: c for name, c in found.items() if isinstance(c, Comparison)}
    return [{"setting": name, **row} for name, c in compared.items() for row in comparison_rows(c)]


def settings_json(found: Mapping[str, Comparison | str]) -> dict[str, Any]:
    """{"settings": [{"setting": its name, and the fields of Comparison or "refused": why}, ...]}; worse than any number
    is "inf" or "-inf", what is not known NaN."""
    parts = [
        {"setting": name, **(dataclasses.asdict(c) if isinstance(c, Comparison) else {"refused": c})}
        for name, c in found.items()
    ]
    return {"settings": _told(parts)}


def _told(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _told(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_told(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def settings_markdown(found: Mapping[str, Comparison | str]) -> str:
    """A part for every setting, as Markdown; one whose runs cannot be compared is named with the reason."""
    parts: list[str] = []
    for name, c in found.items():
        lines = markdown_lines(c) if isinstance(c, Comparison) else [f"Not compared: {c}", ""]
        parts += [*([f"## {name}", ""] if name else []), *lines]
    compared = _compared(found)
    return "\n".join([*parts, *([comparison_legend(compared)] if compared else []), ""])


def markdown_lines(c: Comparison) -> list[str]:
    """One comparison: what was compared, a table a family and moment, and the correlations."""
    levels = ", ".join(f"{name} ({count} runs)" for name, count in c.levels.items())
    lines = [f"{c.by}: {levels}; reference {c.reference}. {trained(c)}.".replace(" .", ""), ""]
    # without seconds: a study done again ends in the same tables
    lines += [f"- initialized: {text}" for text in [start_cost(c, seconds=False)] if text]
    lines += [f"- {text}" for text in remarks(c)]
    columns = [
        "",
        c.by,
        "n",
        "median",
        "95% interval",
        f"against {c.reference}",
        "95% interval",
        "pairs",
        "p",
        "p Holm",
    ]
    columns += ["p equivalence", "d_z", "95% interval", "P(larger)", "pairs needed"]
    noted = {""}
    for moment, family, rows in _blocks(c):
        title = family if "_" in family else family.capitalize()
        lines += ["", f"### {title}, {moment_title(moment)}", ""]
        if (note := moment_note(moment)) not in noted:
            lines += [f"({note})", ""]
            noted.add(note)
        lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for name in dict.fromkeys(row.measure for row in rows):
            some = [row for row in rows if row.measure == name]
            lines += ["| " + " | ".join(_cells(row, _unit(some), row.level == c.reference)) + " |" for row in some]
    if c.correlations:
        head = ("", "moment", "runs", "tau, all runs", "95% interval", f"tau within {c.by}", "95% interval")
        lines += ["", "### Rank correlation with the accuracy gap", "", "| " + " | ".join(head) + " |"]
        lines += ["|" + " --- |" * len(head), *(_tau_cells(row) for row in c.correlations)]
    return [*lines, ""]


def _cells(row: Row, unit: float, reference: bool) -> list[str]:
    middle, ends = _value(row, row.median.value, unit), _ends(row, row.median, unit, SCREEN_WIDTH)
    cells = [_title(row, unit), row.level, _n(row), middle, ends]
    if reference:
        return [*cells, "reference", *[""] * 9]
    sizes = [*_tau(row.effect), format_number(row.superiority.value, 2)]
    cells += [_shift(row, unit), _shift_ends(row, unit, SCREEN_WIDTH), str(row.pairs)]
    return [*cells, _p(row.p), _p(row.holm), _p(row.equivalence), *sizes, _count(row.needed.effect)]


def _tau_cells(row: Correlation) -> str:
    cells = [row.measure, row.moment or "end", str(row.overall.n), *_tau(row.overall), *_tau(row.within)]
    return "| " + " | ".join(cells) + " |"


def _field(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, SCREEN_WIDTH, initial_indent=f"{name:<12}", subsequent_indent=" " * 12, break_on_hyphens=False
    )


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
