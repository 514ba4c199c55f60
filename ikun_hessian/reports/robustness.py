"""Tables of robustness for a study: the accuracy lost, and its rank correlation with the flatness metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hessian_tools.io.text import markdown
from hessian_tools.results.robustness import lost
from ikun_hessian.experiments.comparison.statistics import Interval, kendall, median
from ikun_hessian.experiments.grouping import settings_groups, show
from ikun_hessian.experiments.runs import TrainingRun


def robustness_rows(runs: Sequence[TrainingRun], by: str) -> list[dict[str, Any]]:
    """Return a table with one row for each run, disturbance and severity.

    Args:
        runs: The runs. Runs without robustness results are skipped.
        by: Name of the condition that is compared.

    Returns:
        Rows with the name of the run, its level of `by`, its seed, the disturbance, the severity, the accuracy, its
        standard error, and the accuracy lost compared to undisturbed data.
    """
    return [
        {
            "run": run.name,
            by: run.value(by),
            "seed": run.value("seed"),
            "disturbance": kind,
            "severity": severity,
            "accuracy": found.value,
            "stderr": "" if math.isnan(found.stderr) else found.stderr,
            "lost": run.robustness.accuracy - found.value,
        }
        for run in runs
        if run.robustness
        for kind, severities in run.robustness.disturbed.items()
        for severity, found in severities.items()
    ]


def ranks(runs: Sequence[TrainingRun], by: str) -> dict[str, dict[str, tuple[Interval, Interval]]]:
    """Compute Kendall's tau between the flatness metrics at the end of training and the accuracy lost.

    Args:
        runs: The runs. Only runs with both results are used.
        by: Name of the condition that is compared.

    Returns:
        By main flatness metric and disturbance, tau over all runs and tau over pairs of runs with the same level of
        `by`.
    """
    known = [(run, run.flatness[""], lost(run.robustness)) for run in runs if run.robustness and "" in run.flatness]
    metrics = dict.fromkeys(name for _, flat, _ in known for name in flat.main)
    kinds = dict.fromkeys(kind for _, _, drops in known for kind in drops)
    table: dict[str, dict[str, tuple[Interval, Interval]]] = {}
    for name in metrics:
        for kind in kinds:
            points = [
                (flat.main[name].value, drops[kind], run.value(by))
                for run, flat, drops in known
                if name in flat.main and kind in drops and not math.isnan(flat.main[name].value)
            ]
            if len(points) > 1:
                x, y, groups = ([point[i] for point in points] for i in range(3))
                table.setdefault(name, {})[kind] = kendall(x, y), kendall(x, y, list(map(str, groups)))
    return table


def robustness_markdown(runs: Sequence[TrainingRun], by: str) -> str:
    """Return the tables of robustness in Markdown.

    Args:
        runs: The runs.
        by: Name of the condition that is compared.

    Returns:
        For each setting, a table of the accuracy lost by disturbance and level of `by`, and a table of `ranks` if
        flatness was measured. Empty if robustness was not measured.
    """
    found = settings_groups([run for run in runs if run.robustness], by)
    return "\n".join(
        f"### {markdown(name)}\n\n{_tables(some, by)}" if name else _tables(some, by) for name, some in found.items()
    )


def _tables(runs: Sequence[TrainingRun], by: str) -> str:
    """Return the tables of one setting."""
    losses: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if run.robustness:
            losses.setdefault(show(run.value(by)), []).append(lost(run.robustness))
    kinds = list(dict.fromkeys(kind for found in losses.values() for drops in found for kind in drops))
    title = "Accuracy lost, in percentage points: mean over severities, median over runs [95% interval]."
    lines = [title, "", *_head(["", *kinds])]
    for level, found in losses.items():
        cells = [_interval(median([100 * drops[kind] for drops in found if kind in drops])) for kind in kinds]
        lines.append(_row([f"{by} {level} ({len(found)} runs)", *cells]))
    if table := ranks(runs, by):
        lines += [
            "",
            "Kendall's tau between each metric and the accuracy lost: over all runs and, in parentheses, over pairs of "
            f"runs with the same {by} [95% interval over runs]. Positive: sharper minima lose more accuracy.",
            "",
            *_head(["", *kinds]),
        ]
        for name, row in table.items():
            both = [f"{_interval(row[k][0])} ({_interval(row[k][1])})" if k in row else "-" for k in kinds]
            lines.append(_row([name, *both]))
    return "\n".join([*lines, ""])


def _head(cells: Sequence[str]) -> list[str]:
    """Return the two lines of a table's head."""
    return [_row(cells), "|---" * len(cells) + "|"]


def _row(cells: Sequence[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(map(markdown, cells))} |"


def _interval(found: Interval) -> str:
    """Format a number and its interval, "-" if it is unknown."""
    if math.isnan(found.value):
        return "-"
    ends = "" if math.isnan(found.low) else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.value:.2f}{ends}"
