"""Compare the levels of one condition (such as the initializer) over training runs.

For each measure, the comparison reports the median over seeds and the paired differences to a reference level. Runs
with the same seed are paired, which cancels effects of the seed. If other settings vary too (optimizer, data, ...),
each combination of them is compared on its own: pairs from different settings are not independent, and the effect of a
level may differ between them. Positive measures are compared by their ratio, all others by their difference. The
statistics are based on ranks (see `ikun_hessian.experiments.comparison.statistics`); a run that diverged counts as
worse than any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hessian_tools.io.json import ResultError
from hessian_tools.results.comparability import Unlike, refuse_unlike
from ikun_hessian.experiments.comparison import statistics as inference
from ikun_hessian.experiments.comparison.censored import CensoredPairs, censored_pairs
from ikun_hessian.experiments.comparison.measures import (
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
from ikun_hessian.experiments.comparison.pairing import Paired, pair_runs
from ikun_hessian.experiments.comparison.result import Comparison, Correlation, Row, StartingCost
from ikun_hessian.experiments.comparison.sample_size import sample_size
from ikun_hessian.experiments.grouping import (
    at_moment,
    cut,
    display_name,
    epochs_to,
    horizon,
    level,
    moment_of,
    plain,
    settings_groups,
)

if TYPE_CHECKING:
    from ikun_hessian.experiments.runs import TrainingRun

MARGIN, WIDEST, ACCURACY = 1.25, 100.0, 0.9
END = "end"  # name of the moment "" for users
NAN = math.nan


def compare_runs(
    runs: Sequence[TrainingRun],
    by: str = "init",
    *,
    reference: str | None = None,
    accuracy: float = ACCURACY,
    margin: float = MARGIN,
    moments: Sequence[str] | None = None,
) -> Comparison:
    """Compare the levels of a condition with a reference level, over runs of one setting.

    If results differ because of the compared condition itself, the measures that are not comparable are excluded and
    listed in `left_out`.

    Args:
        runs: Runs of one setting.
        by: The compared condition: any key that `TrainingRun.value` accepts.
        reference: The reference level. By default "kaiming" if it is one of the levels, otherwise the first level.
        accuracy: Test accuracy, in (0, 1], for the number of epochs to reach it.
        margin: Ratios between 1 / margin and margin count as equivalent.
        moments: Keys of results without a tag ("end" or "" for the final weights, "loss0.02"). By default the end of
            training and every matched loss.

    Returns:
        The comparison.

    Raises:
        ResultError: If there are fewer than two levels; the condition, the reference or a moment is unknown; an
            argument is out of range; the runs have several settings or two of them are identical; or results differ for
            a reason other than the compared condition.
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
    """Apply `compare_runs` to each setting that varies apart from `by` and the seed.

    Args:
        runs: The runs, of any number of settings.
        by: The compared condition.
        reference: See `compare_runs`.
        accuracy: See `compare_runs`.
        margin: See `compare_runs`.
        moments: See `compare_runs`.

    Returns:
        For each setting by name ("" if no setting varies), its comparison or the reason why its runs cannot be
        compared. If no setting can be compared and all have the same reason, that reason under "".
    """
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
    """Describe the data and network that all runs share."""
    shared = ("name", "model", "surrogate", "norm", "timesteps")
    known = [(key, run_values) for key in shared if len(run_values := {plain(run.value(key)) for run in runs}) == 1]
    return ", ".join(display_name(key, runs[0].value(key)) for key, _ in known if runs[0].value(key) is not None)


def _surrogate(runs: Sequence[TrainingRun], moment: str) -> str:
    """Return the surrogate of the analysis, or "" if it is not unique or all runs were trained with it.

    It is read from the spectra, or from the flatness results if there are no spectra.
    """
    spectra = [r.network for run in runs if (r := at_moment(run, moment)) is not None]
    found = spectra or [flat.network for run in runs if (flat := run.flatness.get(moment)) is not None]
    names = {str(network.get("surrogate")) for network in found}
    trained = {str(network.get("trained_surrogate", network.get("surrogate"))) for network in found}
    return names.pop() if len(names) == 1 and names != trained else ""


def _starts(paired: Paired) -> dict[str, StartingCost]:
    """Return the cost of the initializer of each level for which it is known."""
    found = {}
    for name, runs in paired.levels.items():
        known = [run.start for run in runs if run.start is not None]
        columns = [[x for s in known if (x := s.get(key)) is not None] for key in ("seconds", "forward_passes")]
        if all(columns):
            found[name] = StartingCost(*(inference.median(column).value for column in columns))
    return found


def _lost(run: TrainingRun, logged: bool) -> str:
    """Describe what went wrong with a run.

    `logged` says whether other runs have logs, so that an incomplete log is worth a mention.
    """
    wrong = [f for f in run.failures if f.startswith(("NaN", "failed"))]
    wrong += [] if run.finished or wrong else ["not finished"]
    if logged and cut(run):
        wrong.append(f"the log ends at epoch {len(run.log)} of {run.epochs_run}: later epochs are unknown")
    return "; ".join(wrong)


# --- pairs
def _moments(runs: Sequence[TrainingRun], asked: Sequence[str] | None) -> list[str]:
    """Return the keys of the moments to compare; raise ResultError for one without results."""
    known = list(dict.fromkeys(key for run in runs for key in ("", *run.spectra, *run.flatness)))
    if asked:
        wanted = ["" if key == END else key for key in asked]
        if missing := [key for key in wanted if key not in known]:
            raise ResultError(
                f"--moment {missing[0]}: no results at it: choose one of {', '.join(k or END for k in known)}"
            )
        return list(dict.fromkeys(wanted))
    losses = {key for key in known if moment_of(key)[0].startswith("loss") and not moment_of(key)[1]}
    return ["", *sorted(losses, key=lambda key: -float(key[4:]))]


