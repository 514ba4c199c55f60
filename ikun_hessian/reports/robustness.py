"""What the tables of a study say of robustness: accuracy lost, and whether the flatness of the minimum predicts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hessian_tools.results.robustness import lost
from ikun_hessian.experiments.grouping import settings_groups, show
from ikun_hessian.experiments.runs import TrainingRun
from ikun_hessian.experiments.statistics import Interval, kendall, median


def robustness_rows(runs: Sequence[TrainingRun], by: str) -> list[dict[str, Any]]:
    """One row a run that was measured and disturbance: run, level of the condition `by`, seed, disturbance, severity,
    accuracy, its standard error, and what it lost against the undisturbed accuracy."""
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
    """By flatness metric, then by disturbance: Kendall's tau of the metric at the end of training with the accuracy
    lost, over all runs and within the levels of `by`. The metrics that can carry a claim, in runs that have them."""
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
    """For every setting two tables: the accuracy lost by disturbance in every level of `by`, and `ranks` where there is
    something to rank; "" where nothing was measured."""
    found = settings_groups([run for run in runs if run.robustness], by)
    return "\n".join(
        f"### {name}\n\n{_tables(some, by)}" if name else _tables(some, by) for name, some in found.items()
    )


def _tables(runs: Sequence[TrainingRun], by: str) -> str:
    losses: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if run.robustness:
            losses.setdefault(show(run.value(by)), []).append(lost(run.robustness))
    kinds = list(dict.fromkeys(kind for found in losses.values() for drops in found for kind in drops))
    lines = ["Accuracy lost, in %: mean over severities, median over runs [95% interval].", "", *_head(["", *kinds])]
    for level, found in losses.items():
        cells = [_interval(median([100 * drops[kind] for drops in found if kind in drops])) for kind in kinds]
        lines.append(_row([f"{by} {level} ({len(found)} runs)", *cells]))
    if table := ranks(runs, by):
        lines += [
            "",
            "Kendall's tau of each metric with the accuracy lost, over all runs and (in brackets) within the levels "
            f"of {by} [95% interval over runs]. Positive: the sharper lost more.",
            "",
            *_head(["", *kinds]),
        ]
        for name, row in table.items():
            both = [f"{_interval(row[k][0])} ({_interval(row[k][1])})" if k in row else "-" for k in kinds]
            lines.append(_row([name, *both]))
    return "\n".join([*lines, ""])


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(found: Interval) -> str:
    if math.isnan(found.value):
        return "-"
    ends = "" if math.isnan(found.low) else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.value:.2f}{ends}"
