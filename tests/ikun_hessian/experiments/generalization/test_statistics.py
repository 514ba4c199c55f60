"""Tests of the statistics of generalization, against loops over pairs, SciPy's tau and scikit-learn's information."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mutual_info_score

from ikun_hessian.experiments.generalization.statistics import (
    LEAST_PAIRS,
    Grid,
    bootstrap_interval,
    conditional_information,
    granulated,
    resamples,
    sign_errors,
)

AXES = ("lr", "width", "init")


def full_grid(levels: tuple[int, ...] = (3, 2, 2), environments: int = 2, seeds: int = 2) -> Grid:
    places = list(itertools.product(range(environments), *map(range, levels), range(seeds)))
    table = np.array(places)
    return Grid(AXES[: len(levels)], table[:, 1:-1], table[:, 0], table[:, -1])


def part(grid: Grid, keep: np.ndarray) -> Grid:
    return Grid(grid.axes, grid.levels[keep], grid.environment[keep], grid.seed[keep])


def once(grid: Grid) -> np.ndarray:
    return resamples(grid.configurations(), draws=20)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Grid, np.ndarray, np.ndarray]:
    grid = full_grid()
    seed = draw(st.integers(0, 10_000))
    random = np.random.default_rng(seed)
    keep = random.random(len(grid.seed)) < draw(st.sampled_from([0.5, 0.8, 1.0]))
    keep[:3] = True
    grid = part(grid, keep)
    m = random.integers(0, 4, len(grid.seed)).astype(float)  # with ties
    g = random.normal(size=len(m)) + 0.3 * m
    return grid, m, g


def neighbours(grid: Grid, axis: int) -> dict[tuple[int, ...], list[int]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(grid.seed)):
        rest = [int(v) for a, v in enumerate(grid.levels[i]) if a != axis]
        found.setdefault((int(grid.environment[i]), *rest, int(grid.seed[i])), []).append(i)
    return found


@given(cases())
def test_tau_is_the_mean_over_groups_of_a_loop_over_pairs(case: tuple[Grid, np.ndarray, np.ndarray]) -> None:
    grid, m, g = case
    found = granulated(grid, m, g, once(grid))
    taus = []
    for axis, name in enumerate(grid.axes):
        groups = []
        for members in neighbours(grid, axis).values():
            pairs = list(itertools.combinations(members, 2))
            if pairs:
                groups.append(np.mean([np.sign(m[i] - m[j]) * np.sign(g[i] - g[j]) for i, j in pairs]))
        if groups:
            taus.append(np.mean(groups))
            assert found.axes[name].value == pytest.approx(taus[-1])
        else:
            assert name not in found.axes
    assert found.psi.value == pytest.approx(np.mean(taus)) if taus else math.isnan(found.psi.value)


def test_one_axis_without_ties_is_kendalls_tau_of_scipy() -> None:
    random = np.random.default_rng(0)
    grid = full_grid((9,), environments=1, seeds=1)
    m, g = random.normal(size=9), random.normal(size=9)
    assert granulated(grid, m, g, once(grid)).psi.value == pytest.approx(stats.kendalltau(m, g).statistic)


@given(cases())
def test_increasing_functions_and_the_order_of_the_networks_change_nothing(
    case: tuple[Grid, np.ndarray, np.ndarray],
) -> None:
    grid, m, g = case
    error = np.full(len(g), 0.05)
    order = np.random.default_rng(1).permutation(len(m))
    moved = part(grid, order)
    for statistic in (
        lambda grid, m, g, s: granulated(grid, m, g, once(grid)).psi.value,
        lambda grid, m, g, s: sign_errors(grid, m, g, s, once(grid)).mean.value,
        lambda grid, m, g, s: conditional_information(grid, m, g, once(grid)).value.value,
    ):
        at = statistic(grid, m, g, error)
        assert statistic(grid, np.exp(m), g, error) == pytest.approx(at, nan_ok=True)
        assert statistic(moved, m[order], g[order], error) == pytest.approx(at, nan_ok=True)
    assert granulated(grid, -m, g, once(grid)).psi.value == pytest.approx(
        -granulated(grid, m, g, once(grid)).psi.value, nan_ok=True
    )


def test_sign_errors_are_those_of_a_loop_over_the_pairs_above_the_noise() -> None:
    grid = full_grid((2, 2, 3), environments=2, seeds=3)
    random = np.random.default_rng(2)
    m, g = random.integers(0, 5, len(grid.seed)).astype(float), random.normal(size=len(grid.seed))
    s = random.uniform(0.05, 0.3, len(g))
    found = sign_errors(grid, m, g, s, once(grid))
    cells, left_out = {}, 0
    for axis, name in enumerate(grid.axes):
        for e in range(2):
            groups = []
            for key, members in neighbours(grid, axis).items():
                size = math.comb(len(members), 2)
                for i, j in itertools.combinations(members, 2):
                    if key[0] != e:
                        continue
                    if abs(g[i] - g[j]) <= 2 * math.sqrt(s[i] ** 2 + s[j] ** 2):
                        left_out += 1
                    elif m[i] == m[j]:
                        groups.append((0.5, 1 / size))
                    else:
                        groups.append((float((m[i] > m[j]) != (g[i] > g[j])), 1 / size))
            if len(groups) >= LEAST_PAIRS:
                cells[e, name] = sum(v * w for v, w in groups) / sum(w for _, w in groups)
    assert {key: cell.value for key, cell in found.cells.items()} == pytest.approx(cells)
    assert found.left_out == left_out
    assert found.mean.value == pytest.approx(np.mean(list(cells.values())))
    assert found.worst.value == pytest.approx(max(cells.values()))
    assert cells[found.where] == pytest.approx(max(cells.values()))


def test_a_constant_measure_is_wrong_for_half_of_the_pairs() -> None:
    grid = full_grid((2, 2, 2), environments=2, seeds=4)
    g = np.random.default_rng(0).normal(size=len(grid.seed))
    found = sign_errors(grid, np.ones(len(g)), g, np.zeros(len(g)), once(grid))
    assert found.mean.value == found.worst.value == 0.5


def test_no_pair_above_the_noise_has_no_sign_error() -> None:
    grid = full_grid()
    found = sign_errors(grid, grid.seed, grid.seed, np.full(len(grid.seed), 9.0), once(grid))
    assert math.isnan(found.mean.value)
    assert found.where == (-1, "")
    assert found.left_out == sum(len(grid.pairs(a).first) for a in range(3))


def test_information_is_that_of_scikit_learn_in_every_stratum() -> None:
    grid = full_grid((2, 2, 2), environments=2, seeds=2)
    random = np.random.default_rng(3)
    m, g = random.integers(0, 3, len(grid.seed)).astype(float), random.normal(size=len(grid.seed))
    m += g > 0.5
    found = conditional_information(grid, m, g, once(grid))
    for known in [(), *itertools.combinations(range(3), 1), *itertools.combinations(range(3), 2)]:
        strata: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, j in itertools.permutations(range(len(m)), 2):
            if grid.environment[i] == grid.environment[j] and g[i] != g[j]:
                values = [int(grid.levels[k, a]) for a in known for k in (i, j)]
                signs = int(np.sign(m[i] - m[j])), int(np.sign(g[i] - g[j]))
                strata.setdefault((int(grid.environment[i]), *values), []).append(signs)
        total = sum(map(len, strata.values()))
        mutual = sum(len(v) / total * mutual_info_score(*zip(*v, strict=True)) for v in strata.values())
        entropy = sum(
            len(v) / total * stats.entropy(np.unique([b for _, b in v], return_counts=True)[1]) for v in strata.values()
        )
        assert found.by_axes[tuple(AXES[a] for a in known)] == pytest.approx(mutual / entropy)
    assert found.value.value == min(found.by_axes.values()) == found.by_axes[found.known]


def test_a_perfect_measure_has_all_the_information_and_a_function_of_known_axes_none() -> None:
    grid = full_grid((2, 2, 2), environments=1, seeds=3)
    g = np.random.default_rng(4).normal(size=len(grid.seed))
    assert conditional_information(grid, g, g, once(grid)).value.value == pytest.approx(1)
    axis = grid.levels[:, 1].astype(float)
    assert conditional_information(grid, axis, g, once(grid)).value.value == pytest.approx(0, abs=1e-12)


def test_all_seeds_of_a_configuration_are_drawn_together() -> None:
    grid = full_grid()
    configurations = grid.configurations()
    counts = resamples(configurations, draws=50, seed=1)
    for c in range(configurations.max() + 1):
        assert (counts[:, configurations == c] == counts[:, configurations == c][:, :1]).all()
    once_each = [int(np.flatnonzero(configurations == c)[0]) for c in range(configurations.max() + 1)]
    assert (counts[:, once_each].sum(1) == len(once_each)).all()


def test_the_interval_of_psi_covers_its_value() -> None:
    """Normal measures and targets with correlation rho in configurations and in seeds: tau is 2 / pi asin(rho)."""
    grid = full_grid((2, 2, 2), environments=5, seeds=3)
    configuration, random, rho = grid.configurations(), np.random.default_rng(5), 0.5
    truth, held, repetitions = 2 / math.pi * math.asin(rho), 0, 300
    mix = np.linalg.cholesky(np.array([[1, rho], [rho, 1]]))
    for i in range(repetitions):
        own = mix @ random.normal(size=(2, configuration.max() + 1))
        m, g = own[:, configuration] + mix @ random.normal(size=(2, len(configuration)))
        psi = granulated(grid, m, g, resamples(configuration, draws=200, seed=i)).psi
        held += psi.low <= truth <= psi.high
    assert 0.95 <= held / repetitions


def test_an_interval_without_a_spread_does_not_exist() -> None:
    assert math.isnan(bootstrap_interval(0.5, np.full(9, 0.5), 3, 0, 1).low)
    assert math.isnan(bootstrap_interval(0.5, np.array([np.nan, 0.4]), 3, 0, 1).low)
    assert bootstrap_interval(0.9, np.array([0.0, 1.0]), 3, 0, 1).high == 1


def test_no_network_and_no_pair_have_no_answer() -> None:
    none = Grid(AXES, np.zeros((0, 3), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert granulated(none, [], [], once(none)).axes == {}
    assert conditional_information(none, [], [], once(none)).by_axes == {}
    single = part(full_grid(), np.arange(48) < 1)
    assert math.isnan(granulated(single, [1.0], [1.0], once(single)).psi.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: Grid(g.axes, g.levels[:, :2], g.environment, g.seed), "a row per network"),
        (lambda g: Grid(g.axes, g.levels - 1, g.environment, g.seed), "counted from 0"),
        (lambda g: Grid(g.axes, g.levels, g.environment, g.seed * 0), "the same configuration and seed"),
        (lambda g: granulated(g, [math.nan] * 24, np.ones(24), once(g)), "NaN"),
        (lambda g: granulated(g, [1.0], np.ones(24), once(g)), "equal lengths"),
        (lambda g: sign_errors(g, np.ones(24), np.ones(24), -np.ones(24), once(g)), "standard error"),
    ],
)
def test_bad_input_is_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    grid = full_grid()
    grid = part(grid, np.arange(len(grid.seed)) < 24)
    with pytest.raises(ValueError, match=message):
        change(grid)
