"""Statistics of generalization measures over a grid: granulated rank correlation, conditional information, sign error.

A measure should order networks as their generalization does. These functions ask so for pairs of networks:

- `granulated`: Kendall's tau over networks that differ in one axis of the grid only, and its mean psi over the axes
  (Jiang et al. 2020, "Fantastic generalization measures and where to find them", arXiv 1912.02178, section 5.1).
- `conditional_information`: what the order of the measure tells about the order of generalization if the values of any
  two axes are known, as a part of what is unknown then (section 5.2 there).
- `sign_errors`: how often a measure orders two networks wrongly that differ in one axis, where their difference in
  generalization is above the noise of the test set (after Dziugaite et al. 2020, "In search of robust measures of
  generalization", arXiv 2010.11924), for each axis in each environment.

Intervals are those of a bootstrap over configurations: all seeds of a configuration are drawn together, and a pair
counts as often as the product of the counts of its two configurations. This bootstrap (Owen 2007, "The pigeonhole
bootstrap") is conservative: noise of single pairs counts up to three times in the variance. In 300 samples of normal
networks with known psi, the 95% interval covered in 98 to 99% (configurations and seeds with a ratio of 5, 1 and 0.2 of
their standard deviations).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ikun_hessian.experiments.comparison.statistics import NAN, Interval, known_values

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
QUANTILE = 1.959963984540054  # of the standard normal distribution at 97.5%
DRAWS, INFORMATION_DRAWS = 1000, 100  # of the bootstrap; those of the information only give a standard deviation
KNOWN = 2  # largest number of axes whose values are known
RESOLVED = 2.0  # standard errors by which two networks must differ to be told apart
LEAST_PAIRS = 10  # pairs that an axis in an environment needs for a sign error


@dataclass(frozen=True)
class Grid:
    """Where the networks are in the grid.

    Attributes:
        axes: Names of the axes [A].
        levels: Level of every network on every axis [n, A], from 0.
        environment: Environment of every network [n], from 0. Networks of different environments are not compared.
        seed: Seed of every network [n].

    Raises:
        ValueError: If the sizes do not fit, or if two networks have the same place and seed.
    """

    axes: tuple[str, ...]
    levels: Ints
    environment: Ints
    seed: Ints

    def __post_init__(self) -> None:
        n = len(self.seed)
        if self.levels.shape != (n, len(self.axes)) or self.environment.shape != (n,):
            raise ValueError("levels, environment and seed must have a row per network, and levels a column per axis")
        if n and min(self.levels.min(initial=0), self.environment.min(initial=0)) < 0:
            raise ValueError("levels and environments are counted from 0")
        if len(np.unique(self._places(np.ones(len(self.axes), bool), seeds=True), axis=0)) < n:
            raise ValueError("two networks have the same configuration and seed")

    def _places(self, kept: npt.NDArray[np.bool_], seeds: bool) -> Ints:
        columns = [self.environment[:, None], self.levels[:, kept], *([self.seed[:, None]] if seeds else [])]
        return np.concatenate(columns, axis=1)

    def configurations(self) -> Ints:
        """Return the configuration of every network [n], from 0: all seeds have the same one."""
        places = self._places(np.ones(len(self.axes), bool), seeds=False)
        return np.unique(places, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def pairs(self, axis: int) -> Pairs:
        """Return the pairs of networks that differ on one axis and agree in everything else, the seed included."""
        kept = np.arange(len(self.axes)) != axis
        group = np.unique(self._places(kept, seeds=True), axis=0, return_inverse=True)[1].reshape(-1)
        members: dict[int, list[int]] = {}
        for i, g in enumerate(group.tolist()):
            members.setdefault(g, []).append(i)
        found = [(i, j, 1.0 / math.comb(len(m), 2)) for m in members.values() for i, j in itertools.combinations(m, 2)]
        first, second, weight = (np.array(column) for column in zip(*found, strict=True)) if found else ([], [], [])
        return Pairs(np.asarray(first, np.int64), np.asarray(second, np.int64), np.asarray(weight, np.float64))


@dataclass(frozen=True)
class Pairs:
    """Pairs of networks, by their positions [k].

    Attributes:
        first: The first network of every pair.
        second: The second one.
        weight: Weight of every pair: 1 / (number of pairs of its group), so that every group counts the same.
    """

    first: Ints
    second: Ints
    weight: Floats


def resamples(configurations: Ints, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Draw configurations with replacement.

    Args:
        configurations: Configuration of every network [n], from 0.
        draws: Number of draws.
        seed: Random seed.

    Returns:
        How often every network is drawn [draws, n]. Networks of one configuration are drawn together.
    """
    count = int(configurations.max(initial=-1)) + 1
    if not count:
        return np.zeros((draws, 0))
    random = np.random.default_rng(seed)
    return random.multinomial(count, np.full(count, 1 / count), draws).astype(np.float64)[:, configurations]


