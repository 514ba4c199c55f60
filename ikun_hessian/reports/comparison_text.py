"""Words and numbers that the screen and the files of a comparison of runs share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from ikun_hessian.experiments.comparison import statistics as inference
from ikun_hessian.experiments.comparison.measures import OUTCOME, SPEED
from ikun_hessian.experiments.comparison.result import Comparison, Row
from ikun_hessian.experiments.comparison.statistics import LEAST, Interval
from ikun_hessian.experiments.grouping import moment_of

SIGNIFICANT = 0.05


def moment_title(moment: str) -> str:
    """Return a moment of training in words."""
    where, tag = moment_of(moment)
    kinds = {
        "loss": "at the first epoch with training loss <= {}",
        "epoch": "after epoch {}",
        "": "at the end of training",
    }
    kind = next(k for k in kinds if where.startswith(k))
    value = where.removeprefix(kind)
    return kinds[kind].format(value.lstrip("0") if kind == "epoch" else value) + (f", {tag}" if tag else "")


def moment_note(moment: str) -> str:
    """Return which training loss defines a moment, "" if the moment is not defined by a loss."""
    matched = moment_of(moment)[0].startswith("loss")
    return "training loss: mean over the batches of an epoch in training mode, from the log" if matched else ""


def trained(c: Comparison) -> str:
    """Return what all runs were trained on, and the surrogate of the analysis if it differs from the training's."""
    moments: dict[str, list[str]] = {}
    for moment, name in c.surrogates.items():
        moments.setdefault(name, []).append(moment_title(moment))
    everywhere = len(moments) == 1 and len(c.surrogates) == len(c.moments)
    under = [
        f"curvature with surrogate {name}" + ("" if everywhere else f" {' and '.join(some)}")
        for name, some in moments.items()
    ]
    return "; ".join([*([c.data] if c.data else []), *under])


def start_cost(c: Comparison, seconds: bool = True) -> str:
    """Return the one-time cost of the initializers.

    Args:
        c: The comparison.
        seconds: Whether to include the wall time, which differs if a study is repeated.

    Returns:
        The median cost of each initializer, "" if it is unknown.
    """
    shown = "median seconds and forward passes" if seconds else "median forward passes"
    costs = [
        f"{name} {f'{format_number(s.seconds, 2)}, ' if seconds else ''}{format_number(s.forward_passes)}"
        for name, s in c.start.items()
    ]
    return f"{shown} per run: {'; '.join(costs)}" if costs else ""


def remarks(c: Comparison) -> Iterator[str]:
    """Yield warnings about what is compared and what is missing."""
    for key, values in c.follows.items():
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        yield f"{key} depends on {c.by} ({shown}): their effects cannot be separated."
    for name, runs in c.unpaired.items():
        yield f"Not paired: {len(runs)} of {c.levels[name]} runs of {name} ({_some(runs)})."
    for run, why in c.lost.items():
        yield f"{run}: {why}"
    for gap in c.left_out:
        what = "curvatures of the surrogate" if gap.curvatures_alone else "all results"
        shown = ", ".join(dict.fromkeys(_shortened(value) for value in gap.difference.values))
        remedy = " To compare them, analyse all runs with the same --surrogate."
        yield (
            f"Left out {moment_title(gap.moment)}: {what} from the {gap.source}, because of different "
            f"{gap.difference.meaning} ({shown}).{remedy if gap.difference.key == 'surrogate' else ''}"
        )
    families = {(row.moment, row.family) for row in c.rows}
    if not c.logged:
        yield (
            "No run has a log (NAME.train.jsonl): train loss and accuracy are from the samples analysed, and numbers "
            "of epochs are unknown."
        )
    elif ("", OUTCOME) in families and ("", SPEED) not in families:
        yield f"No run reached {100 * c.accuracy:g}% test accuracy. Choose a lower one with --accuracy."
    if c.most_pairs < LEAST:
        need = inference.least_pairs()
        yield (
            f"No p-values and no intervals of effects: they need at least {LEAST} pairs (here: {c.most_pairs}). No "
            f"exact paired test reaches 0.05 with fewer than {need} pairs. "
            + (_plan(c) if c.most_pairs > 1 else "Two or more pairs are needed to estimate how many pairs suffice.")
        )
        return
    if hopeless := list(_hopeless(c)):
        least = ", ".join(f"{least} for {family} ({n} comparison{'s' * (n != 1)})" for family, n, least in hopeless)
        yield (
            "With so few pairs, no p-value can be significant after Holm's correction: use the intervals. Pairs "
            f"needed: {least}."
        )


def _plan(c: Comparison) -> str:
    """Return how many pairs the observed effects would need."""
    if all(row.effect.n < 2 for row in c.rows):
        return "Fewer than two differences are finite, so the number of pairs needed cannot be estimated."
    needed = [row.needed.effect for row in c.rows if math.isfinite(row.needed.effect)]
    if not needed:
        return "The observed effects are too small to estimate the number of pairs needed."
    return f"The observed effects need {count_text(min(needed))} to {count_text(max(needed))} pairs (column pairs)."


def _hopeless(c: Comparison) -> Iterator[tuple[str, int, int]]:
    """Find families in which even the smallest possible p-value is above 0.05 after the correction.

    Yields:
        The family, the number of its comparisons, and the number of pairs that it needs.
    """
    seen: dict[str, tuple[int, int]] = {}
    for _, family, rows in blocks(c):
        tested = [row for row in rows if not math.isnan(row.p)]
        least = inference.least_pairs(SIGNIFICANT / len(tested)) if tested else 0
        if tested and max(row.pairs for row in tested) < least:
            seen.setdefault(family, (len(tested), least))
    for family, (count, least) in seen.items():
        yield family, count, least


