"""Tests of the curves over training and over the number of samples: marks, captions and legibility."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from figure_tools import caption_of, collisions, ends, line, on_paper, result, run, said, snapshot, words
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hessian_tools.plots.curves import linear_axis, value_axis
from hessian_tools.plots.spectrum import samples_figure, trajectory_figure
from hessian_tools.results.spectrum import SamplePoint, SpectrumResult
from hessian_tools.results.trajectory import trajectory_rows

pytestmark = pytest.mark.usefixtures("warnings_are_errors")

EPOCHS = (6, 12, 18, 24, 30, 36, 42, 48)


@pytest.fixture(scope="module")
def drawn() -> Figure:
    return trajectory_figure(run(EPOCHS[::-1]))


def bars(ax: Axes) -> list[list[list[float]]]:
    """Every error bar: its lower and upper end."""
    found = [c for c in ax.collections if isinstance(c, LineCollection)]
    return [np.asarray(segment).tolist() for c in found for segment in c.get_segments()]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left").split("  ")[-1] for ax in figure.axes]


# the axis of a curve


def thousandths(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda x: round(x, 3))


@given(
    st.lists(thousandths(-1e3, 1e3), min_size=1, max_size=8), thousandths(0, 10), st.sampled_from([1e-12, 1.0, 1e12])
)
def test_axis_shows_every_value_and_scales_with_them(y: list[float], error: float, scale: float) -> None:
    v, e = np.array(y), np.full(len(y), error)
    for choose in (value_axis, linear_axis):
        axis, scaled = choose(v, e), choose(scale * v, scale * e)
        assert axis.low < v.min() - error <= v.max() + error < axis.high
        assert scaled.kind == axis.kind
        if v.any():
            assert [scaled.low, scaled.high] == pytest.approx([scale * axis.low, scale * axis.high], rel=1e-9)
            assert scaled.linthresh == pytest.approx(scale * axis.linthresh, nan_ok=True)


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        ([1.0, 5.0], "log"),
        ([1e-5, 1.0], "log"),
        ([1e-8, 1.0], "symlog"),
        ([-0.01, 5.0], "symlog"),
        ([-3.0, -0.1], "symlog"),
        ([0.0, 5.0], "linear"),
        ([-1.0, 5.0], "linear"),
        ([0.0, 0.0], "linear"),
        ([math.nan, 2.0, math.inf], "log"),
    ],
)
def test_the_axis_is_linear_logarithmic_or_symlog_by_its_values(y: list[float], kind: str) -> None:
    assert value_axis(np.array(y), np.full(len(y), math.nan)).kind == kind


def test_an_axis_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="no finite value"):
        value_axis(np.array([math.nan]), np.zeros(1))


def test_no_error_bar_is_cut() -> None:
    wanted = {"log": ([1.0, 5.0], [0.8, 4.0]), "symlog": ([0.01, 5.0], [0.01, 7.0]), "linear": ([1.0, 5.0], [1.0, 7.0])}
    for kind, (y, e) in wanted.items():
        axis = value_axis(np.array(y), np.array(e))
        assert axis.kind == kind
        assert axis.low < min(y[0] - e[0], y[1] - e[1])
        assert axis.high > y[1] + e[1]


# along a training run


def test_eigenvalues_are_drawn_against_the_epoch(drawn: Figure) -> None:
    ax, rows = drawn.axes[0], trajectory_rows(run(EPOCHS))
    for name in ("hessian", "ggn"):
        for rank in (1, 2, 3, 4, 5, "min")[: 6 if name == "hessian" else 5]:
            x, y = line(ax, f"{name} {rank}")
            assert x.tolist() == list(EPOCHS)
            assert y.tolist() == [row[f"{name}.lambda_{rank}"] for row in rows]
    widths = {each.get_label(): each.get_linewidth() for each in ax.lines}
    assert widths["hessian 1"] > widths["hessian 2"] == widths["ggn 5"]
    first = [bar for bar in bars(ax) if bar[0][0] == EPOCHS[0]]
    tops = [rows[0]["hessian.lambda_1"], rows[0]["ggn.lambda_1"], rows[0]["hessian.lambda_min"]]
    wanted = sorted([v - abs(v) / 10, v + abs(v) / 10] for v in tops)
    assert sorted([low[1], high[1]] for low, high in first) == [pytest.approx(pair) for pair in wanted]
    assert ax.get_yscale() == "symlog"
    assert "The vertical axis is linear within ±" in caption_of(drawn)


def test_traces_are_drawn_with_both_errors(drawn: Figure) -> None:
    ax, rows = drawn.axes[1], trajectory_rows(run(EPOCHS))
    for name in ("hessian", "ggn"):
        x, y = line(ax, f"{name}.trace")
        assert x.tolist() == list(EPOCHS)
        assert y.tolist() == [row[f"{name}.trace"] for row in rows]
    trace = rows[0]["ggn.trace"]
    assert [[6, pytest.approx(0.95 * trace)], [6, pytest.approx(1.05 * trace)]] in bars(ax)
    assert "over the data in (a), over data and probes in (b)" in caption_of(drawn)


def test_layers_loss_and_accuracy_are_drawn(drawn: Figure) -> None:
    assert titles(drawn) == ["ends of the spectrum", "trace", "surrogate derivative", "loss", "accuracy"]
    *_, layers, loss, accuracy = drawn.axes
    rows = trajectory_rows(run(EPOCHS))
    for i in range(1, 5):
        key = f"spike{i}.derivative_square"
        assert line(layers, key)[1].tolist() == [row[key] for row in rows]
    assert [t.get_text() for t in layers.texts] == ["spike4", "spike3", "spike2", "spike1"]  # upwards, as their ends
    colours = {each.get_color() for each in layers.lines if str(each.get_label()).startswith("spike")}
    assert len(colours) == 4
    assert line(loss, "loss")[1].tolist() == [row["loss"] for row in rows]
    assert loss.get_yscale() == "log"
    assert line(accuracy, "accuracy")[1].tolist() == [row["accuracy"] for row in rows]
    assert accuracy.get_yscale() == "linear"
    assert loss.get_xlim() == accuracy.get_xlim() == layers.get_xlim()


def test_stability_limit_is_drawn_and_explained(drawn: Figure) -> None:
    limit = line(drawn.axes[0], "limit")[1]
    assert limit.tolist() == pytest.approx([38, 38])
    assert drawn.axes[0].get_ylim()[1] > 38
    text = caption_of(drawn)
    for part in (
        "Dashed line: 2(1 + β)/η = 38 for momentum β = 0.9, learning rate η = 0.1 (initial, cosine schedule)",
        "its training-mode mini-batch loss", "curvature in evaluation mode",
    ):  # fmt: skip
        assert part in text
    assert "2(1 + β)/η, for training-mode mini-batches" in text  # the legend


@pytest.mark.parametrize(
    ("training", "scale", "there", "told"),
    [
        ({"lr": 1e-5}, 1.0, False, "Not drawn because it is too far away: 2(1 + β)/η = 3.8e+05"),
        ({"lr": 0.1}, 1e-4, False, "Not drawn because it is too far away: 2(1 + β)/η = 38"),
        ({"lr": 0.1}, 1e5, False, "Not drawn because it is too far away"),
        ({"momentum": 0.0, "schedule": "none"}, 1.0, True, "= 20 for momentum β = 0, learning rate η = 0.1."),
        ({"optimizer": "adam"}, 1.0, False, None),
    ],
)  # fmt: skip
def test_the_stability_limit_outside_the_axis_is_stated(
    training: dict[str, Any], scale: float, there: bool, told: str | None
) -> None:
    figure = trajectory_figure(run([6, 48], training=training, scale=scale))
    assert ("limit" in [each.get_label() for each in figure.axes[0].lines]) == there
    assert (told or "6 to 48") in caption_of(figure)
    assert ("2(1 + β)" in caption_of(figure)) == (told is not None)


def without_activity() -> list[SpectrumResult]:
    return [dataclasses.replace(r, activity={}) for r in run([6, 12, 18])]


def without_accuracy() -> list[SpectrumResult]:
    return [dataclasses.replace(r, accuracy=math.nan) for r in run([6, 12, 18])]


def with_loss_alone() -> list[SpectrumResult]:
    return [dataclasses.replace(r, accuracy=math.nan, activity={}) for r in run([6, 12, 18])]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (without_activity, ["ends of the spectrum", "trace", "loss", "accuracy"]),
        (without_accuracy, ["ends of the spectrum", "trace", "surrogate derivative", "loss"]),
        (with_loss_alone, ["ends of the spectrum", "trace", "loss"]),
    ],
)
def test_panels_that_there_is_nothing_for_are_left_out(
    make: Callable[[], list[SpectrumResult]], wanted: list[str]
) -> None:
    figure = trajectory_figure(make())
    assert titles(figure) == wanted
    assert [ax.get_title(loc="left").split("$")[1] for ax in figure.axes] == [
        rf"\mathbf{{({letter})}}" for letter in "abcde"[: len(wanted)]
    ]
    assert collisions(figure) == []


def only(operators: dict[str, Any]) -> list[SpectrumResult]:
    return [dataclasses.replace(r, spectra=operators) for r in run([6, 12, 18])]


def negative_for_a_while() -> list[SpectrumResult]:
    values = [[-0.5, -0.7], [0.001, -0.5], [5.0, 0.2]]
    return [
        dataclasses.replace(r, spectra={"hessian": ends(v, [-3.0], -1.0)})
        for r, v in zip(run([6, 12, 18]), values, strict=True)
    ]


def strange() -> list[SpectrumResult]:
    """Long names, one layer that comes late, NaN loss and values, a checkpoint that no font can print."""
    results = run([1, 1000, 99999], layers=30, training={"init": "$\\frac{" * 9, "seed": "x" * 50, "batch_size": None})
    results = [dataclasses.replace(r, checkpoint={"path": "モ$" * 40}) for r in results]
    rates = {f"a_very_long_$name_{k}": v for k, v in results[1].activity.items()}
    return [
        dataclasses.replace(results[0], activity={}, loss=math.nan),
        *(dataclasses.replace(r, activity=rates) for r in results[1:]),
    ]


CASES: dict[str, tuple[Callable[[], list[SpectrumResult]], str]] = {
    "thirty": (lambda: run(range(1, 31), layers=12), "30 snapshots"),
    "two of forty layers": (lambda: run([1, 2], layers=40), "spike40"),
    "no errors": (lambda: run([6, 12], data_stderr=math.nan), "standard error, over data and probes in (b)"),
    "no trace": (lambda: only({"hessian": ends([2.0, 1.0], [-0.1], None)}), "no trace"),
    "nothing found": (lambda: only({"hessian": ends([], [], None)}), "no eigenvalue found"),
    "all zero": (lambda: only({"hessian": ends([0.0], [0.0], 0.0)}), "epoch"),
    "one eigenvalue": (lambda: only({"fisher": ends([3.0], [], 4.0)}), "largest, λ₁"),
    "two eigenvalues": (lambda: only({"hessian": ends([3.0, 1.0], [], 4.0)}), "λ₂"),
    "negative for a while": (negative_for_a_while, "linear within"),
    "no loss": (lambda: [dataclasses.replace(r, loss=math.nan) for r in run([6, 12])], "no loss"),
    "equal but for rounding": (
        lambda: [dataclasses.replace(snapshot(e), accuracy=x) for e, x in ((6, 0.3), (9, 0.1 + 0.2))],
        "accuracy",
    ),
    "loss of 0": (lambda: [dataclasses.replace(r, loss=0.0) for r in run([6, 12])], "loss"),
    "four operators": (
        lambda: only({name: ends([2.0, 1.0], [-0.1], 3.0) for name in ("hessian", "ggn", "fisher", "relaxed")}),
        "relaxed Hessian",
    ),
    "strange": (strange, "3 snapshots"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_trajectory_can_be_read(case: str) -> None:
    make, message = CASES[case]
    figure = trajectory_figure(make())
    assert message in caption_of(figure)
    assert collisions(figure) == []
    assert min(float(t.get_fontsize()) for t in words(figure)) >= 7
    assert figure.get_size_inches().tolist() == [7.0, 5.2]


def test_not_converged_is_hollow_and_without_error_there_is_no_bar() -> None:
    results = run([6, 12])
    results[1] = snapshot(12, converged=False, data_stderr=math.nan)
    ax = trajectory_figure(results).axes[0]
    hollow = [each for each in ax.lines if each.get_markerfacecolor() == "white" and len(np.asarray(each.get_xdata()))]
    assert {x for each in hollow for x in np.asarray(each.get_xdata()).tolist()} == {12}
    assert len(hollow) == 3  # both lambda_1 and lambda_min
    assert {bar[0][0] for bar in bars(ax)} == {6}


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_eigenvalues_only_relabels_the_trajectory(scale: float) -> None:
    adam = {"optimizer": "adam"}
    before, after = (trajectory_figure(run(EPOCHS, training=adam, scale=s)) for s in (1.0, scale))
    for panel in range(2):
        assert on_paper(after.axes[panel]) == pytest.approx(on_paper(before.axes[panel]), abs=1e-6)
    assert collisions(after) == []


def test_operators_that_a_snapshot_lacks_are_left_out() -> None:
    first, second = run([6, 12])
    less = dataclasses.replace(second, spectra={"hessian": second.spectra["hessian"]})
    figure = trajectory_figure([first, less])
    assert "GGN" not in said(figure)
    assert line(figure.axes[0], "hessian 1")[0].tolist() == [6, 12]


def test_trajectory_of_two_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="training seed differs, 42 for"):
        trajectory_figure([snapshot(3), snapshot(6, training={"seed": 7})])


# along the number of samples


def curve(
    counts: tuple[int, ...] = (1, 4, 16, 64, 256, 1024), resamples: int = 5, sign: float = 1.0
) -> tuple[SamplePoint, ...]:
    rng = np.random.default_rng(0)
    points = []
    for n in counts:
        tops = 8 + 40 * rng.lognormal(0, 0.8, resamples) / n
        traces = 9 + sign * 30 * np.abs(rng.standard_normal(resamples)) / n
        spectra = tuple(tuple((top * np.array([1, 0.6, 0.4, 0.3, 0.25, 0.2])).tolist()) for top in tops)
        points.append(SamplePoint(n, n * resamples <= 1437, spectra, tuple(traces.tolist())))
    return tuple(points)


def sampled(points: tuple[SamplePoint, ...], **changes: Any) -> SpectrumResult:
    return result(
        {"hessian": ends([8.0, 4.0, 3.0], [-2.0], 9.0), "ggn": ends([9.0], [], 9.0)}, samples_curve=points, **changes
    )


def scatter(ax: Axes, label: str) -> tuple[list[list[float]], list[list[float]]]:
    """Full and hollow dots."""
    full, hollow = [each for each in ax.lines if each.get_label() == label]
    assert hollow.get_markerfacecolor() == "white"
    return np.asarray(full.get_xydata()).tolist(), np.asarray(hollow.get_xydata()).tolist()


def test_every_resample_is_a_dot_and_the_median_a_line() -> None:
    points = curve()
    figure = samples_figure(sampled(points[::-1]))
    a, b = figure.axes
    for ax, rank, values in (
        (a, 1, lambda p: [e[0] for e in p.eigenvalues]),
        (a, 5, lambda p: [e[4] for e in p.eigenvalues]),
        (b, 1, lambda p: p.traces),
    ):
        full, hollow = scatter(ax, f"dots {rank}")
        assert full == [[p.samples, y] for p in points if p.disjoint for y in values(p)]
        assert hollow == [[p.samples, y] for p in points if not p.disjoint for y in values(p)]
        assert hollow
        x, y = line(ax, f"median {rank}")
        assert x.tolist() == [p.samples for p in points]
        assert y.tolist() == pytest.approx([np.median(values(p)) for p in points])
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert "median 6" not in [each.get_label() for each in a.lines]
    widths = {each.get_label(): each.get_linewidth() for each in a.lines}
    assert widths["median 1"] > 2 * widths["median 2"]
    assert collisions(figure) == []
    assert "subset that shares samples with another" in said(figure)  # fmt: skip


def test_value_on_all_samples_is_a_line_with_its_error() -> None:
    figure = samples_figure(sampled(curve()))
    for ax, value, error in zip(figure.axes, (8.0, 9.0), (0.8, 0.45), strict=True):
        assert line(ax, "whole")[1].tolist() == [value, value]
        (band,) = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_label() == "error"]
        assert [band.get_y(), band.get_y() + band.get_height()] == pytest.approx([value - error, value + error])
        low, high = ax.get_ylim()
        assert low < value - error < value + error < high
        assert ax.get_xlim()[1] > 1437
        assert "1437" in [t.get_text() for t in ax.get_xticklabels()]
    text = caption_of(figure)
    one = [e[0] / 8 for e in curve()[0].eigenvalues]
    assert (
        f"On 1 sample, λ₁ is {np.median(one):.2g} times its value on all samples ({min(one):.2g} to {max(one):.2g} in 5"
        in text
    )
    for part in (
        "ckpt.pt (sha256 01234567)",
        "digits, train, 1437 samples",
        "P = 500",
        "Grey band: one standard error",
    ):
        assert part in text


def test_negative_values_of_few_samples_are_drawn() -> None:
    points = (
        SamplePoint(1, True, ((-0.5, -1.0), (20.0, 3.0)), (-5.0, 40.0)),
        SamplePoint(64, True, ((8.0, 0.0),), (-0.1,)),
    )
    figure = samples_figure(sampled(points))
    a, b = figure.axes
    assert (a.get_yscale(), b.get_yscale()) == ("symlog", "symlog")
    assert "The vertical axis is linear within ±0.5 in (a) and ±0.1 in (b)" in caption_of(figure)
    for ax, lowest in ((a, -1.0), (b, -5.0)):
        assert ax.get_ylim()[0] < lowest
        assert any(t.get_text().startswith(("−", "$-")) for t in ax.get_yticklabels())
    assert collisions(figure) == []


def ragged() -> SpectrumResult:
    """Resamples with fewer eigenvalues than others, and numbers that are not finite."""
    points = (
        SamplePoint(1, True, ((3.0,), (math.nan, 1.0), ()), (math.inf, math.nan)),
        SamplePoint(9, False, ((4.0, 2.0, 1.0),), (5.0,)),
    )
    return sampled(points, data={"name": "digits", "samples": 10})


def without_errors() -> SpectrumResult:
    spectrum = dataclasses.replace(ends([8.0], [], None, data_stderr=math.nan), smallest_eigenvalues=())
    return result({"ggn": spectrum}, samples_curve=curve(), data={})


SAMPLED: dict[str, tuple[Callable[[], SpectrumResult], str]] = {
    "one point": (lambda: sampled(curve((16,))), "On 16 samples, λ₁ is"),
    "one resample": (lambda: sampled(curve((1, 8, 64), resamples=1)), "times its value on all samples. Checkpoint"),
    "one number": (lambda: sampled((SamplePoint(1, True, ((5.0,),), (2.0,)),)), "λ₁ is 0.62 times its value on all"),
    "many points": (lambda: sampled(curve(tuple(range(1, 1400, 50)))), "1437"),
    "ragged": (ragged, "λ₂ to λ₃"),
    "nothing finite": (lambda: sampled((SamplePoint(1, True, ((),), (math.nan,)),)), "no finite value"),
    "no errors": (without_errors, "largest eigenvalues of the GGN"),
    "all zero": (lambda: sampled((SamplePoint(1, True, ((0.0,),), (0.0,)),)), "On 1 sample, λ₁ is 0 times"),
    "many samples": (lambda: sampled(curve((1, 1000, 1000000)), data={"samples": 1281167}), "all 1281167 samples"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLED)
def test_every_curve_over_samples_can_be_read(case: str) -> None:
    make, message = SAMPLED[case]
    figure = samples_figure(make())
    assert message in caption_of(figure)
    assert collisions(figure) == []
    assert min(float(t.get_fontsize()) for t in words(figure)) >= 7
    assert ("standard error" in caption_of(figure)) == (case != "no errors")


def test_result_without_a_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="no curve over the number of samples"):
        samples_figure(result())