@dataclass(frozen=True)
class Granulated:
    """Rank correlation of a measure with generalization along every axis.

    Attributes:
        psi: Mean over the axes. n is the number of pairs.
        axes: Kendall's tau along every axis that has pairs, by its name.
    """

    psi: Interval
    axes: dict[str, Interval]


def granulated(
    grid: Grid, measure: Sequence[float] | Floats, target: Sequence[float] | Floats, counts: Floats
) -> Granulated:
    """Compute Kendall's tau of networks that differ in one axis only, and its mean over the axes.

    Args:
        grid: Places of the networks.
        measure: The measure of every network [n]. Infinite values have the last rank.
        target: What it should order [n].
        counts: How often every network is drawn [draws, n], from `resamples`.

    Returns:
        Tau by axis, a mean over all environments, seeds and settings of the other axes, and their mean psi.

    Raises:
        ValueError: If a value is NaN, or the lengths differ.
    """
    m, g = _both(grid, measure, target)
    found, draws, pairs = {}, [], 0
    for axis, name in enumerate(grid.axes):
        at = grid.pairs(axis)
        if not len(at.first):
            continue
        value, drawn = _mean(_order(m, at) * _order(g, at), at, counts)
        found[name] = bootstrap_interval(value, drawn, len(at.first), -1.0, 1.0)
        draws.append(drawn)
        pairs += len(at.first)
    if not found:
        return Granulated(Interval(), {})
    mean = float(np.mean([tau.value for tau in found.values()]))
    return Granulated(bootstrap_interval(mean, np.mean(draws, axis=0), pairs, -1.0, 1.0), found)


@dataclass(frozen=True)
class SignErrors:
    """How often a measure orders two networks wrongly.

    Attributes:
        mean: Mean over all cells. A cell is an axis in an environment. n is the number of pairs.
        worst: The largest sign error of a cell, with the interval of that cell. It is too large on average, because it
            is the largest of several estimates.
        where: Number of the environment and name of the axis of the worst cell; (-1, "") if there is no cell.
        cells: Sign error of every cell with at least LEAST_PAIRS pairs.
        left_out: Number of pairs that the noise of the target does not tell apart.
    """

    mean: Interval
    worst: Interval
    where: tuple[int, str]
    cells: dict[tuple[int, str], Interval]
    left_out: int


def sign_errors(
    grid: Grid,
    measure: Sequence[float] | Floats,
    target: Sequence[float] | Floats,
    stderr: Sequence[float] | Floats,
    counts: Floats,
) -> SignErrors:
    """Compute how often a measure orders two networks wrongly that differ in one axis.

    A pair counts if its targets differ by more than RESOLVED standard errors of their difference. Equal measures count
    as half an error, so that a measure that is constant or random has sign error 1/2.

    Args:
        grid: Places of the networks.
        measure: The measure of every network [n].
        target: What it should order [n].
        stderr: Standard error of every target [n].
        counts: How often every network is drawn [draws, n], from `resamples`.

    Returns:
        The sign errors of all cells, their mean and the worst.

    Raises:
        ValueError: If a value is NaN, a standard error is negative, or the lengths differ.
    """
    m, g = _both(grid, measure, target)
    s = known_values(stderr)
    if len(s) != len(g) or s.min(initial=0) < 0:
        raise ValueError("give one standard error of at least 0 per network")
    cells, draws, left_out = {}, [], 0
    for axis, name in enumerate(grid.axes):
        at = grid.pairs(axis)
        apart = np.abs(g[at.first] - g[at.second]) > RESOLVED * np.hypot(s[at.first], s[at.second])
        left_out += int((~apart).sum())
        for environment in range(int(grid.environment.max(initial=-1)) + 1):
            keep = apart & (grid.environment[at.first] == environment)
            if keep.sum() < LEAST_PAIRS:
                continue
            here = Pairs(at.first[keep], at.second[keep], at.weight[keep])
            value, drawn = _mean((1 - _order(m, here) * _order(g, here)) / 2, here, counts)
            cells[environment, name] = bootstrap_interval(value, drawn, len(here.first), 0.0, 1.0)
            draws.append(drawn)
    if not cells:
        return SignErrors(Interval(), Interval(), (-1, ""), {}, left_out)
    mean = float(np.mean([cell.value for cell in cells.values()]))
    n = sum(cell.n for cell in cells.values())
    where = max(cells, key=lambda key: cells[key].value)
    drawn_cells = np.array(draws)
    some = np.isfinite(drawn_cells).any(0)  # draws with a pair in at least one cell
    overall = bootstrap_interval(mean, np.nanmean(drawn_cells[:, some], axis=0), n, 0.0, 1.0)
    return SignErrors(overall, cells[where], where, cells, left_out)