def _refuse(paired: Paired, moment: str) -> list[LeftOut]:
    """Return the differences that exclude measures because the compared condition causes them.

    Raise ResultError for any other difference between results.
    """
    left_out = []
    names = {run.name: name for name, some in paired.levels.items() for run in some}
    for runs, gap in unlike_results(paired.runs, moment):
        values: dict[str, set[object]] = {}
        for run, value in zip(runs, gap.difference.values, strict=True):
            values.setdefault(names[run.name], set()).add(plain(value))
        if all(len(some) == 1 for some in values.values()):
            left_out.append(gap)
            continue
        refuse_unlike([run.name for run in runs], _sized(gap.difference), "measure all runs in the same way")
    for pair in (pair for some in paired.pairs.values() for pair in some):
        for gap in unlike_samples(pair, moment):
            if not any(key in pair[0].data for key in (paired.by, *paired.follows)):
                refuse_unlike(
                    [run.name for run in pair], gap.difference, "measure both runs of a pair on the same samples"
                )
            left_out.append(gap)
    return list({(gap.source, gap.difference.key): gap for gap in left_out}.values())


def _sized(difference: Unlike) -> Unlike:
    """Replace sets of parameters by their numbers of weights, if these differ."""
    if difference.key != "parameters":
        return difference
    sizes = tuple(f"{sum(count for _, count in value):,} weights" for value in difference.values)
    return replace(difference, values=sizes) if len(set(sizes)) > 1 else difference


# --- numbers
@dataclass(frozen=True)
class _Settings:
    """Settings of the statistics. `comparisons` is the size of the family that p-values are adjusted for."""

    accuracy: float
    margin: float
    comparisons: int


def _rows(paired: Paired, measure: Measure, moment: str, settings: _Settings) -> list[Row]:
    """Return the rows of a measure, one per level."""
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
    """Return x - y, or log x - log y, for each pair.

    The differences are rounded to 12 digits, so that rounding errors do not break ties.
    """
    d = np.array([math.log(x) - math.log(y) if ratio else x - y for x, y in pairs])
    sizes = [1.0] if ratio else [abs(z) for pair in pairs for z in pair if math.isfinite(z)]
    digit = 1e-12 * max(sizes, default=0.0)
    return np.rint(d / digit) * digit if digit else d


def _against(
    row: Row, pairs: Sequence[tuple[TrainingRun, TrainingRun]], values: dict[str, float], settings: _Settings
) -> Row:
    """Complete a row with the comparison to the reference.

    Pairs in which both values are equally infinite or one is unknown are ignored. For numbers of epochs, a run that did
    not reach the target is censored instead: if there is one, the estimate, its interval, the tests, the fraction of
    larger values and the number of pairs needed are those of `censored`. The effect size would be biased by the
    censoring, so it is left out.
    """
    both = [(values[a.name], values[b.name]) for a, b in pairs]
    known = [(x, y) for x, y in both if not (math.isnan(x) or math.isnan(y) or (math.isinf(x) and x == y))]
    d = _differences(known, row.ratio)
    bound = math.log(settings.margin) if row.ratio else NAN
    logged = [(a, b) for a, b in pairs if a.log and b.log and min(horizon(a), horizon(b)) > 0]
    times = _times(logged, settings.accuracy) if row.family == SPEED and row.ratio else None
    if times is not None and times.censored.any():
        row = replace(
            row,
            pairs=len(d),
            shift=times.ratio(),
            superiority=inference.superiority(times.differences(0.0)),
            needed=sample_size(times.differences(0.0), comparisons=settings.comparisons),
        )
        if len(logged) < inference.LEAST:
            return row
        return replace(row, p=times.p(), equivalence=times.equivalence(settings.margin))
    shift = inference.paired_shift(d)
    if row.ratio:
        shift = replace(shift, value=_exp(shift.value), low=_exp(shift.low), high=_exp(shift.high))
    row = replace(
        row,
        pairs=len(d),
        shift=shift,
        effect=inference.effect_size(d),
        superiority=inference.superiority(d),
        needed=sample_size(d, bound, settings.comparisons),
    )
    if len(d) < inference.LEAST:
        return row
    p = inference.signed_rank(d)
    return replace(row, p=p, equivalence=inference.equivalence(d, bound) if row.ratio else NAN)


def _times(pairs: Sequence[tuple[TrainingRun, TrainingRun]], accuracy: float) -> CensoredPairs:
    """Return the numbers of epochs to an accuracy, with the horizon of every run."""
    first, second = ([(*epochs_to(run, accuracy), horizon(run)) for run in runs] for runs in _columns(pairs))
    return censored_pairs(first, second)


def _columns(pairs: Sequence[tuple[TrainingRun, TrainingRun]]) -> tuple[list[TrainingRun], list[TrainingRun]]:
    """Return the first and the second runs of the pairs."""
    return [a for a, _ in pairs], [b for _, b in pairs]


def _exp(x: float) -> float:
    """Return exp(x), or infinity if it would overflow."""
    return math.inf if x > 700 else math.exp(x)


def _adjusted(block: Sequence[Row]) -> list[Row]:
    """Adjust the p-values of the rows of a family."""
    p, alike = (inference.holm([getattr(row, key) for row in block]) for key in ("p", "equivalence"))
    return [replace(row, holm=x, equivalence=y) for row, x, y in zip(block, p, alike, strict=True)]


def _correlations(paired: Paired, found: Sequence[Measure], moment: str) -> list[Correlation]:
    """Return the correlations over the runs whose accuracy gap and measure are both known."""
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
