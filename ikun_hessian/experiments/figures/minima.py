"""Charts of the minima that runs reached: ranks, one-image, layers and samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from hessian_tools.plots.curves import densities_of, density_curves, one_eigenvalue, symlog_axis
from hessian_tools.plots.style import operator_name
from hessian_tools.results.comparability import differing
from hessian_tools.results.operator_spectrum import Eigenvalue, Spectrum
from hessian_tools.results.spectrum import SamplePoint, SpectrumResult
from ikun_hessian.experiments.comparison.measures import ALIKE
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
    at_moment,
    level,
    levels,
    moment_name,
    moment_of,
    moments,
    quartiles,
    settings_groups,
    show,
    titled,
)
from ikun_hessian.experiments.runs import TrainingRun

_Found = list[tuple[TrainingRun, SpectrumResult]]
POINTS = 240  # number of points of a density curve
PLACE = Axis("rank (1: flattest)", "place")
RANK, TOPS = Axis("rank (P: smallest λ)", "rank"), Axis("rank (1: largest λ)", "rank")
MEASURED = "run `ikun-hessian spectrum` on the checkpoints"


def at_moments(runs: Sequence[TrainingRun], by: str) -> dict[tuple[str, str], _Found]:
    """Collect the spectra of runs by setting and moment.

    Args:
        runs: The runs.
        by: The condition that is compared.

    Returns:
        By setting and moment, the runs with their spectra.

    Raises:
        NotEnoughError: If there is no spectrum, or if the spectra of a panel were measured differently.
    """
    found: dict[tuple[str, str], _Found] = {}
    for name, members in settings_groups(runs, by).items():
        for moment in moments(members):
            pairs = [(run, result) for run in members if (result := at_moment(run, moment))]
            alike([result for _, result in pairs], titled(name, moment))
            found |= {(name, moment): pairs} if pairs else {}
    if not found:
        raise NotEnoughError(f"no run has a spectrum at a training loss or at the end of training: {MEASURED}")
    return found


def columns_of(found: Iterable[tuple[str, str]]) -> tuple[dict[tuple[str, str], str], str]:
    """Return column titles by setting and moment, and a sentence for the caption if all have the same moment."""
    keys = list(found)
    shared = {moment for _, moment in keys}
    if len(keys) > 1 and len(shared) == 1:
        return {key: key[0] for key in keys}, f" All spectra: {moment_name(shared.pop())}."
    return {key: titled(*key) for key in keys}, ""


def alike(results: Sequence[SpectrumResult], title: str) -> None:
    """Check that the spectra of a panel were measured in the same way, possibly on different samples.

    Args:
        results: The spectra.
        title: Title of the panel, for the error message.

    Raises:
        NotEnoughError: If the spectra were measured differently. The message names the first condition that differs.
    """
    for found in differing(results, ALIKE) if results else ():
        values = list(dict.fromkeys(show(v) for v in found.values))
        raise NotEnoughError(
            f"the spectra were measured differently ({title}): the {found.meaning} differs, {', '.join(values[:3])}"
        )


def ranks_chart(runs: Sequence[TrainingRun], by: str) -> Chart:
    """Chart eigenvalues against rank, norm-scaled eigenvalues, and densities, for each operator.

    Args:
        runs: The runs.
        by: The condition that is compared.

    Returns:
        The chart, with a column for each setting and moment.

    Raises:
        NotEnoughError: If there is no spectrum, or if the spectra of a panel were measured differently.
    """
    found, names, groups = at_moments(runs, by), levels(runs, by), settings_groups(runs, by)
    operators = list(dict.fromkeys(name for pairs in found.values() for _, r in pairs for name in r.spectra))
    columns, shared = columns_of(found)
    gaps = any(len(pairs) < len(groups[setting]) for (setting, _), pairs in found.items())
    panels = {kind: [] for kind in ("rank", "scaled", "density")}  # type: dict[str, list[Panel]]
    for operator in operators:
        label = operator_name(operator)
        for (setting, moment), pairs in found.items():
            column = columns[setting, moment]
            foot = f"{len(pairs)} of {len(groups[setting])} runs" if gaps else ""
            spectra = [(run, r.spectra[operator]) for run, r in pairs if operator in r.spectra]
            members, samples = tuple(groups[setting]), samples_of([r for _, r in pairs])
            marks = rank_marks(spectra, by)
            y = Axis(f"{label} eigenvalue λ", "signed")
            panels["rank"].append(Panel(y.label, column, rank_axis(marks), y, marks, members, foot, samples=samples))
            if any(s.scale_free for _, s in spectra):
                y = Axis(f"{label} λ, norm-scaled", "signed")
                scaled = rank_marks([(run, _scaled(s)) for run, s in spectra], by)
                panels["scaled"].append(Panel(y.label, column, TOPS, y, scaled, members))
            elif scaled := strip([(run, s.scale_free_lambda_max) for run, s in spectra], by, names):
                x, y = Axis("", "names", tuple(names)), Axis(f"{label} λ₁, norm-scaled", "log")
                panels["scaled"].append(Panel(y.label, column, x, y, scaled, members))
    panels["density"] = [panel for operator in operators for panel in _densities(found, columns, operator, by)]
    caption = (
        f"Eigenvalues by rank: {_dots(panels['rank'])}.{shared} Norm-scaled: with weights in units of each filter’s "
    )
    caption += "norm; bars: medians." if any(panel.x.kind == "names" for panel in panels["scaled"]) else "norm."
    if panels["density"]:
        bounds = dict.fromkeys(f"±{panel.x.linthresh:.2g}" for panel in panels["density"])
        caption += (
            " Density of the bulk: mean over runs, drawn where it exceeds one eigenvalue; its axis is linear within "
        )
        caption += f"{' and '.join(bounds)} and logarithmic outside."
    return Chart(tuple(itertools.chain(*panels.values())), by, caption, tuple(runs))


def _dots(panels: Sequence[Panel]) -> str:
    """Describe for the caption how eigenvalues by rank are drawn."""
    notes = {mark.note for panel in panels for mark in panel.marks}
    text = f"one dot per run, {reading(panels)} over seeds"
    text += "; hollow: not converged" if "not converged" in notes else ""
    return text + ("; ×: diverged runs, not included in medians" if "diverged" in notes else "")


def rank_marks(spectra: Sequence[tuple[TrainingRun, Spectrum]], by: str) -> tuple[Mark, ...]:
    """Return marks of eigenvalues by rank.

    Args:
        spectra: Runs and their spectra.
        by: The condition that is compared.

    Returns:
        A dot for each eigenvalue, and medians by level. The smallest eigenvalues have the ranks -1 (for P), -2 (for
        P - 1) and so on.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    marks: list[Mark] = []
    for run, spectrum in spectra:
        ranked: list[tuple[int, Eigenvalue]] = [*enumerate(spectrum.eigenvalues, 1)]
        ranked += [(-rank, e) for rank, e in enumerate(spectrum.smallest_eigenvalues, 1)]
        for rank, e in ranked:
            note = "diverged" if run.diverged else "" if e.converged else "not converged"
            marks.append(Mark(level(run, by), "run", rank, e.value, run=run.name, note=note))
            if not run.diverged:
                points.setdefault(level(run, by), []).append((rank, e.value))
    return (*marks, *(mark for name, found in points.items() for mark in medians(name, found)))


