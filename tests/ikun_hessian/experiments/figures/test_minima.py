"""Tests of ikun_hessian.experiments.figures.minima and study_gap: every mark from the results, tau by SciPy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from run_tools import INITS, make_run, make_study
from scipy import stats
from study_tools import full_study

from hessian_tools.results.spectrum import SpectrumResult
from ikun_hessian.experiments.figures.chart import Mark, NotEnoughError, Panel
from ikun_hessian.experiments.figures.gap import gap_chart
from ikun_hessian.experiments.figures.minima import layers_chart, one_image_chart, ranks_chart, samples_chart
from ikun_hessian.experiments.runs import TrainingRun

RANKS = ("Hessian eigenvalue λ", "GGN eigenvalue λ")


@pytest.fixture(scope="module")
def runs() -> list[TrainingRun]:
    return full_study()


def panel(panels: Sequence[Panel], row: str, column: str = "") -> Panel:
    (found,) = [p for p in panels if (p.row, p.column) == (row, column)]
    return found


def marks(found: Panel, kind: str, level: str = "kaiming") -> list[Mark]:
    return [m for m in found.marks if (m.kind, m.level) == (kind, level)]


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
    assert "eigenvalues linear within ±0.00032 and logarithmic" in chart.caption
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
        NotEnoughError, match=r"not measured alike \(loss ≤ 0.02\): the number of samples differs, 50, 1437"
    ):
        chart([changed(runs[0], fewer), *runs[1:]], "init")
    with pytest.raises(NotEnoughError, match=r"run `ikun-hessian spectrum`|no three runs|no two levels"):
        chart([dataclasses.replace(run, spectra={}, flatness={}) for run in runs], "init")


def test_one_image_ranks_and_values(runs: list[TrainingRun]) -> None:
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
    with pytest.raises(NotEnoughError, match="no two levels"):
        one_image_chart([r for r in made if r.value("init") == "ikun"], "init")
    assert len(one_image_chart(runs, "init").panels) == 2  # the image was taken at the end alone


def test_layers_and_samples(runs: list[TrainingRun]) -> None:
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


def test_gap_has_every_run_and_kendalls_tau(runs: list[TrainingRun]) -> None:
    found = gap_chart(runs, "init").panels
    assert list(dict.fromkeys(p.page for p in found)) == ["loss ≤ 0.02", "at the end"]
    assert len(found) == 16
    columns = ["Hessian λ₁", "GGN λ₁", "GGN λ₁, norm-scaled", "adaptive average sharpness"]
    assert list(dict.fromkeys(p.column for p in found)) == columns
    (shown,) = [p for p in found if (p.row, p.column, p.page) == ("loss gap", "GGN λ₁", "at the end")]
    known = [r for r in runs if not r.diverged]
    x = [r.spectra[""].spectra["ggn"].eigenvalues[0].value for r in known]
    y = [r.log[-1]["test_loss"] - r.log[-1]["loss"] for r in known]
    assert [(m.run, m.x, m.value) for m in shown.marks] == [(r.name, *xy) for r, *xy in zip(known, x, y, strict=True)]
    first, within = shown.foot.splitlines()
    assert first.startswith(f"τ {stats.kendalltau(x, y).statistic:.2f} [".replace("-", "−"))
    pairs = [
        np.sign((x[i] - x[j]) * (y[i] - y[j]))
        for i, a in enumerate(known)
        for j, b in enumerate(known[:i])
        if a.value("init") == b.value("init")
    ]
    assert within.startswith(f"within {np.mean(pairs):.2f} [".replace("-", "−"))
    (accuracy,) = [p for p in found if (p.row, p.column, p.page) == ("accuracy gap", "GGN λ₁", "loss ≤ 0.02")]
    for m in accuracy.marks:
        log = next(r.log for r in runs if r.name == m.run)
        at = next(line for line in log if line["loss"] <= 0.02)
        assert m.value == pytest.approx(at["accuracy"] - at["test_accuracy"])


def test_gap_from_flatness_alone(runs: list[TrainingRun]) -> None:
    def alone(run: TrainingRun) -> TrainingRun:
        if "" not in run.flatness:  # diverged
            return dataclasses.replace(run, spectra={})
        found = run.flatness[""]
        scaled = dataclasses.replace(found.main["ggn lambda_max"], value=7 * found.main["ggn lambda_max"].value)
        more = dataclasses.replace(found, main={**found.main, "ggn lambda_max scaled": scaled})
        return dataclasses.replace(run, spectra={}, flatness={**run.flatness, "": more})

    runs = [alone(run) for run in runs]
    found = gap_chart(runs, "init").panels
    measured = {
        "Hessian λ₁": "hessian lambda_max",
        "GGN λ₁": "ggn lambda_max",
        "GGN λ₁, norm-scaled": "ggn lambda_max scaled",
        "adaptive average sharpness": "adaptive average sharpness",
    }
    shown = [p for p in found if p.row == "accuracy gap" and "end" in p.page]
    assert [p.column for p in shown] == list(measured)
    for panel in shown:
        metrics = {r.name: r.flatness[""].metrics[measured[panel.column]].value for r in runs if not r.diverged}
        assert {m.run: m.x for m in panel.marks} == metrics


def test_gap_needs_three_runs_with_a_log(runs: list[TrainingRun]) -> None:
    with pytest.raises(NotEnoughError, match="no three runs"):
        gap_chart(runs[:2], "init")
    with pytest.raises(NotEnoughError, match="no three runs"):
        gap_chart([dataclasses.replace(run, log=()) for run in runs], "init")
    lost = [dataclasses.replace(run, failures=("NaN: x",)) for run in runs[:2]]
    assert len(gap_chart([*lost, *runs[2:6]], "init").panels[0].marks) == 4
    few = gap_chart(runs[:3], "init").panels[0].foot
    assert "[" not in few  # no interval from three
    assert math.isfinite(float(few.removeprefix("τ ").replace("−", "-")))