@dataclass(frozen=True)
class Information:
    """What the order of a measure tells about the order of generalization.

    Attributes:
        value: The smallest conditional information over all sets of at most KNOWN axes, as a part of the entropy.
        known: The axes whose values, if known, leave the measure the least to tell.
        by_axes: The conditional information of every set of axes.
    """

    value: Interval
    known: tuple[str, ...]
    by_axes: dict[tuple[str, ...], float]


def conditional_information(
    grid: Grid, measure: Sequence[float] | Floats, target: Sequence[float] | Floats, counts: Floats
) -> Information:
    """Compute the normalized mutual information of two orders, conditional on the values of at most KNOWN axes.

    Over all ordered pairs of networks of one environment whose targets differ, it is I(V; G | U) / H(G | U), where V
    and G are the signs of the differences of the measure and of the target, and U is the environment together with the
    values of the known axes for both networks. It is a plug-in estimate, which is too large on average: compare it with
    that of random numbers.

    Args:
        grid: Places of the networks.
        measure: The measure of every network [n].
        target: What it should order [n].
        counts: How often every network is drawn [draws, n], from `resamples`.

    Returns:
        The smallest information over the sets of known axes. Its interval is that of the set found.

    Raises:
        ValueError: If a value is NaN, or the lengths differ.
    """
    m, g = _both(grid, measure, target)
    first, second = np.nonzero((grid.environment[:, None] == grid.environment) & (g[:, None] != g))
    if not len(first):
        return Information(Interval(), (), {})
    at = Pairs(first.astype(np.int64), second.astype(np.int64), np.ones(len(first)))
    sizes = [int(grid.environment.max()) + 1]
    code = grid.environment[first].astype(np.int64)
    for axis in range(len(grid.axes)):
        size = int(grid.levels[:, axis].max()) + 1
        code = (code * size + grid.levels[first, axis]) * size + grid.levels[second, axis]
        sizes.append(size**2)
    code = (code * 3 + (_order(m, at) + 1).astype(np.int64)) * 2 + (_order(g, at) > 0)
    shape = (*sizes, 3, 2)
    sets = [s for k in range(KNOWN + 1) for s in itertools.combinations(range(len(grid.axes)), k)]

    def informations(weights: Floats, wanted: Sequence[tuple[int, ...]]) -> list[float]:
        table = np.bincount(code, weights, math.prod(shape)).reshape(shape)
        rest = [tuple(a + 1 for a in range(len(grid.axes)) if a not in known) for known in wanted]
        return [_information(table.sum(axis=axes).reshape(-1, 3, 2)) for axes in rest]

    values = informations(at.weight, sets)
    least = int(np.argmin(values))
    drawn = [informations(w[first] * w[second], [sets[least]])[0] for w in counts]
    names = [tuple(grid.axes[a] for a in s) for s in sets]
    value = bootstrap_interval(values[least], np.array(drawn), len(first) // 2, 0.0, 1.0)
    return Information(value, names[least], dict(zip(names, values, strict=True)))


def _information(table: Floats) -> float:
    """Return I(V; G | U) / H(G | U) of weights [U, V, G]; 0 if G is known from U."""
    p = table / table.sum()
    u = p.sum((1, 2), keepdims=True)
    v, g = p.sum(2, keepdims=True), p.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        mutual = np.nansum(np.where(p > 0, p * np.log(p * u / (v * g)), 0.0))
        entropy = -np.nansum(np.where(g > 0, g * np.log(g / u), 0.0))
    return float(mutual / entropy) if entropy > 0 else 0.0


def bootstrap_interval(value: float, drawn: Floats, n: int, least: float, most: float) -> Interval:
    """Return a normal 95% interval with the standard deviation of bootstrap draws, within [least, most].

    Draws that are NaN are left out. Without two others, or without a spread, there is no interval.
    """
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 2 or not drawn.std() > 0:
        return Interval(value, n=n)
    half = QUANTILE * float(drawn.std(ddof=1))
    return Interval(value, max(least, value - half), min(most, value + half), n)


def _mean(values: Floats, at: Pairs, counts: Floats) -> tuple[float, Floats]:
    """Return the weighted mean over pairs [k], and that of every draw (NaN for a draw without a pair)."""
    weights = counts[:, at.first] * counts[:, at.second] * at.weight
    total = weights.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = np.where(total > 0, weights @ values / total, NAN)
    return float(at.weight @ values / at.weight.sum()), drawn


def _order(x: Floats, at: Pairs) -> Floats:
    """Return the sign of x_i - x_j of every pair, also for infinite values."""
    first, second = x[at.first], x[at.second]
    return (first > second).astype(np.float64) - (first < second)


def _both(grid: Grid, measure: Sequence[float] | Floats, target: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    m, g = known_values(measure), known_values(target)
    if not len(m) == len(g) == len(grid.seed):
        raise ValueError(f"measure, target and grid must have equal lengths, not {len(m)}, {len(g)}, {len(grid.seed)}")
    return m, g