def _scaled(spectrum: Spectrum) -> Spectrum:
    """Return the spectrum with its eigenvalues replaced by the norm-scaled ones."""
    found = (Eigenvalue(value, math.nan, math.nan, True, {}) for value in spectrum.scale_free)
    return replace(spectrum, eigenvalues=tuple(found), smallest_eigenvalues=())


def rank_axis(marks: Iterable[Mark]) -> Axis:
    """Return the axis of ranks for these marks."""
    return RANK if any(mark.x < 0 for mark in marks) else TOPS


def strip(values: Iterable[tuple[TrainingRun, float]], by: str, names: Sequence[str]) -> tuple[Mark, ...]:
    """Return marks of one value per run.

    Args:
        values: Runs and their values. Values that are not finite are skipped.
        by: The condition that is compared.
        names: Names of the levels in the order of their positions.

    Returns:
        A dot for each run at the position of its level, and a bar at the median.
    """
    marks: list[Mark] = []
    for run, value in values:
        if math.isfinite(value):
            note = "diverged" if run.diverged else ""
            marks.append(Mark(level(run, by), "run", names.index(level(run, by)), value, run=run.name, note=note))
    for name in dict.fromkeys(mark.level for mark in marks):
        known = [mark.value for mark in marks if mark.level == name and not mark.note]
        if known:
            marks.append(Mark(name, "bar", names.index(name), quartiles(known)[1], n=len(known)))
    return tuple(marks)