def comparison_legend(found: Sequence[Comparison]) -> str:
    """Return the explanation of the columns of the tables."""
    references, margin = {c.reference for c in found}, found[0].margin
    reference, low = references.pop() if len(references) == 1 else "the reference", f"{1 / margin:.3g}"
    return (
        "n (before the median): number of runs, + number of runs without a value. effect: ratio (x) or difference (+,"
        f" -) to {reference}, the Hodges-Lehmann estimate over pairs. Each interval contains the true value over seeds"
        " with a probability of 95% (93.75% for five values, which allow no more). p: p-value of the exact "
        "signed-rank test (epochs of runs that did not reach the target are censored: each pair is compared within the "
        "epochs in which both runs were observed) after Holm's correction over the "
        f"table; *: at most 0.05. ~: the ratio is between {low} and {margin:.3g}, by two one-sided tests at 0.05 with "
        "Holm's correction. pairs: estimated number of pairs with which a true effect of this size would be shown "
        "with probability 0.8. inf, never: for loss, accuracy and epochs, runs that diverged or did not reach the "
        "target count as worse than all others in the median; their curvatures are unknown and are left out together "
        "with their pairs."
    )


def compared_settings(found: Mapping[str, Comparison | str]) -> list[Comparison]:
    """Return the comparisons of the settings that could be compared."""
    return [c for c in found.values() if isinstance(c, Comparison)]


def _some(names: Sequence[str], most: int = 4) -> str:
    """Return the first names and the number of others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shortened(value: object) -> str:
    """Return the value of a condition as short text."""
    text = f"{sum(n for _, n in value):,} weights" if isinstance(value, tuple) else str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def format_number(x: float, digits: int = 3, infinite: str = "inf") -> str:
    """Format a number, with `infinite` for infinity and "-" for NaN."""
    if math.isinf(x):
        return infinite if x > 0 else f"-{infinite}"
    return "-" if math.isnan(x) else f"{x:.{digits}g}"


def unit_of(rows: Sequence[Row]) -> float:
    """Return the unit in which the values of a measure are shown.

    Args:
        rows: The rows of the measure.

    Returns:
        0.01 for percentages, a power of ten for very small or large values, otherwise 1.
    """
    if rows[0].unit == "%":
        return 0.01
    size = max((abs(row.median.value) for row in rows if math.isfinite(row.median.value)), default=1.0)
    return 1.0 if size == 0 or 0.01 <= size < 1000 else 10.0 ** math.floor(math.log10(size))


def value_text(row: Row, x: float, unit: float, digits: int = 3) -> str:
    """Format a value of a measure in its unit."""
    return format_number(x / unit, digits, "never" if row.family == SPEED else "inf")


def interval_text(row: Row, interval: Interval, unit: float, width: int) -> str:
    """Format an interval with up to three digits, as many as fit; "" if there is no interval."""
    if math.isnan(interval.low):
        return ""
    low, high = interval.low, interval.high
    texts = [f"[{value_text(row, low, unit, d)}, {value_text(row, high, unit, d)}]" for d in (3, 2, 1)]
    texts.append(f"[{low / unit:.0e}, {high / unit:.0e}]")
    return next((text for text in texts if len(text) <= width), texts[-1])


def effect_text(row: Row, unit: float) -> str:
    """Format the effect of a level: its ratio or its difference to the reference."""
    x = row.shift.value
    if math.isnan(x):
        return "-"
    return f"x {value_text(row, x, 1)}" if row.ratio else ("+" if x > 0 else "") + value_text(row, x, unit)


def effect_interval_text(row: Row, unit: float, width: int) -> str:
    """Format the interval of the effect of a level."""
    return interval_text(row, row.shift, 1 if row.ratio else unit, width)


def p_text(p: float) -> str:
    """Format a p-value, "" if there is none."""
    if math.isnan(p):
        return ""
    return "<.001" if p < 0.001 else "1" if p > 0.9995 else f"{p:.3f}".removeprefix("0")


def count_text(x: float) -> str:
    """Format a number of pairs, "" if it is unknown."""
    return "" if math.isnan(x) else f"{x:.0f}" if x < 10_000 else ">9999"


def runs_text(row: Row) -> str:
    """Format the number of runs with a value and, after a plus sign, without one."""
    return f"{len(row.values) - row.lost}" + (f"+{row.lost}" if row.lost else "")


def measure_title(row: Row, unit: float) -> str:
    """Return the name of a measure with its unit."""
    return row.measure + (", %" if row.unit == "%" else "" if unit == 1 else f", in {unit:.0e}")


def blocks(c: Comparison) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield the moment, the family and the rows of each table."""
    for moment, family in dict.fromkeys((row.moment, row.family) for row in c.rows):
        yield moment, family, [row for row in c.rows if (row.moment, row.family) == (moment, family)]


def tau_texts(interval: Interval) -> tuple[str, str]:
    """Format a correlation and its interval."""
    value = "-" if math.isnan(interval.value) else f"{interval.value:.2f}"
    return value, "" if math.isnan(interval.low) else f"[{interval.low:.2f}, {interval.high:.2f}]"
