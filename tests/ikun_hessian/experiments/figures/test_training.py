"""Tests of the figures of training: every mark is computed from the logs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from run_tools import LAYERS, make_run, make_study
from study_tools import full_study, gain_study, marks, panel

from hessian_tools.results.spectrum import SpectrumResult
from ikun_hessian.experiments.comparison.comparison import compare_runs
from ikun_hessian.experiments.comparison.measures import SPEED
from ikun_hessian.experiments.figures.chart import NotEnoughError
from ikun_hessian.experiments.figures.training import depth_chart, epochs_chart, gain_chart, start_chart, training_chart
from ikun_hessian.experiments.runs import TrainingRun


def logged(accuracies: Sequence[float], losses: Sequence[float | None], **changes: Any) -> TrainingRun:
    log = [
        {"epoch": i, "test_accuracy": a, "loss": loss, "layers": {}}
        for i, (a, loss) in enumerate(zip(accuracies, losses, strict=True), 1)
    ]
    return dataclasses.replace(make_run(training={"epochs": 4}), log=tuple(log), **changes)


def test_start_is_the_median_and_quartiles_over_seeds() -> None:
    runs = make_study(seeds=range(5))
    found = start_chart(runs, "init")
    assert [p.row for p in found.panels] == ["variance of the current", "mean square gradient", "firing rate"]
    for row, key in (
        ("variance of the current", "current_variance"),
        ("mean square gradient", "gradient_square"),
        ("firing rate", "firing_rate"),
    ):
        shown = marks(panel(found.panels, row), "median", "kaiming")
        values = np.array([[layer[key] for layer in r.start["layers"]] for r in runs if r.value("init") == "kaiming"])  # type: ignore[index]
        expected = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
        assert [m.x for m in shown] == [1, 2, 3, 4]
        assert np.array([(m.low, m.value, m.high) for m in shown]).T == pytest.approx(expected)
        assert {m.n for m in shown} == {5}


def test_start_counts_a_seed_once_whatever_trained_it_and_leaves_out_what_is_missing() -> None:
    sgd, adam = (make_study(seeds=(0, 1), training={"optimizer": o}) for o in ("sgd", "adam"))
    (forward, _, _) = start_chart([*sgd, *adam], "init").panels
    assert {m.n for m in forward.marks} == {2}
    start = sgd[0].start
    assert start is not None
    first = {**start["layers"][0], "current_variance": None}
    broken = dataclasses.replace(sgd[0], start={**start, "layers": [first, *start["layers"][1:], "x"]})
    (forward, *_) = start_chart([broken, *sgd[1:]], "init").panels
    assert [m.n for m in marks(forward, "median", "ikun")] == [1, 2, 2, 2]
    by_norm = start_chart([*sgd, *make_study(seeds=(0,), network={"norm": "none"})], "init").panels
    assert [p.column for p in by_norm[::3]] == ["bn", "norm none"]
    with pytest.raises(NotEnoughError, match="statistics of its start"):
        start_chart([dataclasses.replace(r, start=start) for r, start in zip(sgd, [None, {}] * 3, strict=True)], "init")


def test_gain_shows_every_run_and_those_that_never_get_there() -> None:
    runs = gain_study()
    waiting = dataclasses.replace(runs[0], name="waiting", finished=False)
    found = gain_chart([*runs, waiting], "init", 0.9)
    assert [p.column for p in found.panels] == ["atan:2", "triangle:1"]
    assert "Not drawn: 1 with a log that ends before the training." in found.caption
    for p in found.panels:
        dots, line = marks(p, "run", "ikun"), marks(p, "median", "ikun")
        assert {m.run for m in dots} < {r.name for r in runs}
        assert len(dots) == 27
        assert sorted({m.x for m in dots}) == [2.0**k for k in range(-4, 5)]
        never = {m.x for m in dots if m.note == "never"}
        assert never == {m.x for m in dots if math.isinf(m.value)} >= {1 / 16, 16.0}
        at_one = [m.value for m in dots if m.x == 1]
        assert next(m.value for m in line if m.x == 1) == np.median(at_one)  # of three
        assert not {m.x for m in line} & {1 / 16, 16.0}
        (one,) = marks(p, "median", "kaiming")  # runs from before there was a gain
        assert one.x == 1
    assert gain_chart(runs, "gain", 0.9).by == "init"
    sweep = [run for run in runs if run.value("seed") == 0]
    assert len(marks(gain_chart(sweep, "init", 0.9).panels[0], "median", "ikun")) > 3  # one seed is a line too
    with pytest.raises(NotEnoughError, match="vary gain"):
        gain_chart(make_study(["ikun"]), "init", 0.9)


def test_depth_shows_the_last_accuracies_by_the_number_of_layers() -> None:
    def deep(run: TrainingRun, layers: int) -> TrainingRun:
        assert run.start is not None
        start = {**run.start, "layers": [dict(run.start["layers"][0]) for _ in range(layers)]}
        return dataclasses.replace(run, start=start, network={**run.network, "depth": layers})

    shallow, many = make_study(seeds=range(5), diverged=()), make_study(seeds=range(5), diverged=())
    runs = [*(deep(run, 5) for run in shallow), *(deep(run, 11) for run in many)]
    unfinished = dataclasses.replace(runs[0], name="unfinished", finished=False)
    diverged = [
        dataclasses.replace(deep(make_run(seed=seed, diverged=True), 21), name=f"diverged{seed}") for seed in range(3)
    ]
    (found,) = depth_chart([*runs, unfinished, *diverged], "init").panels
    shown = marks(found, "median", "kaiming")
    assert [m.x for m in shown] == [5, 11, 21]
    finals = [run.log[-1]["test_accuracy"] for run in shallow if run.value("init") == "kaiming"]
    assert (shown[0].low, shown[0].value, shown[0].high) == pytest.approx(np.quantile(finals, [0.25, 0.5, 0.75]))
    assert [m.n for m in shown] == [5, 5, 3]
    assert shown[2].value == -math.inf
    with pytest.raises(NotEnoughError, match="vary depth"):
        depth_chart(shallow, "init")


def test_medians_of_epochs_are_those_of_the_comparison() -> None:
    runs = [
        dataclasses.replace(logged(a, [0.1] * len(a), **changes), name=f"r{gain}-{i}-{init}")
        for init in ("kaiming", "ikun")
        for gain in (0.5, 1.0)
        for i, (a, changes) in enumerate(
            [([0.5, 0.95], {}), ([0.5, 0.5, 0.95], {}), ([0.95], {}), ([0.5, 0.5, 0.5, 0.95], {})]
            + ([([0.5, 0.6, 0.7], {"finished": False})] * 2 if gain == 1 else [])
        )
    ]
    runs = [
        dataclasses.replace(
            run,
            training={
                **run.training,
                "gain": float(run.name[1:].split("-")[0]),
                "init": run.name.split("-")[2],
                "seed": int(run.name.split("-")[1]),
            },
        )
        for run in runs
    ]
    shown = {m.x: m.value for m in marks(gain_chart(runs, "init", 0.9).panels[0], "median", "kaiming")}
    assert shown == {0.5: 2, 1: 3}  # the first epoch at which half are there: not 2.5; two of six are under way
    for gain in (0.5, 1.0):
        some = [run for run in runs if run.value("gain") == gain]
        rows = compare_runs(some, "init", accuracy=0.9).rows
        (row,) = [r for r in rows if r.family == SPEED and r.level == "kaiming"]
        assert row.median.value == shown[gain]
    without = dataclasses.replace(runs[0], name="without", log=())
    assert gain_chart([*runs, without], "init", 0.9).panels == gain_chart(runs, "init", 0.9).panels


def test_what_was_varied_instead_of_the_gain_is_named() -> None:
    old = [dataclasses.replace(make_run("ikun", 0, training={"alpha": a}), name=f"{a}") for a in (0.5, 1.0)]
    with pytest.raises(
        NotEnoughError, match=r"vary gain \(for runs that differ in alpha, use --only epochs --by alpha\)$"
    ):
        gain_chart(old, "init", 0.9)
    with pytest.raises(NotEnoughError, match=r"vary gain$"):
        gain_chart(old[:1], "init", 0.9)


def test_captions_speak_of_lines_and_bands_only_where_there_are_some() -> None:
    runs = gain_study(seeds=2)
    assert "lines: medians (Kaplan–Meier)" in gain_chart(runs, "init", 0.9).caption
    wide = [run for run in runs if (run.value("init"), run.value("gain")) in (("ikun", 4.0), ("kaiming", None))]
    apart = gain_chart(wide, "init", 0.9)
    assert "larger marks: medians (Kaplan–Meier)" in apart.caption
    assert "lines" not in apart.caption.lower()
    assert "Lines and bands: median and quartiles over seeds" in epochs_chart(make_study(), "init", 0.9).caption
    assert "Lines: medians over seeds" in epochs_chart(make_study(seeds=(0,)), "init", 0.9).caption


def test_arrivals_step_up_and_censored_runs_are_ticked() -> None:
    runs = [
        logged([0.5, 0.95], [1, 0.5]),
        logged([0.5, 0.6, 0.7, 0.9], [1, 0.5, 0.4, 0.3]),
        logged([0.5, 0.6], [1, 0.5], finished=False),  # still running: censored at 2, after the event there
        logged([0.5, 0.6], [1, 0.5]),  # stopped early: never
    ]
    reached = panel(epochs_chart(runs, "init", 0.9).panels, "share at 90%")
    steps = marks(reached, "steps", "kaiming")
    assert [(m.x, m.value) for m in steps] == [(0, 0), (2, pytest.approx(0.25)), (4, pytest.approx(0.625))]
    ticks = marks(reached, "censored", "kaiming")
    assert [(m.x, m.value) for m in ticks] == [(2, pytest.approx(0.25)), (4, pytest.approx(0.625))]
    longer = [dataclasses.replace(r, training={**r.training, "epochs": 6}) for r in runs[:2]]
    (*_, last) = marks(panel(epochs_chart(longer, "init", 0.9).panels, "share at 90%"), "steps", "kaiming")
    assert (last.x, last.value) == (6, 1.0)  # the line continues to the end


def test_curves_keep_what_stopped_and_count_what_diverged_as_worst() -> None:
    runs = [
        logged([0.5, 0.6, 0.7, 0.8], [4, 3, 2, 1]),
        logged([0.5, 0.8], [4, 2]),
        logged([0.5, 0.9, 0.0], [4, 1, None], failures=("NaN: the loss is not finite",)),
    ]
    found = epochs_chart(runs, "init", 0.9).panels
    loss, accuracy = panel(found, "training loss"), panel(found, "test accuracy")
    assert [m.value for m in marks(loss, "median", "kaiming")] == [4, 2, 2, 2]
    assert [m.high for m in marks(loss, "median", "kaiming")] == [4, 2.5, math.inf, math.inf]
    assert [m.value for m in marks(accuracy, "median", "kaiming")] == [0.5, 0.8, 0.7, 0.8]
    (cross,) = marks(loss, "diverged", "kaiming")
    assert (cross.x, cross.value) == (2, 1)
    never = logged([None, None], [None, None], failures=("NaN: the loss is not finite",))  # type: ignore[list-item]
    chart = epochs_chart([runs[0], never, never], "init", 0.9)
    loss, accuracy = panel(chart.panels, "training loss"), panel(chart.panels, "test accuracy")
    for of, worst in ((loss, math.inf), (accuracy, -math.inf)):  # never measured: no median, a cross on the edge
        assert [m.value for m in marks(of, "median", "kaiming")] == [worst] * 4
        assert [(m.x, m.value) for m in marks(of, "diverged", "kaiming")] == [(1, worst)] * 2
    assert "× on the edge: runs that diverged before any measurement" in chart.caption
    assert "on the edge" not in epochs_chart(runs, "init", 0.9).caption
    way = [*runs[:1], dataclasses.replace(runs[1], finished=False)]
    assert [m.n for m in marks(panel(epochs_chart(way, "init", 0.9).panels, "training loss"), "median", "kaiming")] == [
        2, 2, 1, 1,
    ]  # fmt: skip
    with pytest.raises(NotEnoughError, match="no run has a log"):
        epochs_chart([dataclasses.replace(run, log=()) for run in runs], "init", 0.9)


def test_training_has_snapshots_and_every_layers_derivative() -> None:
    runs = full_study(seeds=4)
    found = training_chart(runs, "init").panels
    assert [p.row for p in found[:4]] == ["Hessian λ₁", "Hessian trace", "GGN λ₁", "GGN trace"]
    rows = ["E[f′(h)²]", "E[f′(h)²], max/min over t", "variance of the current"]
    assert [(p.row, p.column) for p in found[4:]] == list(itertools.product(rows, LAYERS))
    assert [p.page for p in found] == [""] * 4 + ["layers"] * 12
    shown = marks(found[0], "median", "kaiming")
    assert [m.x for m in shown] == [4, 8, 12]
    keys = {4: "epoch0004", 8: "epoch0008", 12: ""}
    for m in shown:
        values = [r.spectra[keys[int(m.x)]] for r in runs if r.value("init") == "kaiming"]
        assert m.value == pytest.approx(np.median([v.spectra["hessian"].eigenvalues[0].value for v in values]))
    for row, key in zip(rows[::2], ("derivative_square", "current_variance"), strict=True):
        values = [r.log[6]["layers"]["fc1"][key] for r in runs if r.value("init") == "kaiming"]
        assert marks(panel(found, row, "fc1"), "median", "kaiming")[6].value == pytest.approx(np.median(values))
    assert {m.value for m in panel(found, rows[1], "fc1").marks} == {0.2 / 0.14}


def with_layers(runs: Sequence[TrainingRun], layers: Any) -> list[TrainingRun]:
    return [dataclasses.replace(run, log=tuple({**line, "layers": layers} for line in run.log)) for run in runs]


def test_training_draws_of_layers_what_the_log_has() -> None:
    runs = make_study(["ikun"], moments=("",))
    steps = {"a": [0.1, 0.4, 0.2], "b": [0.0, 0.3], "c": [0.0, 0.0], "d": [0.5], "e": [0.1, None], "f": "x"}
    found = training_chart(
        with_layers(runs, {name: {"derivative_square_by_step": of} for name, of in steps.items()}), "init"
    )
    assert {p.row for p in found.panels} == {"E[f′(h)²], max/min over t"}
    ratios = {p.column: {m.value for m in p.marks} for p in found.panels}
    assert ratios == {"a": {4.0}, "b": set(), "c": set(), "d": set(), "e": set(), "f": set()}
    assert "its ratio of the largest to the smallest value over the time steps t (of layers, on" in found.caption
    assert "variance" not in found.caption
    some = with_layers(runs[:2], {"b": {"derivative_square_by_step": [0.0, 0.3]}})
    some += with_layers(runs[2:], {"b": {"derivative_square_by_step": [0.1, 0.3]}})
    (only,) = training_chart(some, "init").panels
    assert (only.marks[0].value, only.marks[0].high, only.marks[0].n) == (pytest.approx(3), math.inf, 6)


def test_training_s_symlog_axis_is_linear_as_far_as_the_traces_are_uncertain() -> None:
    runs = full_study(["ikun"], seeds=4)
    sizes = iter(range(1, 100))

    def uncertain(result: SpectrumResult, sure: bool) -> SpectrumResult:
        trace = result.spectra["hessian"].trace
        assert trace is not None
        error = next(sizes)
        known = dataclasses.replace(trace, stderr=0.3 * error, data_stderr=math.nan if sure else 0.4 * error)
        spectrum = dataclasses.replace(result.spectra["hessian"], trace=known)
        return dataclasses.replace(result, spectra={**result.spectra, "hessian": spectrum})

    shown = [
        dataclasses.replace(r, spectra={k: uncertain(v, sure=r is runs[0]) for k, v in r.spectra.items()}) for r in runs
    ]
    expected = [
        t.stderr if math.isnan(t.data_stderr) else 5 / 3 * t.stderr
        for r in shown
        for key, result in r.spectra.items()
        if key in ("", "epoch0004", "epoch0008") and (t := result.spectra["hessian"].trace)
    ]
    by_row = {p.row: p.y.linthresh for p in training_chart(shown, "init").panels}
    assert by_row["Hessian trace"] == pytest.approx(np.median(expected))
    unknown = dataclasses.replace(runs[0].spectra[""].spectra["ggn"].trace, stderr=math.nan, data_stderr=math.nan)  # type: ignore[type-var]
    bare = [
        dataclasses.replace(
            r,
            spectra={
                k: dataclasses.replace(
                    v, spectra={"ggn": dataclasses.replace(v.spectra["ggn"], trace=unknown, eigenvalues=())}
                )
                for k, v in r.spectra.items()
            },
        )
        for r in runs
    ]
    assert math.isnan(training_chart(bare, "init").panels[0].y.linthresh)


def test_training_without_snapshots_says_so_by_its_panels() -> None:
    runs = make_study(moments=("",))
    chart = training_chart(runs, "init")
    assert {(p.column, p.page) for p in chart.panels} == {(name, "layers") for name in LAYERS}
    assert "eigenvalue" not in chart.caption
    deep = {f"fc{i}": {"derivative_square": 0.1 * i} for i in range(1, 12)}
    some = training_chart(with_layers(runs, deep), "init").panels
    assert [p.column for p in some] == ["fc1", "fc3", "fc5", "fc7", "fc9", "fc11"]
    assert {p.page for p in some} == {"6 of 11 layers"}
    two = [*with_layers(runs, deep), *make_study(moments=("",), network={"norm": "none"})]
    assert {p.page for p in training_chart(two, "init").panels} == {"bn, 6 of 11 layers", "norm none, layers"}
    with pytest.raises(NotEnoughError, match="two snapshots"):
        training_chart(with_layers(runs, [1]), "init")
