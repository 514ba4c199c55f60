"""Tests of the answer of the study of generalization: summary, screen, tables and figure."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from hessian_tools.io.json import save_result
from ikun_hessian.experiments.comparison.statistics import Interval
from ikun_hessian.experiments.generalization import finish, report
from ikun_hessian.experiments.generalization.figure import figure_of
from ikun_hessian.experiments.generalization.measures import CONTROL, MEASURES, NAMES, PRIMARY
from ikun_hessian.experiments.generalization.result import END, ENDING, MATCHED, SCHEMA, Moment, NetworkResult
from ikun_hessian.experiments.generalization.summary import ASKED, ERROR, GAP, Summary, networks_at, summarize, verdict

AXES = {"lr": ("1", "2"), "batch-size": ("64", "256"), "init": ("kaiming", "xavier")}


def made(sign: float = 1.0) -> list[NetworkResult]:
    """Networks whose primary measure orders their gap perfectly (sign 1) or wrongly (-1), and others at random."""
    random = np.random.default_rng(0)
    found = []
    for environment, place, seed in itertools.product(("base", "short"), itertools.product(*AXES.values()), range(3)):
        moments = {}
        for moment in (MATCHED, END):
            gap = float(random.uniform(0.02, 0.2))
            measures = {name: float(random.uniform(1, 2)) for name in NAMES} | {PRIMARY: math.exp(sign * 10 * gap)}
            moments[moment] = Moment(4, 0.03, 0.9, 0.05, 0.9 - gap, measures)
        axes = dict(zip(AXES, place, strict=True))
        name = f"{environment}-{'-'.join(place)}-s{seed}"
        none: dict[str, float] = {"training": 1.0, "measuring": 2.0}
        found.append(
            NetworkResult(SCHEMA, name, environment, axes, seed, False, 5, 10_000, 99, moments, none, {}, {}, {})
        )
    return found


@pytest.fixture(scope="module")
def summary() -> Summary:
    results = made()
    results[0] = replace(results[0], moments={END: results[0].moments[END]})
    results[1] = replace(results[1], diverged=True, moments={})
    return summarize(results, 60, 0.03)


def test_networks_are_collected_at_their_moment(summary: Summary) -> None:
    assert (summary.planned, summary.measured, summary.diverged) == (60, 48, 1)
    at, end = summary.networks[MATCHED], summary.networks[END]
    assert (len(at.grid.seed), len(end.grid.seed)) == (46, 47)
    assert at.levels == (("1", "2"), ("64", "256"), ("kaiming", "xavier"))  # numbers by their values
    assert at.targets[GAP] == pytest.approx(at.targets[ERROR] - 0.1)
    p = at.targets[ERROR]
    assert at.stderr == pytest.approx(np.sqrt(p * (1 - p) / 10_000))


def test_the_primary_result_is_the_first_line(summary: Summary) -> None:
    lines = report.screen(summary)
    assert lines[0].startswith("primary     psi 1.00 [")
    assert len(lines) <= 11
    assert max(map(len, lines)) <= 80
    assert "46 reached training loss 0.03" in lines[3]
    assert "60" in lines[3]
    assert sum(" *" in line for line in lines) == 2  # controls


def test_a_measure_that_does_not_exist_leaves_the_network_out() -> None:
    results = made()
    m = results[0].moments[MATCHED]
    results[0] = replace(
        results[0], moments={MATCHED: replace(m, measures={**m.measures, "LPF": math.nan, "SAM sharpness": math.inf})}
    )
    found = summarize(results, 48, 0.03).results[ASKED]
    assert (found["LPF"].networks, found["SAM sharpness"].networks, found[PRIMARY].networks) == (47, 47, 48)


def test_a_measure_that_no_network_has_has_no_result() -> None:
    results = [
        replace(r, moments={k: replace(m, measures={**m.measures, "LPF": math.nan}) for k, m in r.moments.items()})
        for r in made()
    ]
    found = summarize(results, 48, 0.03)
    assert found.results[ASKED]["LPF"].granulated.axes == {}
    assert "LPF" in report.summary_page(found, "Title")
    figure_of(found)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (Interval(0.2, 0.1, 0.3), "supported"),
        (Interval(-0.2, -0.3, -0.1), "contradicted"),
        (Interval(0.1, -0.1, 0.3), "undecided: the interval contains 0"),
        (Interval(0.4), "undecided: there is no interval"),
    ],
)
def test_the_verdict_is_that_of_the_interval(found: Interval, word: str) -> None:
    assert verdict(found).startswith(word)


def test_a_wrong_measure_is_contradicted() -> None:
    lines = report.screen(summarize(made(-1.0), 48, 0.03))
    assert "-1.00" in lines[0]


def test_results_of_different_studies_are_refused() -> None:
    results = made()
    with pytest.raises(ValueError, match="different axes"):
        networks_at([results[0], replace(results[1], axes={"lr": "1"})], MATCHED)


def test_no_network_at_the_threshold_is_said() -> None:
    results = [replace(r, moments={END: r.moments[END]}) for r in made()]
    found = summarize(results, 48, 0.03)
    assert report.screen(found)[0] == "primary     no answer: no network reached training loss 0.03"
    report.summary_page(found, "Title")
    figure_of(found)


def test_the_tables_have_every_measure_and_every_network(tmp_path: Path) -> None:
    results = made()
    paths = [tmp_path / "runs" / f"{r.name}{ENDING}" for r in results]
    for path, r in zip(paths[:-1], results[:-1], strict=True):
        save_result(r, path)
    paths[0].write_text("{}")
    warned: list[str] = []
    lines = finish.finish(paths, "A title", 0.03, tmp_path, warned.append)
    assert len(lines) <= 12
    assert len(warned) == 1
    assert paths[0].name in warned[0]
    with (tmp_path / "measures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["moment"], r["target"], r["measure"]) for r in rows} == set(
        itertools.product((MATCHED, END), (GAP, ERROR), NAMES)
    )
    (primary,) = [r for r in rows if (r["moment"], r["target"], r["measure"]) == (*ASKED, PRIMARY)]
    assert float(primary["psi"]) == float(primary["tau lr"]) == 1
    with (tmp_path / "networks.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 46
    text = (tmp_path / "tables.md").read_text()
    assert text.startswith("# A title\n")
    assert text.count("## ") == 4
    for name in ("generalization.png", "generalization.pdf"):
        assert (tmp_path / "figures" / name).stat().st_size > 10_000


def test_without_a_result_nothing_is_drawn(tmp_path: Path) -> None:
    lines = finish.finish([tmp_path / f"a{ENDING}"], "T", 0.03, tmp_path, print)
    assert lines == ["! no tables or figures: no network has a usable result"]


def test_the_figure_shows_every_axis_and_every_measure(summary: Summary) -> None:
    figure = figure_of(summary)
    assert isinstance(figure, Figure)
    *scatter, last = figure.axes
    assert len(scatter) == len(AXES)
    for ax in scatter:
        assert sum(len(c.get_offsets()) for c in ax.collections) == 46
    assert len(last.get_yticklabels()) == len(MEASURES)
    boxes = [label.get_window_extent() for label in last.get_yticklabels()]
    assert all(a.y0 >= b.y1 - 1 for a, b in itertools.pairwise(boxes))  # no label overlaps the next one
    assert any(m.group == CONTROL for m in MEASURES)
