"""Define the measures that a comparison reads from each training run, and which of them are comparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hessian_tools.analysis.flatness.paired_differences import ALWAYS
from hessian_tools.results.comparability import CONDITIONS, Unlike, differing
from hessian_tools.results.flatness import MATCHED, TRUE, FlatnessResult
from hessian_tools.results.operator_spectrum import Spectrum
from hessian_tools.results.provenance import Analysed, AnalysedParts
from hessian_tools.results.spectrum import SpectrumResult
from ikun_hessian.experiments.grouping import (
    at_moment,
    ended_in_nan,
    epoch_at,
    epochs_to,
    moment_of,
    number_or_nan,
    over,
)

if TYPE_CHECKING:
    from ikun_hessian.experiments.runs import TrainingRun

GAP = "accuracy gap, train - test"
OUTCOME, SPEED, FLAT = "outcome", "speed", "loss under noise"
LARGEST, SMALLEST, TRACE = "lambda_max", "lambda_min", "trace"
SPECTRUM, FLATNESS = "spectrum", "flatness"
CURVATURES = (LARGEST, SMALLEST, TRACE)
# Conditions that must be equal for all runs. Samples may depend on the seed, so they must be equal only within a pair.
ALIKE = tuple(c for c in CONDITIONS if c[:2] != ("data", "sha256"))
SAMPLE_CONDITIONS = tuple(c for c in CONDITIONS if c[:2] == ("data", "sha256"))
# Conditions of the surrogate. The spiking loss itself depends only on the data, the number of steps T and the coding.
OF_CURVATURES = (*(key for part, key, _ in ALIKE if part == "network" and key not in ALWAYS), "parameters")
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Measure:
    """A number that can be read from each run.

    Attributes:
        family: Group of measures within which p-values are adjusted.
        name: Name of the measure.
        value: Function that returns the number of a run: NaN if it is unknown, infinite if the run counts as worse than
            any number (because it diverged or never reached the target).
        unit: "%" for fractions, "epochs", or "".
        source: Kind of result that the number is read from ("spectrum" or "flatness"), or "" for the log.
    """

    family: str
    name: str
    value: Callable[[TrainingRun], float]
    unit: str = ""
    source: str = ""


def measures(runs: Sequence[TrainingRun], moment: str, accuracy: float) -> list[Measure]:
    """List the measures that at least one run has at a moment.

    Args:
        runs: The runs.
        moment: Key of a moment, "" for the end of training.
        accuracy: Test accuracy, between 0 and 1, whose number of epochs is a measure.

    Returns:
        The measures, in the order of the table.
    """
    found = [*_outcomes(runs, moment), *(_speed(accuracy) if not moment and any(run.log for run in runs) else ())]
    results = [r for run in runs if (r := at_moment(run, moment)) is not None]
    operators = dict.fromkeys(name for r in results for name in r.spectra)
    for family, parts in _SPECTRAL.items():
        found += [
            Measure(family, f"{operator} {part}", _of_spectrum(moment, operator, value), source=SPECTRUM)
            for operator in operators
            for part, value in parts.items()
        ]
    sharpness = [flat for run in runs if (flat := run.flatness.get(moment)) is not None]
    names = {name: metric.valid for flat in sharpness for name, metric in flat.main.items()}
    for name, valid in names.items():
        if valid in (TRUE, MATCHED):
            found.append(Measure(FLAT, name, _of_flatness(moment, name), source=FLATNESS))
        elif name.split()[0] not in operators:
            found.append(
                Measure(TRACE if "trace" in name else LARGEST, name, _of_flatness(moment, name), source=FLATNESS)
            )
    return [m for m in found if any(math.isfinite(m.value(run)) for run in runs)]


def _outcomes(runs: Sequence[TrainingRun], moment: str) -> list[Measure]:
    """Return the measures of loss and accuracy, from the logs if there are any."""
    logged, (when, tag) = any(run.log for run in runs), moment_of(moment)
    if tag:
        return []  # a second analysis of the same weights: the outcomes are listed without the tag

    def value(key: str) -> Callable[[TrainingRun], float]:
        worst = INF if key == "loss" else -INF

        def of(run: TrainingRun) -> float:
            if not moment and ended_in_nan(run):
                return worst
            if not moment and not run.finished:
                return NAN
            if not logged:  # use the loss on the analysed samples
                result: Analysed | None = at_moment(run, moment) or run.flatness.get(moment)
                here = result is not None and result.data.get("split") == "train"
                return number_or_nan(getattr(result, key, None)) if here else NAN
            epoch = epoch_at(run, when)
            return next((number_or_nan(line.get(key)) for line in run.log if line["epoch"] == epoch), NAN)

        return of

    loss, accuracy, test = value("loss"), value("accuracy"), value("test_accuracy")
    relaxed = Measure(OUTCOME, "test accuracy, relaxed spikes", value("relaxed_test_accuracy"), "%")

    def gap(run: TrainingRun) -> float:
        difference = accuracy(run) - test(run)
        return difference if math.isfinite(difference) else NAN

    here = "" if logged else ", the samples analysed"
    train = [Measure(OUTCOME, f"train loss{here}", loss), Measure(OUTCOME, f"train accuracy{here}", accuracy, "%")]
    tested = [Measure(OUTCOME, "test accuracy", test, "%"), Measure(OUTCOME, GAP, gap, "%")]
    if any("relaxed_test_accuracy" in line for run in runs for line in run.log[-1:]):
        tested.insert(1, relaxed)
    return tested if moment else [*train, *tested]


def _speed(accuracy: float) -> list[Measure]:
    """Return the measure of the epochs that a run needs to reach a test accuracy."""

    def epochs(run: TrainingRun) -> float:
        epoch, reached = epochs_to(run, accuracy)
        return float(epoch) if reached else INF if run.log and over(run) else NAN

    return [Measure(SPEED, f"epochs to {100 * accuracy:g}% test accuracy", epochs, "epochs")]


def accuracy_gap(run: TrainingRun, moment: str) -> float:
    """Return train accuracy minus test accuracy at a moment, or NaN if unknown."""
    found = [m for m in _outcomes([run], moment_of(moment)[0]) if m.name == GAP]
    return found[0].value(run)


def _of_spectrum(moment: str, operator: str, value: Callable[[Spectrum], float]) -> Callable[[TrainingRun], float]:
    """Return a function that reads a number from a run's spectrum of one operator."""

    def of(run: TrainingRun) -> float:
        result = at_moment(run, moment)
        return value(result.spectra[operator]) if result is not None and operator in result.spectra else NAN

    return of


