"""From the results of all networks to the answer: how well every measure orders their generalization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ikun_hessian.experiments.comparison.statistics import Interval
from ikun_hessian.experiments.generalization.measures import MEASURES, PRIMARY, SharpnessMeasure
from ikun_hessian.experiments.generalization.result import MATCHED, MOMENTS, NetworkResult
from ikun_hessian.experiments.generalization.statistics import (
    INFORMATION_DRAWS,
    Floats,
    Granulated,
    Grid,
    Information,
    SignErrors,
    conditional_information,
    granulated,
    resamples,
    sign_errors,
)

GAP, ERROR = "gap", "test error"
TARGETS = (GAP, ERROR)
ASKED = (MATCHED, GAP)  # moment and target of the primary question
SEED = 0  # of the bootstrap


@dataclass(frozen=True)
class Networks:
    """The networks that exist at one moment, as arrays.

    Attributes:
        grid: Their places in the grid.
        environments: Names of the environments.
        levels: Names of the levels of every axis.
        targets: What a measure should order, by name [n]: "gap", the test error minus the training error, and
            "test error", both as fractions.
        stderr: Binomial standard error of the test error [n].
        measures: Every measure [n]; NaN where it does not exist.
    """

    grid: Grid
    environments: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    targets: dict[str, Floats]
    stderr: Floats
    measures: dict[str, Floats]


@dataclass(frozen=True)
class MeasureResult:
    """How well one measure orders the networks.

    Attributes:
        measure: The measure.
        granulated: Rank correlation along every axis, and its mean.
        signs: Sign errors.
        information: Conditional information.
        networks: Number of networks for which the measure exists.
    """

    measure: SharpnessMeasure
    granulated: Granulated
    signs: SignErrors
    information: Information
    networks: int


@dataclass(frozen=True)
class Summary:
    """The answer of the study.

    Attributes:
        planned: Number of networks of the whole grid.
        measured: Number of networks with a result.
        diverged: Number of networks that diverged.
        networks: The networks at every moment.
        results: The result of every measure, by moment and target.
        threshold: The training loss at which networks are matched.
    """

    planned: int
    measured: int
    diverged: int
    networks: dict[str, Networks]
    results: dict[tuple[str, str], dict[str, MeasureResult]]
    threshold: float

    @property
    def primary(self) -> MeasureResult | None:
        """The primary measure at the primary moment; None if no network is there."""
        return self.results.get(ASKED, {}).get(PRIMARY)


def networks_at(results: Sequence[NetworkResult], moment: str) -> Networks:
    """Collect the networks that have a moment.

    Args:
        results: The results. All must have the same axes.
        moment: One of MOMENTS.

    Returns:
        The networks as arrays. Levels that are numbers are in increasing order, others in alphabetical order.

    Raises:
        ValueError: If the axes differ.
    """
    axes = tuple(results[0].axes) if results else ()
    if any(tuple(r.axes) != axes for r in results):
        raise ValueError("the networks have different axes: they belong to different studies")
    environments = tuple(sorted({r.environment for r in results}))
    levels = tuple(tuple(sorted({r.axes[axis] for r in results}, key=_order)) for axis in axes)
    here = [r for r in results if moment in r.moments]
    at = [r.moments[moment] for r in here]
    places = [[names.index(r.axes[axis]) for axis, names in zip(axes, levels, strict=True)] for r in here]
    grid = Grid(
        axes,
        np.array(places, np.int64).reshape(len(here), len(axes)),
        np.array([environments.index(r.environment) for r in here], np.int64),
        np.array([r.seed for r in here], np.int64),
    )
    right = np.array([m.test_accuracy for m in at], np.float64)
    trained = np.array([m.train_accuracy for m in at], np.float64)
    tested = np.array([r.test_samples for r in here], np.float64)
    return Networks(
        grid,
        environments,
        levels,
        {GAP: trained - right, ERROR: 1 - right},
        np.sqrt(right * (1 - right) / tested),
        {m.name: np.array([one.measures.get(m.name, math.nan) for one in at], np.float64) for m in MEASURES},
    )


def summarize(results: Sequence[NetworkResult], planned: int, threshold: float) -> Summary:
    """Compute all statistics of all measures, at both moments and for both targets.

    Args:
        results: The results of the networks.
        planned: Number of networks of the whole grid.
        threshold: The training loss at which networks are matched.

    Returns:
        The answer. The conditional information is computed for the gap only.

    Raises:
        ValueError: If the results belong to different studies.
    """
    networks = {moment: networks_at(results, moment) for moment in MOMENTS}
    found = {
        (moment, target): {m.name: judged(there, m, target, informed=target == GAP) for m in MEASURES}
        for moment, there in networks.items()
        if len(there.grid.seed)
        for target in TARGETS
    }
    diverged = sum(r.diverged for r in results)
    return Summary(planned, len(results), diverged, networks, found, threshold)


def judged(networks: Networks, measure: SharpnessMeasure, target: str, informed: bool = True) -> MeasureResult:
    """Compute the statistics of one measure, over the networks for which it exists.

    Args:
        networks: The networks.
        measure: The measure.
        target: What it should order, one of TARGETS.
        informed: Whether to compute the conditional information too.
    """
    values = networks.measures[measure.name]
    keep = np.isfinite(values)
    grid = networks.grid
    grid = Grid(grid.axes, grid.levels[keep], grid.environment[keep], grid.seed[keep])
    wanted, m = networks.targets[target][keep], values[keep]
    counts = resamples(grid.configurations(), seed=SEED)
    information = (
        conditional_information(grid, m, wanted, counts[:INFORMATION_DRAWS])
        if informed
        else Information(Interval(), (), {})
    )
    return MeasureResult(
        measure,
        granulated(grid, m, wanted, counts),
        sign_errors(grid, m, wanted, networks.stderr[keep], counts),
        information,
        int(keep.sum()),
    )


def verdict(found: Interval) -> str:
    """Return what the primary statistic says of the hypothesis that flatter networks generalize better."""
    if found.low > 0:
        return "supported: flatter networks have the smaller gap"
    if found.high < 0:
        return "contradicted: flatter networks have the larger gap"
    return "undecided: the interval contains 0" if found.low <= 0 else "undecided: there is no interval"


def _order(text: str) -> tuple[bool, list[float], str]:
    """Return a sort key: numbers and lists of numbers first, by their values."""
    try:
        return False, [float(part) for part in text.split(",")], text
    except ValueError:
        return True, [], text