def _densities(
    found: Mapping[tuple[str, str], _Found], titles: Mapping[tuple[str, str], str], operator: str, by: str
) -> list[Panel]:
    """Return panels of the mean bulk density of each level, with one eigenvalue axis for all columns."""
    columns = {
        titles[key]: [(run, r) for run, r in pairs if not run.diverged and operator in r.spectra]
        for key, pairs in found.items()
    }
    every = [r.spectra[operator] for pairs in columns.values() for _, r in pairs]
    if not every:
        return []
    whole = replace(found[next(iter(found))][0][1], spectra={f"{i}": s for i, s in enumerate(every)})
    densities = list(densities_of(whole).values())
    if not any(any(nodes) for d in densities for nodes in d.nodes):
        return []
    axis = symlog_axis(whole)
    low, high = (float(u) for u in axis.forward(np.array([axis.low, axis.high])))
    grid = axis.inverse(np.linspace(low, high, POINTS))
    floor = one_eigenvalue(densities, grid, axis) / max(whole.num_parameters, 1)
    panels = []
    for column, pairs in columns.items():
        curves: dict[str, list[np.ndarray]] = {}
        for run, r in pairs:
            density = r.spectra[operator].density
            if density is not None and density.nodes:
                x, y = density_curves(density, axis)
                mean = np.interp(axis.forward(grid), axis.forward(x), y.mean(0), 0, 0) if len(x) else 0 * grid
                curves.setdefault(level(run, by), []).append(mean)
        marks = []
        for name, ys in curves.items():
            mean = np.mean(ys, axis=0)
            shown = np.where(mean >= floor, mean, math.nan)
            marks += [Mark(name, "curve", x, y, n=len(ys)) for x, y in zip(grid.tolist(), shown.tolist(), strict=True)]
        y_axis = Axis(f"{operator_name(operator)} density per unit λ", "log")
        x_axis = Axis(f"{operator_name(operator)} eigenvalue λ", "signed", linthresh=axis.linthresh)
        panels.append(Panel(y_axis.label, column, x_axis, y_axis, tuple(marks), tuple(run for run, _ in pairs)))
    return panels


def one_image_chart(runs: Sequence[TrainingRun], by: str) -> Chart:
    """Chart lambda_max on many samples next to lambda_max on one image: ranks of the medians, and values.

    Args:
        runs: The runs.
        by: The condition that is compared.

    Raises:
        NotEnoughError: If fewer than two levels have both, or if the spectra of a panel were measured differently.
    """
    ranks, values, samples = [], [], set()  # type: tuple[list[Panel], list[Panel], set[int]]
    groups, at = settings_groups(runs, by), at_moments(runs, by)
    columns, shared = columns_of(at)
    for (setting, moment), pairs in at.items():
        both: dict[
            str, list[tuple[str, float, float]]
        ] = {}  # name of the run, value on all samples, value on one image
        for run, result in pairs:
            found = [r for key, r in run.spectra.items() if moment_of(key)[0] == moment and r.data.get("samples") == 1]
            if found and result.data.get("samples") != 1:
                large, single = largest(result), largest(found[0])
                if math.isfinite(large) and math.isfinite(single) and not run.diverged:
                    both.setdefault(level(run, by), []).append((run.name, large, single))
        if len(both) < 2:
            continue
        middle = {n: [quartiles(side)[1] for side in list(zip(*of, strict=True))[1:]] for n, of in both.items()}
        places = [stats.rankdata([m[i] for m in middle.values()]) for i in (0, 1)]
        members, column = tuple(groups[setting]), columns[setting, moment]
        count = pairs[0][1].data.get("samples")
        samples.update(samples_of([pairs[0][1]]))
        x = Axis("", "names", (f"{count} samples", "one image"))
        marks = [
            Mark(name, "slope", side, float(places[side][i]), n=len(both[name]))
            for side in (0, 1)
            for i, name in enumerate(both)
        ]
        ranks.append(Panel(PLACE.label, column, x, PLACE, tuple(marks), members, _swaps(places)))
        marks = [Mark(n, "slope", i, middle[n][i], n=len(both[n])) for i in (0, 1) for n in both]
        for name, of in both.items():
            marks += [Mark(name, "path", i, v, run=run) for run, *sides in of for i, v in enumerate(sides)]
        values.append(Panel("Hessian λ₁", column, x, Axis("Hessian λ₁", "log"), tuple(marks), members))
    if not ranks:
        raise NotEnoughError(
            "fewer than two levels have spectra of many samples and of one image: run `ikun-hessian spectrum "
            "--samples 1 --tag one-image` on the checkpoints"
        )
    many = " or ".join(map(str, sorted(samples)))
    caption = f"λ₁ on {many} samples (left in each panel) and on one image as in the released code of arXiv 2411.18250 "
    caption += "(right): ranks of the medians over seeds, and the medians with the runs as thin lines."
    caption += shared
    return Chart((*ranks, *values), by, caption, tuple(runs))


