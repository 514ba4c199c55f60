"""Levels of one condition (initializers) compared over runs: medians over seeds, and paired differences to a reference.

Runs of two levels and one seed pair, so that what the seed does to both drops out. Whatever else was varied (optimizer,
data, ...) makes settings, each compared by itself: pairs of several settings are not independent, and what a level does
need not be the same in all. Positive numbers are compared by their ratio, all others by their difference. Everything
rests on ranks (see ikun_hessian.experiments.statistics), in which a run that diverged counts as worse than any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hessian_tools.io.json import ResultError
from hessian_tools.results.comparability import Unlike, refuse_unlike
from ikun_hessian.experiments import statistics as inference
from ikun_hessian.experiments.grouping import (
    at_moment,
    cut,
    display_name,
    epochs_to,
    level,
    moment_of,
    plain,
    settings_groups,
)
from ikun_hessian.experiments.measures import (
    CURVATURES,
    FLAT,
    SPEED,
    LeftOut,
    Measure,
    accuracy_gap,
    measures,
    unlike_results,
    unlike_samples,
)
from ikun_hessian.experiments.pairing import Paired, pair_runs
from ikun_hessian.experiments.statistics import Interval, SampleSize

if TYPE_CHECKING:
    from ikun_hessian.experiments.runs import TrainingRun

MARGIN, WIDEST, ACCURACY = 1.25, 100.0, 0.9
END = "end"  # what the user calls the moment ""
NAN = math.nan
NO_INTERVAL, NO_SIZE = Interval(), SampleSize()


@dataclass(frozen=True)
class Row:
    """One measure of one level. values: by run, NaN where there is none, infinite where the run is worse than any.

    median: over the level's runs, worst ones included; of epochs Kaplan and Meier's. lost: runs without a finite value.
    The rest is against the reference, over `pairs` runs in pairs, empty for the reference itself. shift: the ratio
    (ratio: True) or difference to the reference's run in a pair, by Hodges and Lehmann. p: exact, signed ranks (of
    epochs: the log-rank test stratified by pair); holm: adjusted within the family. equivalence: p of both one-sided
    tests that the ratio lies outside the margin, adjusted likewise. effect: d_z, of logarithms for ratios. superiority:
    share of the pairs in which the level has the larger number. needed: pairs to plan with.
    """

    family: str
    measure: str
    unit: str
    moment: str
    level: str
    values: dict[str, float]
    median: Interval
    lost: int
    ratio: bool
    pairs: int = 0
    shift: Interval = NO_INTERVAL
    p: float = NAN
    holm: float = NAN
    equivalence: float = NAN
    effect: Interval = NO_INTERVAL
    superiority: Interval = NO_INTERVAL
    needed: SampleSize = NO_SIZE


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau of a measure with the accuracy gap (train - test): over all runs, and over pairs within a level."""

    measure: str
    moment: str
    overall: Interval
    within: Interval


