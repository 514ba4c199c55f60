"""Tests of the figures of minima: every mark is read from the results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from run_tools import INITS, make_run, make_study
from study_tools import full_study, marks, panel

from hessian_tools.results.spectrum import SpectrumResult
from ikun_hessian.experiments.figures.chart import NotEnoughError
from ikun_hessian.experiments.figures.gap import gap_chart
from ikun_hessian.experiments.figures.minima import layers_chart, one_image_chart, ranks_chart, samples_chart
from ikun_hessian.experiments.runs import TrainingRun

RANKS = ("Hessian eigenvalue λ", "GGN eigenvalue λ")


@pytest.fixture(scope="module")
def runs() -> list[TrainingRun]:
    return full_study()


def changed(run: TrainingRun, change: Callable[[SpectrumResult], SpectrumResult]) -> TrainingRun:
    return dataclasses.replace(run, spectra={key: change(r) for key, r in run.spectra.items()})


def test_ranks_are_dots_of_runs_and_medians(runs: list[TrainingRun]) -> None:
    found = ranks_chart(runs, "init")
    assert list(dict.fromkeys(p.column for p in found.panels)) == ["loss ≤ 0.02", "at the end"]
    assert {p.foot for p in found.panels if "eigenvalue λ" in p.row} == {"17 of 18 runs"}  # one diverged and has none
    members = [r for r in runs if r.value("init") == "kaiming"]
    for row, operator in zip(RANKS, ("hessian", "ggn"), strict=True):
        shown = panel(found.panels, row, "loss ≤ 0.02")
        tops = np.array([[e.value for e in r.spectra["loss0.02"].spectra[operator].eigenvalues] for r in members])
        assert [m.value for m in marks(shown, "median") if m.x > 0] == pytest.approx(np.median(tops, axis=0).tolist())
        assert [m.high for m in marks(shown, "median") if m.x > 0] == pytest.approx(np.quantile(tops, 0.75, 0).tolist())
        dots = [m for m in marks(shown, "run") if m.run == members[0].name and m.x > 0]
        assert [(m.x, m.value) for m in dots] == list(enumerate(tops[0].tolist(), 1))
    lows = [r.spectra[""].spectra["hessian"].smallest_eigenvalues[0].value for r in members]
    smallest = [m for m in marks(panel(found.panels, RANKS[0], "at the end"), "median") if m.x == -1]
    assert [m.value for m in smallest] == [pytest.approx(np.median(lows))]


def test_a_moment_that_all_settings_share_stands_in_the_caption() -> None:
    norms = ("bn", "none")
    found = ranks_chart([make_run(i, network={"norm": n}, moments=("",)) for i in INITS for n in norms], "init")
    assert {p.column for p in found.panels} == {"bn", "norm none"}
    assert "All spectra: at the end." in found.caption
    assert {p.foot for p in found.panels} == {""}  # all runs have one


def test_what_did_not_converge_or_diverged_is_hollow_and_the_diverged_in_no_median() -> None:
    healthy, lost = make_run(seed=0, moments=("",)), make_run(seed=1, moments=("",))
    lost = dataclasses.replace(lost, failures=("NaN: the loss is not finite",))

    def loose(result: SpectrumResult) -> SpectrumResult:
        pairs = [dataclasses.replace(e, converged=False) for e in result.spectra["ggn"].eigenvalues]
        ggn = dataclasses.replace(result.spectra["ggn"], eigenvalues=tuple(pairs))
        return dataclasses.replace(result, spectra={**result.spectra, "ggn": ggn})

    found = ranks_chart([changed(healthy, loose), lost], "init").panels
    dots = marks(panel(found, RANKS[1], "at the end"), "run")
    assert {(m.run, m.note) for m in dots} == {(healthy.name, "not converged"), (lost.name, "diverged")}
    assert {m.n for m in marks(panel(found, RANKS[1], "at the end"), "median")} == {1}
    (bar,) = marks(panel(found, "GGN λ₁, norm-scaled", "at the end"), "bar")
    assert bar.value == healthy.spectra[""].spectra["ggn"].scale_free_lambda_max


def test_norm_scaled_values_stand_over_their_levels(runs: list[TrainingRun]) -> None:
    shown = panel(ranks_chart(runs, "init").panels, "Hessian λ₁, norm-scaled", "at the end")
    assert shown.x.ticks == ("ikun", "kaiming", "xavier")
    assert {(m.level, m.x) for m in shown.marks} == {("ikun", 0), ("kaiming", 1), ("xavier", 2)}
    values = [r.spectra[""].spectra["hessian"].scale_free_lambda_max for r in runs if r.value("init") == "kaiming"]
    (bar,) = marks(shown, "bar")
    assert bar.value == pytest.approx(np.median(values))
    assert sorted(m.value for m in marks(shown, "run")) == sorted(values)


def test_scaled_eigenvalues_by_rank_where_they_were_measured(runs: list[TrainingRun]) -> None:
    def ranked(result: SpectrumResult) -> SpectrumResult:
        values = (3.0, 2.0, float(result.checkpoint["sha256"] != ""))
        spectra = {name: dataclasses.replace(s, scale_free=values) for name, s in result.spectra.items()}
        return dataclasses.replace(result, spectra=spectra)

    chart = ranks_chart([changed(r, ranked) for r in runs], "init")
    shown = panel(chart.panels, "GGN λ, norm-scaled", "at the end")
    assert [(m.x, m.value, m.n) for m in marks(shown, "median")] == [(1, 3.0, 6), (2, 2.0, 6), (3, 1.0, 6)]
    assert "λ₁, norm-scaled" not in {p.row.partition(" ")[2] for p in chart.panels}
    assert "units of each filter’s norm." in chart.caption


def test_densities_are_means_over_runs_that_integrate_to_the_bulk(runs: list[TrainingRun]) -> None:
    chart = ranks_chart(runs, "init")
    found = [p for p in chart.panels if p.row.endswith("per unit λ")]
    assert [p.row.split()[0] for p in found] == ["Hessian", "Hessian", "GGN", "GGN"]
    assert [p.column for p in found] == 2 * ["loss ≤ 0.02", "at the end"]
    assert {f"{p.x.linthresh:.2g}" for p in found} == {"0.00032"}
    assert "its axis is linear within ±0.00032 and logarithmic" in chart.caption
    for p in found:
        curve = marks(p, "curve")
        x, y = np.array([m.x for m in curve]), np.nan_to_num([m.value for m in curve])
        assert np.trapezoid(y, x) == pytest.approx(1 - 5 / 500, rel=0.02)
        assert {m.n for m in curve} == {6}
    assert found[0].x == found[1].x != found[2].x


def test_densities_are_left_out_where_there_are_none(runs: list[TrainingRun]) -> None:
    def bare(result: SpectrumResult) -> SpectrumResult:
        spectra = {name: dataclasses.replace(s, density=None) for name, s in result.spectra.items()}
        return dataclasses.replace(result, spectra=spectra)

    assert {p.row for p in ranks_chart([changed(r, bare) for r in runs], "init").panels} == {
        *RANKS, "Hessian λ₁, norm-scaled", "GGN λ₁, norm-scaled",
    }  # fmt: skip


@pytest.mark.parametrize("chart", [ranks_chart, one_image_chart, gap_chart])
def test_what_was_not_measured_alike_is_refused(runs: list[TrainingRun], chart: Callable[..., Any]) -> None:
    def fewer(result: SpectrumResult) -> SpectrumResult:
        return dataclasses.replace(result, data={**result.data, "samples": 50})

    with pytest.raises(
        NotEnoughError, match=r"measured differently \(loss ≤ 0.02\): the number of samples differs, 50, 1437"
    ):
        chart([changed(runs[0], fewer), *runs[1:]], "init")
    with pytest.raises(
        NotEnoughError, match=r"run `ikun-hessian spectrum`|fewer than three runs|fewer than two levels"
    ):
        chart([dataclasses.replace(run, spectra={}, flatness={}) for run in runs], "init")


def test_ranks_and_values_of_one_image_are_drawn(runs: list[TrainingRun]) -> None:
    def sized(run: TrainingRun, whole: float, single: float) -> TrainingRun:
        def resized(result: SpectrumResult) -> SpectrumResult:
            value = single if result.data["samples"] == 1 else whole
            hessian = result.spectra["hessian"]
            top = dataclasses.replace(hessian.eigenvalues[0], value=value)
            spectra = {"hessian": dataclasses.replace(hessian, eigenvalues=(top,))}
            return dataclasses.replace(result, spectra=spectra)

        return changed(run, resized)

    sizes = {"ikun": (1.0, 30.0), "kaiming": (2.0, 10.0), "xavier": (3.0, 20.0)}
    made = [
        sized(r, *(v * 2.0 ** (int(r.value("seed")) - 1) for v in sizes[str(r.value("init"))]))
        for r in make_study(seeds=(0, 1, 2), diverged=(), moments=("",), tags=("published",))
    ]
    ranks, values = one_image_chart(made, "init").panels
    assert {(m.level, m.x): m.value for m in ranks.marks} == {
        ("ikun", 0): 1, ("kaiming", 0): 2, ("xavier", 0): 3, ("ikun", 1): 3, ("kaiming", 1): 1, ("xavier", 1): 2,
    }  # fmt: skip
    assert ranks.foot == "2 of 3 pairs change order"
    assert {(m.x, m.value) for m in marks(values, "slope")} == {(0, 2.0), (1, 10.0)}
    assert sorted(m.value for m in marks(values, "path")) == [1, 2, 4, 5, 10, 20]
    assert ranks.x.ticks == ("1437 samples", "one image")
    with pytest.raises(NotEnoughError, match="fewer than two levels"):
        one_image_chart([r for r in made if r.value("init") == "ikun"], "init")
    assert len(one_image_chart(runs, "init").panels) == 2  # the image was measured only at the end


def test_layers_and_curves_over_samples_are_drawn(runs: list[TrainingRun]) -> None:
    found = layers_chart(runs, "init").panels
    assert [p.row for p in found] == ["conv1", "conv2", "fc1", "fc2"]
    values = [r.spectra[""].blocks["fc1"].eigenvalues[2].value for r in runs if r.value("init") == "kaiming"]
    assert next(m.value for m in marks(found[2], "median") if m.x == 3) == pytest.approx(np.median(values))
    largest, trace = samples_chart(runs, "init").panels
    points = [r.spectra[""].samples_curve[2] for r in runs if r.value("init") == "kaiming"]
    at = next(m for m in marks(largest, "median") if m.x == 16)
    every = [v[0] for point in points for v in point.eigenvalues]
    assert (at.low, at.value, at.high, at.n) == pytest.approx((*np.quantile(every, [0.25, 0.5, 0.75]), 24))
    at = next(m for m in marks(trace, "median") if m.x == 16)
    assert at.value == pytest.approx(np.median([t for point in points for t in point.traces]))
    spreads = [np.std(p.traces, ddof=1) for r in runs if not r.diverged for p in r.spectra[""].samples_curve]
    assert trace.y.linthresh == pytest.approx(np.median(spreads))
    assert math.isnan(largest.y.linthresh)
    for chart, message in ((layers_chart, "--per-layer"), (samples_chart, "--samples-curve")):
        with pytest.raises(NotEnoughError, match=message):
            chart(make_study(), "init")
