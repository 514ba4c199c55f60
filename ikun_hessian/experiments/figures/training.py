"""Charts of the initialization and the training of runs: start, gain, depth, epochs and training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hessian_tools.plots.style import operator_name
from hessian_tools.results.spectrum import SpectrumResult
from hessian_tools.results.trajectory import trace_error
from ikun_hessian.experiments.comparison.statistics import survival_median
from ikun_hessian.experiments.figures.chart import (
    Axis,
    Chart,
    Mark,
    NotEnoughError,
    Panel,
    medians,
    reading,
    samples_of,
)
from ikun_hessian.experiments.grouping import (
    AFTER_START,
    at_moment,
    ended_in_nan,
    epoch_at,
    epochs_to,
    horizon,
    level,
    moment_of,
    number_or_nan,
    over,
    quartiles,
    settings_groups,
    survival,
)
from ikun_hessian.experiments.runs import TrainingRun

EPOCH = Axis("epoch", "epoch")
SQUARE = Axis("E[f′(h)²]", "log")
STEPS = Axis("E[f′(h)²], max/min over t", "log")
VARIANCE = Axis("variance of the current", "log")
LOGGED = {  # quantities of a layer by epoch, with their names in the caption
    SQUARE: "E[f′(h)²]",
    STEPS: "its ratio of the largest to the smallest value over the time steps t",
    VARIANCE: "variance of the current",
}
AT_START = {  # quantities of a layer at initialization
    "current_variance": VARIANCE,
    "gradient_square": Axis("mean square gradient", "log"),
    "firing_rate": Axis("firing rate", "linear"),
}


def start_chart(runs: Sequence[TrainingRun], by: str) -> Chart:
    """Chart the forward variance, the backward variance and the firing rate at initialization against depth.

    Conditions that only affect training are ignored: runs with the same seed and the same start count once.

    Args:
        runs: The runs.
        by: The condition that is compared.

    Returns:
        The chart.

    Raises:
        NotEnoughError: If no run has statistics of its start.
    """
    known = [run for run in runs if layers_of(run)]
    if not known:
        raise NotEnoughError("no run has statistics of its start in NAME.train.json: train again with this version")
    panels = []
    for column, members in settings_groups(known, by, AFTER_START).items():
        alike = {(level(run, by), run.value("seed")): run for run in reversed(members)}.values()
        for key, y in AT_START.items():
            points: dict[str, list[tuple[float, float]]] = {}
            for run in reversed(list(alike)):
                for depth, layer in enumerate(layers_of(run), 1):
                    points.setdefault(level(run, by), []).append((depth, number_or_nan(layer.get(key))))
            marks = [mark for name, found in points.items() for mark in medians(name, found)]
            panels.append(Panel(y.label, column, Axis("layer, by depth", "layer"), y, tuple(marks), tuple(members)))
    caption = "At initialization, BatchNorm by the batch, on the first 256 training samples. Forward: variance of the "
    caption += (
        "current into the neurons; backward: mean square of the loss’s gradient there; share of steps with a spike."
    )
    return Chart(tuple(panels), by, caption, tuple(known))


def layers_of(run: TrainingRun) -> list[Mapping[str, Any]]:
    """Return the statistics of each layer at initialization, empty if they are unknown."""
    found = (run.start or {}).get("layers")
    return [layer for layer in found if isinstance(layer, dict)] if isinstance(found, list) else []


def gain_chart(runs: Sequence[TrainingRun], by: str, accuracy: float) -> Chart:
    """Chart the number of epochs to reach an accuracy against the gain.

    The gain is the variance of the initial weights relative to that of the initializer. Runs that never reach the
    accuracy are drawn above all others. Medians are Kaplan-Meier medians, which also use runs that are not finished.

    Args:
        runs: The runs.
        by: The condition that is compared.
        accuracy: The test accuracy.

    Returns:
        The chart.

    Raises:
        NotEnoughError: If no panel has two different gains.
    """
    by = "init" if by == "gain" else by
    known = [run for run in runs if run.log or ended_in_nan(run)]
    waiting = {run.name for run in known if not over(run) and not epochs_to(run, accuracy)[1]}
    panels = []
    for column, members in settings_groups(known, by, ("gain", "init")).items():
        arrivals: dict[tuple[str, float], list[tuple[int, bool]]] = {}
        marks = []
        for run in members:
            gain, (epoch, reached) = float(run.training.get("gain", 1.0)), epochs_to(run, accuracy)
            value = float(epoch) if reached else math.inf
            arrivals.setdefault((level(run, by), gain), []).append((epoch, reached))
            if run.name not in waiting:
                marks.append(Mark(level(run, by), "run", gain, value, run=run.name, note="" if reached else "never"))
        if len({mark.x for mark in marks}) > 1:
            for (name, gain), found in sorted(arrivals.items()):
                middle = survival_median(*zip(*found, strict=True)).value
                marks += [Mark(name, "median", gain, middle, n=len(found))] if math.isfinite(middle) else []
            y = Axis(f"epochs to {accuracy:.0%}", "epochs")
            x = Axis("weight variance over the initializer’s", "gain")
            panels.append(Panel(y.label, column, x, y, tuple(marks), tuple(members)))
    if not panels:
        varied = len({run.value("alpha") for run in runs}) > len({run.value("init") for run in runs})
        hint = " (for runs that differ in alpha, use --only epochs --by alpha)" if varied else ""
        raise NotEnoughError(f"all runs have the same variance of the initial weights: vary gain{hint}")
    caption = (
        f"Epochs to {accuracy:.0%} test accuracy against the variance of the initial weights, relative to that of "
    )
    caption += f"the initializer; {reading(panels)} (Kaplan–Meier) over seeds. never: not within the training."
    caption += f" Not drawn: {len(waiting)} with a log that ends before the training." if waiting else ""
    return Chart(tuple(panels), by, caption, tuple(known))


def depth_chart(runs: Sequence[TrainingRun], by: str) -> Chart:
    """Chart the test accuracy at the end of training against the number of weight layers.

    Args:
        runs: The runs. Those that are not finished are left out; diverged runs count as worse than all others.
        by: The condition that is compared.

    Returns:
        The chart.

    Raises:
        NotEnoughError: If no panel has two different depths.
    """
    known = [run for run in runs if layers_of(run) and run.log and over(run)]
    panels = []
    y = Axis("test accuracy", "linear")
    for column, members in settings_groups(known, by, ("depth", "hidden")).items():
        points: dict[str, list[tuple[float, float]]] = {}
        for run in members:
            final = -math.inf if ended_in_nan(run) else number_or_nan(run.log[-1].get("test_accuracy"))
            points.setdefault(level(run, by), []).append((float(len(layers_of(run))), final))
        marks = [mark for name, found in points.items() for mark in medians(name, found)]
        if len({mark.x for mark in marks}) > 1:
            panels.append(Panel(y.label, column, Axis("weight layers", "layer"), y, tuple(marks), tuple(members)))
    if not panels:
        raise NotEnoughError("all networks have the same number of layers: vary depth or hidden")
    caption = f"Test accuracy at the end of training by the number of weight layers; {reading(panels)} over seeds."
    return Chart(tuple(panels), by, caption, tuple(known))


def epochs_chart(runs: Sequence[TrainingRun], by: str, accuracy: float) -> Chart:
    """Chart the share of runs that reached an accuracy, the test accuracy and the training loss by epoch.

    Args:
        runs: The runs.
        by: The condition that is compared.
        accuracy: The test accuracy.

    Returns:
        The chart.

    Raises:
        NotEnoughError: If no run has a log.
    """
    known = [run for run in runs if run.log or ended_in_nan(run)]
    if not any(run.log for run in known):
        raise NotEnoughError("no run has a log (NAME.train.jsonl)")
    panels = []
    for column, members in settings_groups(known, by).items():
        groups: dict[str, list[TrainingRun]] = {}
        for run in members:
            groups.setdefault(level(run, by), []).append(run)
        share = [mark for name, found in groups.items() for mark in _arrivals(name, found, accuracy)]
        arrived = Axis(f"share at {accuracy:.0%}", "share")
        panels.append(Panel(arrived.label, column, EPOCH, arrived, tuple(share), tuple(members)))
        for key, worst, y in (
            ("test_accuracy", -math.inf, Axis("test accuracy", "linear")),
            ("loss", math.inf, Axis("training loss", "log")),
        ):
            marks = [mark for name, found in groups.items() for mark in _curves(name, found, key, worst)]
            panels.append(Panel(y.label, column, EPOCH, y, tuple(marks), tuple(members)))
    caption = f"Share of runs that reached {accuracy:.0%} test accuracy (Kaplan–Meier; ticks: runs that ended or were "
    caption += f"stopped before that). {reading(panels).capitalize()} over seeds. After early stopping a run keeps its "
    caption += "last value; after divergence it counts as worse than all others"
    unseen = any(mark.kind == "diverged" and math.isinf(mark.value) for panel in panels for mark in panel.marks)
    caption += "; × on the edge: runs that diverged before any measurement." if unseen else "."
    return Chart(tuple(panels), by, caption, tuple(known))


def _arrivals(name: str, runs: Sequence[TrainingRun], accuracy: float) -> list[Mark]:
    """Return marks of 1 minus the Kaplan-Meier curve, with a tick at each censored run."""
    found = [epochs_to(run, accuracy) for run in runs]
    times, share = survival([t for t, _ in found], [reached for _, reached in found])
    marks = [Mark(name, "steps", t, 1 - s, n=len(runs)) for t, s in zip(times, share, strict=True)]
    last = max(map(horizon, runs))
    marks += [Mark(name, "steps", last, 1 - share[-1], n=len(runs))] if last > times[-1] else []
    for run, (t, reached) in zip(runs, found, strict=True):
        if not reached:
            height = 1 - share[int(np.searchsorted(times, t, side="right")) - 1]
            marks.append(Mark(name, "censored", t, height, run=run.name, note="censored"))
    return marks


def _curves(name: str, runs: Sequence[TrainingRun], key: str, worst: float) -> list[Mark]:
    """Return marks of the median and quartiles by epoch, and of divergence.

    After divergence a run counts with the worst value, after early stopping with its last value. A run that is not
    finished counts up to its last epoch.

    Args:
        name: Name of the level.
        runs: Runs of the level.
        key: Name of the quantity in the log.
        worst: The worst value, infinite.

    Returns:
        The marks.
    """
    last, points, marks = max(map(horizon, runs)), [], []
    for run in runs:
        values = {int(line["epoch"]): number_or_nan(line.get(key)) for line in run.log}
        values = {epoch: v for epoch, v in values.items() if math.isfinite(v)}
        ended = max(values, default=0)
        final = worst if ended_in_nan(run) else values.get(ended, math.nan)
        after = range(ended + 1, (last if over(run) else ended) + 1)
        points += [(float(e), v) for e, v in (*values.items(), *((e, final) for e in after))]
        if ended_in_nan(run) and last:
            value = values.get(ended, worst)  # without a value, the mark is on the edge
            marks.append(Mark(name, "diverged", max(ended, 1), value, run=run.name, note="diverged"))
    return [*medians(name, points), *marks]


def training_chart(runs: Sequence[TrainingRun], by: str) -> Chart:
    """Chart curvature and layer statistics against the epoch.

    Args:
        runs: The runs.
        by: The condition that is compared.

    Returns:
        The chart: lambda_max and trace of the snapshots, and for each layer E[f'^2], the ratio of its largest to its
        smallest value over the time steps, and the variance of the current.

    Raises:
        NotEnoughError: If neither snapshots nor logs have these values.
    """
    panels: list[Panel] = []
    errors = _errors(runs)
    for page, members in settings_groups(runs, by).items():
        panels += _snapshot_panels(page, members, by, errors)
        panels += _layer_panels(page, members, by)
    if not panels:
        raise NotEnoughError(
            "no run has spectra of two snapshots (train with --snapshots) or statistics of its layers in its log"
        )
    logged = [label for y, label in LOGGED.items() if any(panel.y == y for panel in panels)]
    parts = ["largest eigenvalue and trace of the snapshots"] if any(p.y not in LOGGED for p in panels) else []
    parts += [f"{', '.join(logged)} (of layers, on the first 256 training samples)"] if logged else []
    caption = f"By epoch: {'; '.join(parts)}; {reading(panels)} over the seeds still in training."
    return Chart(tuple(panels), by, caption, tuple(runs))


def logged_layers(line: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the statistics of each layer in a line of a log."""
    found = line.get("layers")
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def _layer_panels(page: str, runs: Sequence[TrainingRun], by: str) -> list[Panel]:
    """Return panels of the logged quantities (rows) of all layers or of a selection (columns)."""
    names = list(dict.fromkeys(name for run in runs for line in run.log for name in logged_layers(line)))
    shown = _spread(names, 6)
    few = f"{len(shown)} of {len(names)} layers" if len(shown) < len(names) else "layers"
    panels = []
    for y in LOGGED:
        row = []
        for layer in shown:
            points: dict[str, list[tuple[float, float]]] = {}
            for run in runs:
                found = [(float(line["epoch"]), _logged(logged_layers(line).get(layer, {}), y)) for line in run.log]
                points.setdefault(level(run, by), []).extend(found)
            marks = tuple(mark for name, of in points.items() for mark in medians(name, of))
            marks = marks if any(math.isfinite(mark.value) for mark in marks) else ()
            titled = f"{page}, {few}" if page else few
            row.append(Panel(y.label, layer, EPOCH, y, marks, tuple(runs), page=titled))
        panels += row if any(panel.marks for panel in row) else []
    return panels


def _logged(layer: Mapping[str, Any], y: Axis) -> float:
    """Return a logged quantity, NaN if it is unknown. The ratio is infinite if the smallest value is 0."""
    if y == VARIANCE:
        return number_or_nan(layer.get("current_variance"))
    if y == SQUARE:
        return number_or_nan(layer.get("derivative_square"))
    steps = layer.get("derivative_square_by_step")
    values = [number_or_nan(step) for step in steps] if isinstance(steps, list) else []
    if len(values) < 2 or not max(values) > 0 or any(math.isnan(v) for v in values):
        return math.nan
    return max(values) / min(values) if min(values) > 0 else math.inf


def _snapshots(run: TrainingRun) -> dict[tuple[str, int], tuple[float, float]]:
    """Return values and standard errors of the snapshots by panel and epoch."""
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for epoch, result in _results(run):
        for operator, spectrum in result.spectra.items():
            for top in spectrum.eigenvalues[:1]:
                found[f"{operator_name(operator)} λ₁", epoch] = top.value, top.data_stderr
            if (trace := spectrum.trace) is not None:
                found[f"{operator_name(operator)} trace", epoch] = trace.estimate, trace_error(trace)
    return found


def _results(run: TrainingRun) -> list[tuple[int, SpectrumResult]]:
    """Return the epochs and spectra of the snapshots and of the final weights."""
    found = [(moment, at_moment(run, moment)) for moment in dict.fromkeys(moment_of(key)[0] for key in run.spectra)]
    epochs = [(epoch_at(run, moment), result) for moment, result in found if not moment.startswith("loss")]
    return [(epoch, result) for epoch, result in epochs if epoch is not None and result is not None]


def _errors(runs: Sequence[TrainingRun]) -> dict[str, float]:
    """Return the median standard error by panel. The sign of a smaller value is not significant."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for (label, _), (_, error) in _snapshots(run).items():
            found.setdefault(label, []).append(error)
    return {label: quartiles(errors)[1] for label, errors in found.items()}


def _snapshot_panels(page: str, runs: Sequence[TrainingRun], by: str, errors: Mapping[str, float]) -> list[Panel]:
    """Return panels of lambda_max and the trace of each operator, none if there are fewer than two epochs."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run in runs:
        for (label, epoch), (value, _) in _snapshots(run).items():
            found.setdefault(label, {}).setdefault(level(run, by), []).append((float(epoch), value))
    samples = samples_of(result for run in runs for _, result in _results(run))
    panels = []
    for label, groups in found.items():
        marks = tuple(mark for name, of in groups.items() for mark in medians(name, of))
        if len({mark.x for mark in marks}) > 1 and any(math.isfinite(mark.value) for mark in marks):
            y = Axis(label, "signed", linthresh=errors[label])
            panels.append(Panel(label, "", EPOCH, y, marks, tuple(runs), page=page, samples=samples))
    return panels


def _spread(names: Sequence[str], count: int) -> list[str]:
    """Return at most `count` of the names at equal distances, including the first and the last."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]
