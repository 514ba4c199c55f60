"""Tests of the figure of curvature against the accuracy gap."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats
from study_tools import full_study

from ikun_hessian.experiments.figures.chart import NotEnoughError
from ikun_hessian.experiments.figures.gap import gap_chart
from ikun_hessian.experiments.runs import TrainingRun


@pytest.fixture(scope="module")
def runs() -> list[TrainingRun]:
    return full_study()


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


def test_the_gap_figure_can_be_drawn_from_flatness_only(runs: list[TrainingRun]) -> None:
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
    for each in shown:
        metrics = {r.name: r.flatness[""].metrics[measured[each.column]].value for r in runs if not r.diverged}
        assert {m.run: m.x for m in each.marks} == metrics


def test_gap_needs_three_runs_with_a_log(runs: list[TrainingRun]) -> None:
    with pytest.raises(NotEnoughError, match="fewer than three runs"):
        gap_chart(runs[:2], "init")
    with pytest.raises(NotEnoughError, match="fewer than three runs"):
        gap_chart([dataclasses.replace(run, log=()) for run in runs], "init")
    lost = [dataclasses.replace(run, failures=("NaN: x",)) for run in runs[:2]]
    assert len(gap_chart([*lost, *runs[2:6]], "init").panels[0].marks) == 4
    few = gap_chart(runs[:3], "init").panels[0].foot
    assert "[" not in few  # no interval from three
    assert math.isfinite(float(few.removeprefix("τ ").replace("−", "-")))
