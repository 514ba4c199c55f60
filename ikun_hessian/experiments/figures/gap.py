"""Charts of sharpness against the generalization gap and against robustness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hessian_tools.plots.style import operator_name
from hessian_tools.results.operator_spectrum import Spectrum
from hessian_tools.results.robustness import lost
from ikun_hessian.experiments.comparison.measures import accuracy_gap
from ikun_hessian.experiments.comparison.statistics import Interval, kendall
from ikun_hessian.experiments.figures.chart import Axis, Chart, Mark, NotEnoughError, Panel, samples_of
from ikun_hessian.experiments.figures.minima import alike
from ikun_hessian.experiments.grouping import (
    at_moment,
    epoch_at,
    level,
    moments,
    number_or_nan,
    settings_groups,
    titled,
)
from ikun_hessian.experiments.runs import TrainingRun

Sharpness = Callable[[TrainingRun], float]
MOST = 4  # largest number of measures of sharpness
LEAST = 3  # smallest number of runs in a panel


def gap_chart(runs: Sequence[TrainingRun], by: str) -> Chart:
    """Chart the gap in loss and in accuracy against sharpness, with Kendall's tau.

    Args:
        runs: The runs.
        by: The condition that is compared.

    Returns:
        The chart, with panels for each moment. Tau is over all runs and over pairs of runs with the same level.

    Raises:
        NotEnoughError: If fewer than three runs have both values, or if the spectra of a panel were measured
            differently.
    """
    panels = []
    for name, members in settings_groups(runs, by).items():
        for moment in moments(members):
            alike([result for run in members if (result := at_moment(run, moment))], titled(name, moment))
            samples = _samples(members, moment)
            for column, sharpness in list(sharpness_at(members, moment).items())[:MOST]:
                for y, gap in _GAPS.items():
                    found = [(run, sharpness(run), gap(run, moment)) for run in members]
                    panels += _panel(found, by, column, y, titled(name, moment), samples)
    if not panels:
        raise NotEnoughError("fewer than three runs have both a sharpness and a test loss in their log")
    caption = (
        f"{_caption(by)} Loss gap: test minus training. Accuracy gap: training minus test. Both are from the log. "
    )
    return Chart(tuple(panels), by, f"{caption}Diverged runs are not shown.", tuple(runs))


def robustness_chart(runs: Sequence[TrainingRun], by: str) -> Chart:
    """Chart the accuracy lost under each disturbance against the sharpness at the end of training.

    Args:
        runs: The runs.
        by: The condition that is compared.

    Returns:
        The chart, with Kendall's tau over all runs and over pairs of runs with the same level.

    Raises:
        NotEnoughError: If fewer than three runs have both values, or if the spectra of a panel were measured
            differently.
    """
    panels = []
    for name, members in settings_groups([run for run in runs if run.robustness or run.diverged], by).items():
        alike([result for run in members if (result := at_moment(run, ""))], name)
        drops, samples = (
            [(run, lost(run.robustness) if run.robustness else {}) for run in members],
            _samples(members, ""),
        )
        for kind in dict.fromkeys(kind for _, of in drops for kind in of):
            y = Axis(f"lost, {kind.replace('_', ' ')}", "linear")
            for column, sharpness in list(sharpness_at(members, "").items())[:MOST]:
                found = [(run, sharpness(run), of.get(kind, math.nan)) for run, of in drops]
                panels += _panel(found, by, column, y, name, samples)
    if not panels:
        raise NotEnoughError("fewer than three runs have both a sharpness and a robustness: a study measures both")
    caption = (
        f"{_caption(by)} Lost: accuracy on undisturbed test images minus that under the disturbance, mean over its "
    )
    return Chart(tuple(panels), by, f"{caption}severities. Diverged runs are not shown.", tuple(runs))


def _samples(runs: Sequence[TrainingRun], moment: str) -> tuple[int, ...]:
    """Return the numbers of samples on which the sharpness of these runs was measured."""
    found = [result for run in runs for result in (at_moment(run, moment), run.flatness.get(moment))]
    return samples_of([result for result in found if result is not None])


def _panel(
    found: Sequence[tuple[TrainingRun, float, float]], by: str, x: str, y: Axis, page: str, samples: tuple[int, ...]
) -> list[Panel]:
    """Return a panel of tuples (run, sharpness, value), none if too few values are known."""
    known = [(r, u, v) for r, u, v in found if math.isfinite(u) and math.isfinite(v) and not r.diverged]
    if len(known) < LEAST:
        return []
    marks = tuple(Mark(level(r, by), "run", u, v, run=r.name) for r, u, v in known)
    foot = _taus([u for _, u, _ in known], [v for _, _, v in known], [level(r, by) for r, _, _ in known])
    return [Panel(y.label, x, Axis(x, "signed"), y, marks, tuple(run for run, *_ in found), foot, page, samples)]


def _caption(by: str) -> str:
    """Describe the points and their correlation."""
    return (
        "Each point is a run. τ: Kendall’s rank correlation over all runs. within: the same over pairs of runs with "
        f"equal {by.replace('_', ' ')}. In brackets: 95% intervals (jackknife over runs)."
    )


def sharpness_at(runs: Sequence[TrainingRun], moment: str) -> dict[str, Sharpness]:
    """Find the measures of sharpness that at least one run has at a moment.

    Args:
        runs: The runs.
        moment: Key of a moment, "" for the end of training.

    Returns:
        By name, functions that return the value of a run: lambda_max of up to two operators, norm-scaled lambda_max of
        the last operator, adaptive average sharpness of the spiking loss, and trace of the last operator. Without
        spectra the values are from flatness.
    """
    found = [result for run in runs if (result := at_moment(run, moment))]
    operators = list(dict.fromkeys(name for result in found for name in result.spectra))

    def of(operator: str, value: Callable[[Spectrum], float]) -> Sharpness:
        """Return a function of the spectrum of an operator."""

        def at(run: TrainingRun) -> float:
            result = at_moment(run, moment)
            return value(result.spectra[operator]) if result and operator in result.spectra else math.nan

        return at

    def metric(name: str) -> Sharpness:
        """Return a flatness metric."""

        def at(run: TrainingRun) -> float:
            result = run.flatness.get(moment)
            found = result.metrics.get(name) if result else None
            return found.value if found else math.nan

        return at

    measures = {f"{operator_name(o)} λ₁": of(o, largest_of) for o in operators[:2]}
    for last in operators[-1:]:
        measures[f"{operator_name(last)} λ₁, norm-scaled"] = of(last, lambda s: s.scale_free_lambda_max)
    if not operators:
        measures = {f"{operator_name(o)} λ₁": metric(f"{o} lambda_max") for o in ("hessian", "ggn")}
        measures["GGN λ₁, norm-scaled"] = metric("ggn lambda_max scaled")
    measures["adaptive average sharpness"] = metric("adaptive average sharpness")
    for last in operators[-1:]:
        measures[f"{operator_name(last)} trace"] = of(last, lambda s: s.trace.estimate if s.trace else math.nan)
    return {name: value for name, value in measures.items() if any(math.isfinite(value(run)) for run in runs)}


def largest_of(spectrum: Spectrum) -> float:
    """Return lambda_max, NaN if it is unknown."""
    return spectrum.eigenvalues[0].value if spectrum.eigenvalues else math.nan


def loss_gap(run: TrainingRun, moment: str) -> float:
    """Return the test loss minus the training loss in the log at a moment, NaN if it is unknown."""
    epoch = epoch_at(run, moment)
    line = next((line for line in run.log if line["epoch"] == epoch), {})
    return number_or_nan(line.get("test_loss")) - number_or_nan(line.get("loss"))


_GAPS: dict[Axis, Callable[[TrainingRun, str], float]] = {
    Axis("loss gap", "linear"): loss_gap,
    Axis("accuracy gap", "linear"): accuracy_gap,
}


def _taus(x: Sequence[float], y: Sequence[float], names: Sequence[str]) -> str:
    """Return Kendall's tau over all runs and within levels."""
    lines = [f"τ {_interval(kendall(x, y))}"]
    within = kendall(x, y, names)
    if within.n and len(set(names)) > 1:
        lines.append(f"within {_interval(within)}")
    return "\n".join(lines)


def _interval(found: Interval) -> str:
    """Format a correlation and its interval."""
    ends = "" if math.isnan(found.low) else f" [{found.low:z.2f}, {found.high:z.2f}]"
    return f"{found.value:z.2f}{ends}".replace("-", "−")