@dataclass(frozen=True)
class StartingCost:
    """What a level's initializer costs, once: medians over its runs."""

    seconds: float
    forward_passes: float


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found. seeds: of all runs. logged: how many have a log.

    follows: conditions whose value goes with the level (the learning rate of an optimizer): the comparison is of both.
    unpaired: by level, runs without a partner in the reference. lost: what went wrong, by run. left_out: what was not
    measured alike, because of the condition itself. surrogates: by moment, that of the analysis, where there is one and
    some run was trained with another. start: by level, where initializers are compared.
    """

    by: str
    reference: str
    levels: dict[str, int]
    accuracy: float
    margin: float
    moments: tuple[str, ...]
    seeds: tuple[str, ...]
    logged: int
    follows: dict[str, dict[str, str]]
    unpaired: dict[str, tuple[str, ...]]
    lost: dict[str, str]
    left_out: tuple[LeftOut, ...]
    rows: tuple[Row, ...]
    correlations: tuple[Correlation, ...]
    data: str = ""
    surrogates: dict[str, str] = field(default_factory=dict)
    start: dict[str, StartingCost] = field(default_factory=dict)

    @property
    def most_pairs(self) -> int:
        return max((row.pairs for row in self.rows), default=0)


def compare_runs(
    runs: Sequence[TrainingRun],
    by: str = "init",
    *,
    reference: str | None = None,
    accuracy: float = ACCURACY,
    margin: float = MARGIN,
    moments: Sequence[str] | None = None,
) -> Comparison:
    """The levels of the condition `by` (any key of Run.value) against a reference level, in runs of one setting.

    reference: kaiming if there is one, else the first. accuracy: of the test split, 0 to 1, for the epochs to get
    there. margin: ratios from 1 / margin to it count as alike. moments: keys of results without a tag ("end" or "" for
    the final weights, "loss0.02"); by default the end and every matched loss. Raises ResultError for fewer than two
    levels, an unknown condition, reference or moment, runs of several settings or that differ in nothing, and for what
    was not measured alike though `by` is not the reason; where it is, the curvatures are left out and listed.
    """
    if not 0 < accuracy <= 1:
        raise ResultError(f"--accuracy {accuracy:g}: give a share of the test images, above 0 and at most 1")
    if not 1 < margin <= WIDEST:
        raise ResultError(
            f"--margin {margin:g}: give a ratio above 1 and at most {WIDEST:g}, for instance 1.25 for 0.8 to 1.25"
        )
    paired = pair_runs(runs, by, reference)
    chosen = _moments(runs, moments)
    left_out = [gap for moment in chosen for gap in _refuse(paired, moment)]
    rows: list[Row] = []
    correlations: list[Correlation] = []
    for moment in chosen:
        gone = [gap for gap in left_out if gap.moment == moment]
        found = [m for m in measures(paired.runs, moment, accuracy) if not any(gap.leaves_out(m) for gap in gone)]
        for family in dict.fromkeys(m.family for m in found):
            some = [m for m in found if m.family == family]
            settings_groups = _Settings(accuracy, margin, len(some) * len(paired.pairs))
            rows += _adjusted([row for m in some for row in _rows(paired, m, moment, settings_groups)])
        correlations += _correlations(paired, [m for m in found if m.family in (*CURVATURES, FLAT)], moment)
    logged = sum(bool(run.log) for run in paired.runs)
    return Comparison(
        by=by,
        reference=paired.reference,
        levels={name: len(some) for name, some in paired.levels.items()},
        accuracy=accuracy,
        margin=margin,
        moments=tuple(chosen),
        seeds=paired.seeds,
        logged=logged,
        follows=paired.follows,
        unpaired=paired.unpaired,
        lost={run.name: why for run in paired.runs if (why := _lost(run, logged > 0))},
        left_out=tuple(left_out),
        rows=tuple(rows),
        correlations=tuple(correlations),
        data=_data(paired.runs),
        surrogates={moment: name for moment in chosen if (name := _surrogate(paired.runs, moment))},
        start=_starts(paired) if by == "init" else {},
    )


def compare_settings(
    runs: Sequence[TrainingRun],
    by: str = "init",
    *,
    reference: str | None = None,
    accuracy: float = ACCURACY,
    margin: float = MARGIN,
    moments: Sequence[str] | None = None,
) -> dict[str, Comparison | str]:
    """`compare_runs` for every setting that was varied besides `by` and the seed, by its name ("" where nothing was),
    or why its runs cannot be compared; under "" where none can, all for one reason."""
    groups = settings_groups(runs, by)
    if by == "seed" or len({level(run, by) for run in runs}) < 2:
        groups = {"": list(runs)}
    found: dict[str, Comparison | str] = {}
    for name, some in groups.items():
        try:
            found[name] = compare_runs(some, by, reference=reference, accuracy=accuracy, margin=margin, moments=moments)
        except ResultError as error:
            found[name] = str(error)
    reasons = set(map(str, found.values())) if all(isinstance(c, str) for c in found.values()) else set()
    return {"": reasons.pop()} if len(reasons) == 1 else found


def _data(runs: Sequence[TrainingRun]) -> str:
    """What all runs were trained on."""
    shared = ("name", "model", "surrogate", "norm", "timesteps")
    known = [(key, run_values) for key in shared if len(run_values := {plain(run.value(key)) for run in runs}) == 1]
    return ", ".join(display_name(key, runs[0].value(key)) for key, _ in known if runs[0].value(key) is not None)


def _surrogate(runs: Sequence[TrainingRun], moment: str) -> str:
    """The one surrogate of the spectra, or of flatness where there are none; "" where it is what all were trained with,
    or not one."""
    spectra = [r.network for run in runs if (r := at_moment(run, moment)) is not None]
    found = spectra or [flat.network for run in runs if (flat := run.flatness.get(moment)) is not None]
    names = {str(network.get("surrogate")) for network in found}
    trained = {str(network.get("trained_surrogate", network.get("surrogate"))) for network in found}
    return names.pop() if len(names) == 1 and names != trained else ""


def _starts(paired: Paired) -> dict[str, StartingCost]:
    """Of the levels whose cost is known."""
    found = {}
    for name, runs in paired.levels.items():
        known = [run.start for run in runs if run.start is not None]
        columns = [[x for s in known if (x := s.get(key)) is not None] for key in ("seconds", "forward_passes")]
        if all(columns):
            found[name] = StartingCost(*(inference.median(column).value for column in columns))
    return found


def _lost(run: TrainingRun, logged: bool) -> str:
    """What went wrong with a run. logged: whether there are logs, so that one is missed."""
    wrong = [f for f in run.failures if f.startswith(("NaN", "failed"))]
    wrong += [] if run.finished or wrong else ["not finished"]
    if logged and cut(run):
        wrong.append(f"the log ends at epoch {len(run.log)} of {run.epochs_run}: what came later is not known")
    return "; ".join(wrong)


# --- pairs
def _moments(runs: Sequence[TrainingRun], asked: Sequence[str] | None) -> list[str]:
    known = list(dict.fromkeys(key for run in runs for key in ("", *run.spectra, *run.flatness)))
    if asked:
        wanted = ["" if key == END else key for key in asked]
        if missing := [key for key in wanted if key not in known]:
            raise ResultError(
                f"--moment {missing[0]}: nothing was measured there: {', '.join(k or END for k in known)}"
            )
        return list(dict.fromkeys(wanted))
    losses = {key for key in known if moment_of(key)[0].startswith("loss") and not moment_of(key)[1]}
    return ["", *sorted(losses, key=lambda key: -float(key[4:]))]


def _refuse(paired: Paired, moment: str) -> list[LeftOut]:
    """What must be left out because the levels themselves were not measured alike; raises ResultError for the rest."""
    left_out = []
    names = {run.name: name for name, some in paired.levels.items() for run in some}
    for runs, gap in unlike_results(paired.runs, moment):
        values: dict[str, set[object]] = {}
        for run, value in zip(runs, gap.difference.values, strict=True):
            values.setdefault(names[run.name], set()).add(plain(value))
        if all(len(some) == 1 for some in values.values()):
            left_out.append(gap)
            continue
        refuse_unlike([run.name for run in runs], _sized(gap.difference), "measure all alike")
    for pair in (pair for some in paired.pairs.values() for pair in some):
        for gap in unlike_samples(pair, moment):
            if not any(key in pair[0].data for key in (paired.by, *paired.follows)):
                refuse_unlike([run.name for run in pair], gap.difference, "measure a pair on the same samples")
            left_out.append(gap)
    return list({(gap.source, gap.difference.key): gap for gap in left_out}.values())


def _sized(difference: Unlike) -> Unlike:
    """With the number of weights for sets of parameters, where that tells them apart."""
    if difference.key != "parameters":
        return difference
    sizes = tuple(f"{sum(count for _, count in value):,} weights" for value in difference.values)
    return replace(difference, values=sizes) if len(set(sizes)) > 1 else difference


# --- numbers
@dataclass(frozen=True)
class _Settings:
    """comparisons: in the family that p-values are adjusted for."""

    accuracy: float
    margin: float
    comparisons: int


def _rows(paired: Paired, measure: Measure, moment: str, settings: _Settings) -> list[Row]:
    values = {run.name: measure.value(run) for run in paired.runs}
    ratio = measure.unit != "%" and all(v > 0 for v in values.values() if not math.isnan(v))
    rows = []
    for name, runs in paired.levels.items():
        known = [values[run.name] for run in runs if not math.isnan(values[run.name])]
        middle = inference.median(known)
        if measure.family == SPEED:
            logged = [epochs_to(run, settings.accuracy) for run in runs if run.log]
            middle = inference.survival_median([t for t, _ in logged], [reached for _, reached in logged])
        row = Row(
            family=measure.family,
            measure=measure.name,
            unit=measure.unit,
            moment=moment,
            level=name,
            values={run.name: values[run.name] for run in runs},
            median=middle,
            lost=len(runs) - sum(map(math.isfinite, known)),
            ratio=ratio,
        )
        if name != paired.reference:
            row = _against(row, paired.pairs[name], values, settings)
        rows.append(row)
    return rows


def _differences(pairs: Sequence[tuple[float, float]], ratio: bool) -> npt.NDArray[np.float64]:
    """x - y, or log x - log y, of every pair, without the last digits: rounding must not break ties."""
    d = np.array([math.log(x) - math.log(y) if ratio else x - y for x, y in pairs])
    sizes = [1.0] if ratio else [abs(z) for pair in pairs for z in pair if math.isfinite(z)]
    digit = 1e-12 * max(sizes, default=0.0)
    return np.rint(d / digit) * digit if digit else d


def _against(
    row: Row, pairs: Sequence[tuple[TrainingRun, TrainingRun]], values: dict[str, float], settings: _Settings
) -> Row:
    """The row with what its pairs say; those in which both are worst, or one is not known, say nothing."""
    both = [(values[a.name], values[b.name]) for a, b in pairs]
    known = [(x, y) for x, y in both if not (math.isnan(x) or math.isnan(y) or (math.isinf(x) and x == y))]
    d = _differences(known, row.ratio)
    bound = math.log(settings.margin) if row.ratio else NAN
    shift = inference.paired_shift(d)
    if row.ratio:
        shift = replace(shift, value=_exp(shift.value), low=_exp(shift.low), high=_exp(shift.high))
    row = replace(
        row,
        pairs=len(d),
        shift=shift,
        effect=inference.effect_size(d),
        superiority=inference.superiority(d),
        needed=inference.sample_size(d, bound, settings.comparisons),
    )
    if len(d) < inference.LEAST:
        return row
    p = inference.signed_rank(d)
    if row.family == SPEED:
        times = [
            (*epochs_to(a, settings.accuracy), *epochs_to(b, settings.accuracy)) for a, b in pairs if a.log and b.log
        ]
        p = inference.paired_log_rank(*zip(*times, strict=True))
    return replace(row, p=p, equivalence=inference.equivalence(d, bound) if row.ratio else NAN)


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def _adjusted(block: Sequence[Row]) -> list[Row]:
    """The rows of a family with their p-values adjusted among them."""
    p, alike = (inference.holm([getattr(row, key) for row in block]) for key in ("p", "equivalence"))
    return [replace(row, holm=x, equivalence=y) for row, x, y in zip(block, p, alike, strict=True)]


def _correlations(paired: Paired, found: Sequence[Measure], moment: str) -> list[Correlation]:
    """Of the runs whose gap and measure are known."""
    names = {run.name: name for name, some in paired.levels.items() for run in some}
    gaps = {run.name: accuracy_gap(run, moment) for run in paired.runs}
    rows = []
    for measure in found:
        values = {run.name: measure.value(run) for run in paired.runs}
        known = [name for name in names if math.isfinite(values[name]) and math.isfinite(gaps[name])]
        x, y = [values[name] for name in known], [gaps[name] for name in known]
        within = inference.kendall(x, y, [names[name] for name in known])
        if len(known) >= inference.LEAST:
            rows.append(Correlation(measure.name, moment, inference.kendall(x, y), within))
    return rows