def _of_flatness(moment: str, name: str) -> Callable[[TrainingRun], float]:
    """Return a function that reads a metric from a run's flatness result."""

    def of(run: TrainingRun) -> float:
        result = run.flatness.get(moment)
        return result.main[name].value if result is not None and name in result.main else NAN

    return of


_SPECTRAL: dict[str, dict[str, Callable[[Spectrum], float]]] = {
    LARGEST: {
        "lambda_max": lambda s: s.eigenvalues[0].value if s.eigenvalues else NAN,
        "lambda_max scaled": lambda s: s.scale_free_lambda_max,
    },
    SMALLEST: {"lambda_min": lambda s: s.smallest_eigenvalues[0].value if s.smallest_eigenvalues else NAN},
    TRACE: {"trace": lambda s: s.trace.estimate if s.trace else NAN},
}


# --- comparability of results
@dataclass(frozen=True)
class LeftOut:
    """A difference between results because of which some measures are not compared.

    Attributes:
        moment: Key of the moment.
        source: Kind of results that differ ("spectrum" or "flatness").
        difference: The condition that differs, with its values.
        curvatures_alone: Whether only the curvatures of the surrogate are excluded, and not the metrics of the spiking
            loss.
    """

    moment: str
    source: str
    difference: Unlike
    curvatures_alone: bool

    def leaves_out(self, measure: Measure) -> bool:
        """Return whether the measure is excluded from the comparison."""
        alike = self.curvatures_alone and measure.family == FLAT
        return measure.source == self.source and not alike


def unlike_results(runs: Sequence[TrainingRun], moment: str) -> list[tuple[list[TrainingRun], LeftOut]]:
    """Find the conditions in which the results of the runs at a moment differ.

    Args:
        runs: The runs.
        moment: Key of the moment.

    Returns:
        For each differing condition, the runs that have such results and the difference.
    """
    spectra = [(run, r) for run in runs if (r := at_moment(run, moment)) is not None]
    sharpness = [(run, flat) for run in runs if (flat := run.flatness.get(moment)) is not None]
    found: list[tuple[list[TrainingRun], LeftOut]] = []

    def differ(having: list[TrainingRun], source: str, *differences: Unlike) -> None:
        found.extend((having, LeftOut(moment, source, d, d.key in OF_CURVATURES)) for d in differences)

    if measured := [r for _, r in spectra]:
        runs = [run for run, _ in spectra]
        differ(runs, SPECTRUM, *differing(measured, ALIKE), *_sizes(measured), *_noises(measured))
    if sharp := [flat for _, flat in sharpness]:
        runs = [run for run, _ in sharpness]
        differ(runs, FLATNESS, *differing(sharp, ALIKE), *_sizes(sharp), *_settings(sharp))
    return found


def unlike_samples(pair: tuple[TrainingRun, TrainingRun], moment: str) -> Iterator[LeftOut]:
    """Yield the kinds of results for which the two runs of a pair were measured on different samples."""
    spectra, sharpness = [at_moment(run, moment) for run in pair], [run.flatness.get(moment) for run in pair]
    for source, results in ((SPECTRUM, spectra), (FLATNESS, sharpness)):
        both: list[Analysed] = [r for r in results if r is not None]
        if len(both) == 2 and (unlike := differing(both, SAMPLE_CONDITIONS)):
            yield LeftOut(moment, source, unlike[0], False)


def _sizes(found: Sequence[AnalysedParts]) -> list[Unlike]:
    """Return the difference between the sets of parameters, if there is one."""
    sizes = tuple(tuple(sorted(r.parameters.items())) for r in found)
    return [Unlike("parameters", "set of parameters", sizes)] if len(set(sizes)) > 1 else []


def _noises(found: Sequence[SpectrumResult]) -> list[Unlike]:
    """Return the difference between the noises of the smoothed operator, if there is one."""
    usual = next((r.settings.get("noise") for r in found if "smoothed" in r.spectra), None)
    noises = tuple(r.settings.get("noise") if "smoothed" in r.spectra else usual for r in found)
    return [Unlike("noise", "noise of the smoothed operator", noises)] if len(set(noises)) > 1 else []


def _settings(found: Sequence[FlatnessResult]) -> list[Unlike]:
    """Return the settings of flatness results that differ, except the memory limit."""
    names = dict.fromkeys(name for r in found for name in r.settings if name != "memory")
    return differing(found, [("settings", name, f"setting {name}") for name in names])
