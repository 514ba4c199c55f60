"""Accuracy under disturbed inputs and disturbed weights, and whether the flatness of the minimum predicts its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hessian_tools.forward import accuracy, noise, noise_scales, outputs_at
from hessian_tools.inference import Interval, kendall, median
from hessian_tools.objective import Objective
from hessian_tools.runs import Run
from hessian_tools.trace import estimate

SCHEMA = "ikun-hessian/robustness/1"
WEIGHTS = "weight_noise"


@dataclass(frozen=True)
class RobustnessSettings:
    """corruptions: kinds of disturbed inputs, each at all of severities. noise: scales of normal weight noise, over the
    root mean square of the weight's filter. draws: of weight noise, in antithetic pairs."""

    corruptions: tuple[str, ...] = ("gaussian_noise", "blur", "contrast", "occlusion")
    severities: tuple[int, ...] = (1, 3, 5)
    noise: tuple[float, ...] = (0.1, 0.2, 0.4)
    draws: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(0 < scale < math.inf for scale in self.noise):
            raise ValueError(f"noise must be positive numbers, not {self.noise}")
        if self.draws < 4 or self.draws % 2:
            raise ValueError(f"draws come in antithetic pairs, at least two: 4, 6, ..., not {self.draws}")


@dataclass(frozen=True)
class Accuracy:
    """The share of samples classified rightly; stderr: over draws of the disturbance, NaN where there was one draw."""

    value: float
    stderr: float = math.nan


@dataclass(frozen=True)
class RobustnessResult:
    """What was measured of one checkpoint. disturbed: by disturbance ("blur", "weight_noise"), then by severity."""

    schema: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    settings: dict[str, Any]
    accuracy: float
    disturbed: dict[str, dict[str, Accuracy]]
    seconds: float
    versions: dict[str, str]


def noisy_accuracy(objective: Objective, scale: float, draws: int, seed: int) -> Accuracy:
    """Mean accuracy at weights + scale * (rms of the weight's filter) * normal noise, over `draws` antithetic draws.

    All checkpoints of one network meet the same noise.
    """
    weights, sizes = objective.weights(), noise_scales(objective)
    points = outputs_at(objective, lambda i: weights + scale * sizes * noise(objective, seed, i), range(draws))
    found = torch.tensor([accuracy(objective, outputs) for outputs in points], dtype=torch.float64)
    pairs = estimate(found.view(-1, 2).mean(1))
    return Accuracy(pairs.estimate, pairs.stderr)


def rows(measured: Sequence[tuple[Run, RobustnessResult]], by: str) -> list[dict[str, Any]]:
    """One row a run and disturbance: run, level of the condition `by`, seed, disturbance, severity, accuracy, its
    standard error, and what it lost against the undisturbed accuracy."""
    return [
        {
            "run": run.name,
            by: run.value(by),
            "seed": run.value("seed"),
            "disturbance": kind,
            "severity": severity,
            "accuracy": found.value,
            "stderr": "" if math.isnan(found.stderr) else found.stderr,
            "lost": result.accuracy - found.value,
        }
        for run, result in measured
        for kind, severities in result.disturbed.items()
        for severity, found in severities.items()
    ]


def lost(result: RobustnessResult) -> dict[str, float]:
    """By disturbance: the accuracy lost, mean over its severities."""
    return {
        kind: result.accuracy - sum(found.value for found in severities.values()) / len(severities)
        for kind, severities in result.disturbed.items()
    }


def ranks(measured: Sequence[tuple[Run, RobustnessResult]], by: str) -> dict[str, dict[str, tuple[Interval, Interval]]]:
    """By flatness metric, then by disturbance: Kendall's tau of the metric at the end of training with the accuracy
    lost, over all runs and within the levels of `by`. The metrics that can carry a claim, in runs that have them."""
    known = [(run, run.flatness[""], lost(result)) for run, result in measured if "" in run.flatness]
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


def markdown(measured: Sequence[tuple[Run, RobustnessResult]], by: str) -> str:
    """Two tables: the accuracy lost by disturbance in every level of `by`, and `ranks` where there is something to
    rank."""
    losses: dict[str, list[dict[str, float]]] = {}
    for run, result in measured:
        losses.setdefault(str(run.value(by)), []).append(lost(result))
    kinds = list(dict.fromkeys(kind for found in losses.values() for drops in found for kind in drops))
    lines = ["Accuracy lost, in %: mean over severities, median over runs [95% interval].", "", *_head(["", *kinds])]
    for level, found in losses.items():
        cells = [_interval(median([100 * drops[kind] for drops in found if kind in drops])) for kind in kinds]
        lines.append(_row([f"{by} {level} ({len(found)} runs)", *cells]))
    if table := ranks(measured, by):
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
