"""Tests of panels and axes as they are drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run_tools import make_run
from study_tools import gain_study

from ikun_hessian.experiments.figures.axes import y_range
from ikun_hessian.experiments.figures.chart import Axis, Mark, Panel
from ikun_hessian.experiments.figures.figures import chart_figures, charts
from ikun_hessian.experiments.figures.panels import draw_panel, level_looks
from ikun_hessian.experiments.grouping import gain_name, settings_groups


def traces(values: Sequence[float]) -> list[Mark]:
    return [Mark("ikun", "median", i, v) for i, v in enumerate(values)]


def test_a_symlog_axis_is_linear_at_least_as_far_as_asked() -> None:
    marks = traces([-1.0, -0.002, 0.5, 0.01, 40.0])
    noisy, bare, small = (y_range("signed", marks, least) for least in (0.8, math.nan, 1e-9))
    assert noisy is not None
    assert bare == small == y_range("signed", marks)  # unknown, and within what is linear anyway
    assert bare is not None
    assert bare.axis.linthresh < 0.8
    assert (noisy.axis.kind, noisy.axis.linthresh) == ("symlog", 0.8)
    u = np.arcsinh(np.array([noisy.axis.low, -1.0, 40.0, noisy.axis.high]) / 0.8)  # the room is 5% at both ends
    assert [u[1] - u[0], u[3] - u[2]] == pytest.approx([0.05 * (u[2] - u[1])] * 2)
    wide = y_range("signed", marks, 5.0)  # more than a tenth of the largest: nothing is left for a logarithm
    assert wide is not None
    assert (wide.axis.kind, wide.axis.low < -1, wide.axis.high > 40) == ("linear", True, True)
    positive = traces([1.0, 2.0, 30.0])
    assert y_range("signed", positive, 5.0) == y_range("signed", positive)  # a logarithmic axis stays one


@pytest.mark.parametrize(
    ("gain", "name"),
    [
        *((2.0**-10, "1/1024"), (float(f"{2.0**-10:g}"), "1/1024"), (1 / 3, "1/3"), (1.0, "1"), (16, "16")),
        *((2.5, "2.5"), (0.4, "0.4"), (0.9, "0.9"), (0.0, "0"), (1e-6, "1e-06"), (1e7, "1e+07")),
    ],
)
def test_a_gain_is_named_as_a_fraction_where_it_is_one(gain: float, name: str) -> None:
    assert gain_name(gain) == name
    runs = [make_run(training={"gain": gain}), make_run(training={"gain": 7.0})]
    assert set(settings_groups(runs, "init")) == {f"gain {name}", "gain 7"}


def test_gains_have_one_name_in_legend_and_axis() -> None:
    names = ["0.000976562", "0.0625", "1", "16"]
    assert [look.label for look in level_looks(names, "gain").values()] == ["1/1024", "1/16", "1", "16"]
    assert [look.label for look in level_looks(["0.0625", "1.3"], "gain").values()] == ["0.0625", "1.3"]  # all alike
    for other in (level_looks(names, "alpha"), level_looks([*names, "none"], "gain")):
        assert {look.label for look in other.values()} == {""}
    runs = [run for run in gain_study() if run.value("gain") is not None]
    (figure, *_) = chart_figures(charts("gain", 0.9)["epochs"](runs), 1)
    assert {"1/16", "1/2", "8"} <= {text.get_text() for text in figure.legends[0].get_texts()}


def test_all_gains_have_their_labels_in_one_column() -> None:
    runs = gain_study()
    shown = [
        dataclasses.replace(r, training={**r.training, "gain": r.training.get("gain", 1.0) ** 2.5}) for r in runs
    ]  # 1/1024 to 1024
    for figure in chart_figures(charts("init", 0.9)["gain"](shown), 1):
        figure.canvas.draw()  # type: ignore[attr-defined]
        for ax in figure.axes:
            labels = [text for text in ax.get_xticklabels() if text.get_text()]
            assert len(labels) == 9
            boxes = [text.get_window_extent() for text in labels]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for ax in chart_figures(charts("init", 0.9)["gain"](runs), 2)[0].axes:  # nothing is turned where all fit
        assert {text.get_rotation() for text in ax.get_xticklabels()} == {0.0}


def drawn(kind: str, values: Sequence[float], worst: float) -> Axes:
    """A run that was measured and, in another level, one that diverged before it was."""
    marks = [Mark("a", "median", i, v, v, v) for i, v in enumerate(values, 1)]
    marks += [Mark("b", "median", i, worst, worst, worst) for i in range(1, 4)]
    marks += [Mark("c", "median", i, v, worst if worst < 0 else v, v, n=3) for i, v in enumerate(values, 1)]
    marks += [Mark("b", "diverged", 1, worst, note="diverged"), Mark("a", "diverged", 3, values[-1], note="diverged")]
    panel = Panel("y", "", Axis("epoch", "epoch"), Axis("y", kind), tuple(marks), ())
    ax = Figure().add_subplot()
    draw_panel(ax, panel, level_looks(["a", "b", "c"]), y_range(kind, marks), marks, (200, 100))
    return ax


@pytest.mark.parametrize(("kind", "worst"), [("linear", -math.inf), ("log", math.inf)])
def test_what_was_never_measured_is_a_cross_on_the_edge_and_no_value(kind: str, worst: float) -> None:
    ax = drawn(kind, [0.3, 0.6, 0.9], worst)
    low, high = ax.get_ylim()
    lines = {str(line.get_label()): np.asarray(line.get_ydata(), float) for line in ax.lines}
    assert np.isnan(lines["b"]).all()
    assert lines["diverged b"].tolist() == [low if worst < 0 else high]
    assert lines["diverged a"].tolist() == [0.9]
    if worst < 0:
        (band,) = [c for c in ax.collections if c.get_label() == "band c"]
        assert min(y for _, y in band.get_paths()[0].vertices.tolist()) == low