def largest(result: SpectrumResult) -> float:
    """Return lambda_max of the first operator, NaN if it is unknown."""
    pairs = result.main[1].eigenvalues
    return pairs[0].value if pairs else math.nan


def _swaps(places: Sequence[Sequence[float]]) -> str:
    """Return how many pairs of levels change their order."""
    pairs = list(itertools.combinations(range(len(places[0])), 2))
    turned = sum((places[0][i] - places[0][j]) * (places[1][i] - places[1][j]) < 0 for i, j in pairs)
    return f"{turned} of {len(pairs)} pairs change order"


def layers_chart(runs: Sequence[TrainingRun], by: str) -> Chart:
    """Chart eigenvalues against rank for the diagonal block of each layer.

    Args:
        runs: The runs.
        by: The condition that is compared.

    Returns:
        The chart, with a page for each setting.

    Raises:
        NotEnoughError: If no run has such blocks, or if the spectra of a page were measured differently.
    """
    panels = []
    for name, members in settings_groups(runs, by).items():
        found = [(run, r) for run in members if (r := _with_blocks(run))]
        alike([r for _, r in found], name)
        for layer in dict.fromkeys(layer for _, r in found for layer in r.blocks):
            marks = rank_marks([(run, r.blocks[layer]) for run, r in found if layer in r.blocks], by)
            y = Axis(f"{operator_name(found[0][1].main[0])} block, λ", "signed")
            samples = samples_of([r for _, r in found])
            panels.append(Panel(layer, "", rank_axis(marks), y, marks, tuple(members), page=name, samples=samples))
    if not panels:
        raise NotEnoughError(
            "no run has spectra of single layers: run `ikun-hessian spectrum --per-layer` on the checkpoints"
        )
    caption = f"Eigenvalues of the diagonal block of each layer by rank: {_dots(panels)}."
    return Chart(tuple(panels), by, caption, tuple(runs))


def _with_blocks(run: TrainingRun) -> SpectrumResult | None:
    """Return the result with diagonal blocks at the latest moment, if there is one."""
    order = list(reversed(moments([run])))
    found = [r for where in order for key, r in run.spectra.items() if r.blocks and moment_of(key)[0] == where]
    return found[0] if found else None


def samples_chart(runs: Sequence[TrainingRun], by: str) -> Chart:
    """Chart lambda_max and the trace of the Hessian against the number of samples on which they are measured.

    Args:
        runs: The runs.
        by: The condition that is compared.

    Raises:
        NotEnoughError: If no run has such a curve.
    """
    panels = []
    errors = {"λ₁": math.nan, "trace": _trace_error(runs)}
    for name, members in settings_groups(runs, by).items():
        points: dict[str, dict[str, list[tuple[float, float]]]] = {"λ₁": {}, "trace": {}}
        for run in members:
            for point in _samples_curve(run):
                tops = [values[0] for values in point.eigenvalues if values]
                for quantity, values in (("λ₁", tops), ("trace", point.traces)):
                    of = points[quantity].setdefault(level(run, by), [])
                    of += [(float(point.samples), v) for v in values]
        for quantity, found in points.items():
            marks = tuple(mark for n, of in found.items() for mark in medians(n, of))
            if any(math.isfinite(mark.value) for mark in marks):
                x = Axis("samples in the subset", "count")
                y = Axis(f"Hessian {quantity}", "signed", linthresh=errors[quantity])
                panels.append(Panel(y.label, "", x, y, marks, tuple(members), page=name))
    if not panels:
        raise NotEnoughError(
            "no run has a curve over the number of samples: use `ikun-hessian spectrum --samples-curve` on checkpoints"
        )
    caption = f"{reading(panels).capitalize()} over subsets and seeds. Subsets are drawn independently."
    return Chart(tuple(panels), by, caption, tuple(runs))


def _samples_curve(run: TrainingRun) -> Sequence[SamplePoint]:
    """Return the curve over the number of samples at the end of training, empty if there is none."""
    return next((r.samples_curve for key, r in run.spectra.items() if r.samples_curve and not moment_of(key)[0]), ())


def _trace_error(runs: Sequence[TrainingRun]) -> float:
    """Return the median standard error of a trace from the spread over subsets of one size, NaN if it is unknown."""
    traces = [point.traces for run in runs for point in _samples_curve(run) if len(point.traces) > 1]
    return quartiles(float(np.std(values, ddof=1)) for values in traces)[1]
