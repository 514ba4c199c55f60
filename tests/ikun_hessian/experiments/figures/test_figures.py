"""Tests of the figures of a study: the marks are those of the table, and every figure is legible."""

from __future__ import annotations

import ast
import csv
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from figure_tools import caption_of, collisions, said
from matplotlib import pyplot
from matplotlib.figure import Figure
from run_tools import make_run, make_study
from scipy import stats
from study_tools import TEN, full_run, full_study, gain_study

from ikun.initializers import catalog as initializers
from ikun_hessian.experiments import grouping
from ikun_hessian.experiments.figures import axes as axes_module
from ikun_hessian.experiments.figures import chart as chart_module
from ikun_hessian.experiments.figures import figures as figures_module
from ikun_hessian.experiments.figures import gap, minima, training
from ikun_hessian.experiments.figures import panels as panels_module
from ikun_hessian.experiments.figures.axes import Range, floors, y_range
from ikun_hessian.experiments.figures.chart import Axis, Chart, Mark, Panel, chart_provenance, table
from ikun_hessian.experiments.figures.figures import COLUMN_WIDTHS, FIGURE_NAMES, chart_figures, charts, draw_all
from ikun_hessian.experiments.figures.panels import KNOWN, MARKERS, level_looks
from ikun_hessian.experiments.runs import TrainingRun

pytestmark = pytest.mark.usefixtures("warnings_are_errors")

DRAWN = FIGURE_NAMES[:-1]


@pytest.fixture(scope="module")
def three() -> list[TrainingRun]:
    return full_study()


@pytest.fixture(scope="module")
def ten() -> list[TrainingRun]:
    return full_study(TEN, 4, moments=("", "loss0.02"))


def chart(*marks: Mark, x: str = "epoch", y: str = "log", **changes: Any) -> Chart:
    runs = tuple(make_run(name) for name in dict.fromkeys(m.level for m in marks) or ["ikun"])
    return Chart((Panel("loss", "", Axis("x", x), Axis("y", y), marks, runs, **changes),), "init", "A caption.", runs)


def points(figure: Figure, label: str, panel: int = 0) -> np.ndarray:
    found = [line.get_xydata() for line in figure.axes[panel].lines if line.get_label() == label]
    return np.concatenate([np.asarray(xy, float) for xy in found])


def deeper(runs: list[TrainingRun]) -> list[TrainingRun]:
    """The same runs; those of seeds 3 and above have twice as many layers."""
    found = []
    for run in runs:
        assert run.start is not None
        layers = run.start["layers"] * (1 + (run.value("seed") >= 3))
        found.append(dataclasses.replace(run, start={**run.start, "layers": layers}))
    return found


@pytest.mark.parametrize(("name", "width"), [*((name, 1) for name in DRAWN), ("start", 2), ("ranks", 2), ("gap", 2)])
def test_every_text_can_be_read(three: list[TrainingRun], name: str, width: int) -> None:
    runs = gain_study() if name == "gain" else deeper(three) if name == "depth" else three
    figures = chart_figures(charts("init", 0.9)[name](runs), width)
    for figure in figures[:2]:
        assert collisions(figure) == []
        assert figure.get_figwidth() == COLUMN_WIDTHS[width]
        assert figure.get_figheight() < 10.5
        assert min(t.get_fontsize() for ax in figure.axes for t in ax.get_xticklabels()) >= 7
        count = "18 runs: 3 levels of init, 6 seeds; 1 diverged or failed (xavier-adam-s3)"
        assert (count if name != "gain" else "60 runs: 2 levels of init, 3 seeds.") in caption_of(figure)


@pytest.mark.parametrize(("name", "width"), [("epochs", 1), ("ranks", 2), ("one-image", 2)])
def test_ten_levels_can_be_read_too(ten: list[TrainingRun], name: str, width: int) -> None:
    for figure in chart_figures(charts("init", 0.9)[name](ten), width):
        assert collisions(figure) == []
        shown = [t.get_text() for t in figure.legends[0].get_texts()]
        assert set(TEN) <= set(shown)
        box = figure.legends[0].get_window_extent()
        assert not any(ax.get_window_extent().overlaps(box) for ax in figure.axes)  # the legend covers no data


def test_lines_bands_and_dots_are_those_of_the_table(three: list[TrainingRun]) -> None:
    made = charts("init", 0.9)["start"](three)
    (figure,) = chart_figures(made)
    rows = [r for r in table(made) if (r["panel"], r["init"]) == ("variance of the current", "kaiming")]
    assert points(figure, "kaiming").tolist() == [[r["x"], r["y"]] for r in rows]
    (band,) = [c for c in figure.axes[0].collections if c.get_label() == "band kaiming"]
    outline = {tuple(xy) for xy in band.get_paths()[0].vertices.tolist()}
    assert {(float(r["x"]), r[end]) for r in rows for end in ("low", "high")} <= outline
    made = charts("init", 0.9)["gap"](three)
    first = chart_figures(made)[0]
    rows = [r for r in table(made) if r["page"] == "loss ≤ 0.02" and r["init"] == "ikun"]
    shown = np.concatenate([points(first, "run ikun", i) for i in range(8)])
    assert sorted(map(tuple, shown.tolist())) == sorted((r["x"], r["y"]) for r in rows)


def test_robustness_shows_the_accuracy_lost_by_every_run(three: list[TrainingRun]) -> None:
    made = charts("init", 0.9)["robustness"](three)
    assert list(dict.fromkeys(p.row for p in made.panels)) == ["lost, blur", "lost, weight noise"]
    run = next(r for r in three if r.robustness)
    kept = run.robustness
    assert kept is not None
    blur = [kept.accuracy - a.value for a in kept.disturbed["blur"].values()]
    for panel in made.panels[:4]:
        (mark,) = [m for m in panel.marks if m.run == run.name]
        assert mark.value == pytest.approx(np.mean(blur))
    first = made.panels[0]
    assert (first.column, first.x.label) == ("Hessian λ₁", "Hessian λ₁")
    (mark,) = [m for m in first.marks if m.run == run.name]
    assert mark.x == run.spectra[""].spectra["hessian"].eigenvalues[0].value
    x, y = [m.x for m in first.marks], [m.value for m in first.marks]
    assert f"τ {stats.kendalltau(x, y).statistic:.2f}".replace("-", "−") in first.foot
    assert len(first.marks) == len(three) - 1  # without the run that diverged
    with pytest.raises(chart_module.NotEnoughError, match="a study measures both"):
        charts("init", 0.9)["robustness"]([dataclasses.replace(r, robustness=None) for r in three])


def test_steps_rise_where_the_table_says(three: list[TrainingRun]) -> None:
    made = charts("init", 0.9)["epochs"](three)
    (figure,) = chart_figures(made)
    (steps,) = [line for line in figure.axes[0].lines if line.get_label() == "xavier"]
    assert steps.get_drawstyle() == "steps-post"
    rows = [r for r in table(made) if (r["mark"], r["init"]) == ("steps", "xavier")]
    assert np.asarray(steps.get_xydata()).tolist() == [[r["x"], r["y"]] for r in rows]
    assert len(points(figure, "censored xavier")) == 1
    assert len(points(figure, "diverged xavier", 2)) == 1


def test_runs_that_never_get_there_are_hollow_above_all_others() -> None:
    made = charts("init", 0.9)["gain"](gain_study())
    (figure,) = chart_figures(made)
    ax = figure.axes[0]
    dots = [line for line in ax.lines if line.get_label() == "run ikun"]
    (hollow,) = [line for line in dots if line.get_markerfacecolor() == "white"]
    filled = [y for line in dots if line is not hollow for y in np.asarray(line.get_ydata(), float)]
    never = np.asarray(hollow.get_ydata(), float)
    assert len(never) == sum(m.note == "never" and m.level == "ikun" for m in made.panels[0].marks) > 0
    assert max(filled) < never.min() <= never.max() < ax.get_ylim()[1]
    labels = dict(zip(ax.get_yticks(), [t.get_text() for t in ax.get_yticklabels()], strict=True))
    assert labels[never[0]] == "never"
    assert max(t for t, text in labels.items() if text != "never") < never[0]
    assert {"1/16", "1", "16"} <= {t.get_text() for t in ax.get_xticklabels()}


def test_what_is_zero_or_too_small_lies_on_a_floor_that_the_caption_names() -> None:
    values = (1.0, 1e-3, 1e-20, 0.0)
    made = chart(*(Mark("ikun", "median", i, v) for i, v in enumerate(values)))
    (figure,) = chart_figures(made)
    shown = points(figure, "ikun")[:, 1]
    assert shown[:2] == pytest.approx([1.0, 1e-3])
    assert shown[2:] == pytest.approx([1e-13, 1e-13])
    assert figure.axes[0].get_ylim()[0] < 1e-13
    assert "Smaller values are drawn on the dotted floor: y 1e-13." in said(figure).replace("\n", " ")
    found = y_range("log", [Mark("a", "run", 0, v) for v in (2.0, 3.0)])
    assert found is not None
    assert math.isnan(found.floor)
    assert floors({Axis("y", "log"): found}) == ""


def test_negative_values_of_a_signed_axis_stay_negative() -> None:
    (figure,) = chart_figures(
        chart(*(Mark("ikun", "median", i, v) for i, v in enumerate((5.0, 1e-4, -2.0))), y="signed")
    )
    assert points(figure, "ikun")[:, 1].tolist() == [5.0, 1e-4, -2.0]
    low, high = figure.axes[0].get_ylim()
    assert low < -2 < 5 < high
    assert figure.axes[0].get_yscale() == "symlog"
    assert "Axes that are linear within these bounds and logarithmic outside: y ±0.005." in caption_of(figure)


def test_ranks_from_the_small_end_stand_behind_the_others(three: list[TrainingRun]) -> None:
    (figure,) = chart_figures(charts("init", 0.9)["ranks"](three))
    ax = figure.axes[0]
    lines = [np.asarray(line.get_xdata(), float) for line in ax.lines if line.get_label() == "kaiming"]
    assert [x.tolist() for x in lines] == [[*range(1, 11)], [*range(12, 17)]]  # two lines, ten and five
    labels = {t.get_text(): x for t, x in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True)}
    assert (labels["1"], labels["P"], labels["P−4"]) == (1, 16, 12)
    smallest = [line.get_ydata()[-1] for line in ax.lines if line.get_label() == "kaiming"][1]  # type: ignore[index]
    expected = np.median([r.spectra["loss0.02"].main[1].smallest_eigenvalues[0].value for r in three[6:12]])
    assert smallest == pytest.approx(expected)


def test_panels_of_one_quantity_share_its_range(three: list[TrainingRun]) -> None:
    (figure,) = chart_figures(charts("init", 0.9)["ranks"](three))
    left, right = figure.axes[:2]
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylabel() != ""
    assert right.get_ylabel() == ""


@pytest.mark.parametrize("count", [2, 3, 12, 16])
def test_levels_are_told_apart_by_more_than_colour(count: int) -> None:
    found = list(level_looks([f"name{i}" for i in range(count)]).values())
    for a, b in itertools.combinations(found, 2):
        assert (a.marker, a.colour) != (b.marker, b.colour)
        if count <= 12:
            assert a.colour != b.colour
            assert a.marker != b.marker
    assert len(MARKERS) == 12
    numbers = [look.colour for look in level_looks(["0.5", "1", "2", "4"]).values()]
    assert [sum(c) for c in numbers] == sorted(sum(c) for c in numbers)  # from dark to light


def test_initializers_look_alike_in_all_figures() -> None:
    assert set(KNOWN) == set(initializers.INITIALIZERS)
    whole = level_looks(sorted(KNOWN), "init")
    mixed = level_looks([*sorted(KNOWN), "mine", "yours"], "init")
    for a, b in itertools.combinations(mixed.values(), 2):
        assert (a.marker, a.colour) != (b.marker, b.colour)
    for some in (["ikun", "kaiming"], ["kaiming", "xavier"], ["kaiming", "mine"], sorted(KNOWN)[3:9]):
        found = level_looks(some, "init")
        for name in set(some) & set(KNOWN):
            kept = dataclasses.replace(found[name], place=0)
            assert kept == dataclasses.replace(whole[name], place=0) == dataclasses.replace(mixed[name], place=0)
    ten = level_looks([*TEN, "mine"], "init").values()
    assert len({look.colour for look in ten}) == len({look.marker for look in ten}) == 11
    elsewhere = level_looks(["kaiming", "xavier"], "model").values()
    assert list(elsewhere) == list(level_looks(["a", "b"], "model").values())  # of another condition, by place


def test_many_settings_take_several_pages_and_all_show_the_same_range() -> None:
    runs = [
        dataclasses.replace(run, name=f"{run.name}-{rate}")
        for rate in (0.1, 0.2, 0.3, 0.4, 0.5)
        for run in make_study(seeds=(0, 1), training={"lr": rate})
    ]
    made = charts("init", 0.9)["epochs"](runs)
    figures = chart_figures(made)
    assert [sum(ax.get_ylabel() == "training loss" for ax in f.axes) for f in figures] == [1, 1]
    assert sum(len(f.axes) for f in figures) == 15
    assert len({f.axes[-1].get_ylim() for f in figures}) == 1
    assert "(2 of 2)" in said(figures[1])


def test_draw_all_writes_three_files_a_figure_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    runs = make_study(seeds=(0, 1, 2), moments=("",))
    drawn = draw_all(runs, tmp_path / "new", ("epochs", "one-image", "layers"))
    assert [p.name for p in drawn.written] == ["epochs.png", "epochs.pdf", "epochs.csv"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in drawn.written)
    assert "--per-layer" in drawn.skipped["layers"]
    assert set(drawn.skipped) == {"one-image", "layers"}
    with (tmp_path / "new" / "epochs.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    expected = table(charts("init", 0.9)["epochs"](runs))
    assert [{k: str(v) for k, v in row.items()} for row in expected] == written
    assert list(written[0])[:5] == ["page", "panel", "column", "init", "mark"]
    before = [path.read_bytes() for path in drawn.written]
    assert [p.read_bytes() for p in draw_all(runs, tmp_path / "new", ("epochs",)).written] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": ("rank",)}, "unknown figure 'rank': choose from start, gain"),
        ({"width": 3}, "^--width 3: choose 1 or 2 columns$"),
        ({"accuracy": 90.0}, "^--accuracy 90: give a share of the test images, above 0 and at most 1$"),
        ({"accuracy": 0.0}, "--accuracy 0:"),
        ({"accuracy": math.nan}, "--accuracy nan:"),
        ({"by": "colour"}, "no run has this condition"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw_all([make_run()], tmp_path / "new", **arguments)
    with pytest.raises(ValueError, match="there are no runs to draw"):
        draw_all([], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_names_from_files_are_printed_as_they_stand() -> None:
    runs = [make_run(name, seed) for name in ("$a_b$", "_x", "w" * 50, "a\nb") for seed in (0, 1)]
    lost = dataclasses.replace(runs[0], failures=("NaN: x",), name="$c^2$")
    made = charts("init", 0.9)["ranks"]([lost, *runs[1:]])
    (figure,) = chart_figures(made)
    assert collisions(figure) == []
    assert chart_provenance([lost, *runs[1:]], "init").endswith(
        r"8 runs: 4 levels of init, 2 seeds; 1 diverged or failed (\$c^2\$)."
    )


@pytest.mark.parametrize("values", [(), (math.nan,), (math.inf, math.nan)])
def test_a_panel_without_a_finite_value_says_so(values: tuple[float, ...]) -> None:
    made = chart(*(Mark("ikun", "median", i, v) for i, v in enumerate(values)))
    (figure,) = chart_figures(made)
    assert "nothing measured" in said(figure)


def test_all_runs_that_never_get_there_still_have_an_axis() -> None:
    found = y_range("epochs", [Mark("a", "run", 1, math.inf)])
    assert found == Range(found.axis, beyond=True) if found else False
    (figure,) = chart_figures(
        chart(Mark("ikun", "run", 1, math.inf), Mark("ikun", "run", 2, math.inf), x="gain", y="epochs")
    )
    assert "never" in said(figure)


def test_figures_need_no_model_and_no_global_state(three: list[TrainingRun]) -> None:
    modules = (
        axes_module,
        chart_module,
        figures_module,
        gap,
        grouping,
        minima,
        panels_module,
        training,
    )
    for module in modules:
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name.split(".")[0] in ("torch", "ikun") or "pyplot" in name}
    before, shown = dict(matplotlib.rcParams), pyplot.get_fignums()
    chart_figures(charts("init", 0.9)["samples"](three))
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == shown


@pytest.mark.parametrize(
    ("gains", "labels"),
    [
        ([4.0**k for k in range(-4, 3)], ["1/256", "1/64", "1/16", "1/4", "1", "4", "16"]),
        ([10.0**k for k in range(-4, 1)], ["1/10000", "1/1000", "1/100", "1/10", "1"]),
        ([0.5, 1.0, 2.0], ["1/2", "1", "2"]),
        ([1.0, 4.0], ["1", "4"]),
        ([0.3, 1.0, 2.5], ["0.3", "1", "2.5"]),
        ([1e-6, 1e-3, 1.0], ["$10^{-6}$", "$10^{-3}$", "$10^{0}$"]),
    ],
)
@pytest.mark.parametrize("width", [1, 2])
def test_the_ticks_of_gains_are_the_gains_all_written_alike(gains: list[float], labels: list[str], width: int) -> None:
    marks = [Mark("ikun", "run", gain, 5.0, run=f"r{gain}") for gain in gains]
    (figure,) = chart_figures(chart(*marks, x="gain", y="epochs"), width)
    ax = figure.axes[0]
    assert sorted(ax.get_xticks()) == gains
    assert [t.get_text() for _, t in sorted(zip(ax.get_xticks(), ax.get_xticklabels(), strict=True))] == labels
    many = [Mark("ikun", "run", 2.0**k, 5.0, run=f"{k}") for k in range(-30, 31)]
    (figure,) = chart_figures(chart(*many, x="gain", y="epochs"), width)
    assert collisions(figure) == []
    assert 0.0 in np.log2(figure.axes[0].get_xticks())


def test_the_caption_says_on_what_was_trained_and_on_what_the_curvature_was_measured() -> None:
    def measured(run: TrainingRun, count: int) -> TrainingRun:
        parts = {
            part: {k: dataclasses.replace(r, data={**r.data, "samples": count}) for k, r in getattr(run, part).items()}
            for part in ("spectra", "flatness")
        }
        return dataclasses.replace(run, **parts)

    runs = [measured(run, 256) for run in full_study(("ikun", "kaiming"), 2, moments=("", "epoch0004"), tags=())]
    for name in ("start", "epochs", "ranks", "gap", "robustness", "training", "layers"):
        for figure in chart_figures(charts("init", 0.9)[name](runs)):
            spectral = name not in ("start", "epochs") and " layers. By epoch" not in caption_of(figure)
            assert "digits, 1437 training images, mse;" in caption_of(figure)
            assert ("curvature on 256 samples." in caption_of(figure)) == spectral, name
            assert "all samples" not in caption_of(figure)
    made = charts("init", 0.9)["robustness"]([dataclasses.replace(run, spectra={}) for run in runs])
    assert "curvature on 256 samples" in caption_of(chart_figures(made)[0])  # of flatness
    common = {"surrogate": "atan:2", "trained_surrogate": "superspike:10"}
    under = [
        dataclasses.replace(
            run,
            spectra={k: dataclasses.replace(r, network={**r.network, **common}) for k, r in run.spectra.items()},
        )
        for run in runs
    ]
    (figure, *_) = chart_figures(charts("init", 0.9)["ranks"](under))
    assert "curvature on 256 samples with surrogate atan:2." in caption_of(figure)
    bare = [dataclasses.replace(run, spectra={}, flatness={}) for run in runs]
    assert "curvature on" not in caption_of(chart_figures(charts("init", 0.9)["training"](bare))[0])


def test_provenance_of_spike_trains_of_parts_and_of_what_differs() -> None:
    spikes = [make_run(seed=s, network={"coding": "spikes"}, data={"samples": 1, "subset": 1}) for s in (0, 1)]
    assert "digits, 1 training sample, mse;" in chart_provenance(spikes, "init")
    parts = [make_run(seed=s, data={"subset": 1437, "held_out": 143, "samples": 1294}) for s in (0, 1)]
    assert "1294 training images" in chart_provenance(parts, "init")
    old = [dataclasses.replace(run, data={"name": "digits", "subset": 500}, network={}) for run in parts]
    assert "digits, 500 training samples, mse;" in chart_provenance(old, "init")
    assert "training" not in chart_provenance([parts[0], old[0]], "init")
    assert chart_provenance(parts, "init", [256, 64, 256]).endswith(
        "; curvature on 64 to 256 samples. 2 runs: 1 level of init, 2 seeds."
    )


def test_a_page_is_about_the_runs_that_it_shows() -> None:
    runs = [
        dataclasses.replace(run, name=f"{run.name}-{rate}")
        for optimizer, rate in (("adam", 0.01), ("sgd", 2.0))
        for run in full_study(seeds=2, moments=("",), training={"optimizer": optimizer, "lr": rate})
    ]
    for name, setting in (("gap", "adam, at the end"), ("training", "adam, layers")):
        figures = chart_figures(charts("init", 0.9)[name](runs))
        text, last = caption_of(figures[0]), caption_of(figures[-1])
        assert f"(1 of {len(figures)}) {setting}. " in text
        for shown, optimizer, rate in ((text, "adam", "0.01"), (last, "sgd", "2")):
            assert f"; {optimizer}, lr {rate}, cosine schedule" in shown
            assert ". 6 runs: 3 levels of init, 2 seeds" in shown
    (both,) = chart_figures(charts("init", 0.9)["ranks"](runs))
    assert ". 12 runs: 3 levels of init, 2 seeds." in caption_of(both)
    assert "adam, lr" not in caption_of(both)


def test_titles_above_four_columns_take_one_line() -> None:
    runs = [
        dataclasses.replace(run, name=f"{run.name}-{optimizer}")
        for optimizer in ("adam", "sgd")
        for run in make_study(["ikun"], (0, 1), training={"optimizer": optimizer})
    ]
    pages = chart_figures(charts("init", 0.9)["ranks"](runs))
    assert [len(page.axes) for page in pages] == [12, 12]  # no page has more than twelve panels
    for page in pages:
        titles = [ax.get_title(loc="left") for ax in page.axes[:4]]
        assert "adam, loss\u00a0≤\u00a00.02" in titles[0]
        assert not any("\n" in title for title in titles)
        assert collisions(page) == []


def test_bare_numbers_in_the_legend_have_a_title(three: list[TrainingRun]) -> None:
    runs = [
        dataclasses.replace(make_run("ikun", s, training={"alpha": a, "batch_size": int(64 * a)}), name=f"r{a}-{s}")
        for a in (0.5, 1.0)
        for s in (0, 1)
    ]
    for by, title, width in (("alpha", "alpha", 1), ("batch_size", "batch size", 2)):
        (figure,) = chart_figures(charts(by, 0.9)["epochs"](runs), width)
        assert figure.legends[0].get_title().get_text() == title
        assert collisions(figure) == []
    (figure,) = chart_figures(charts("init", 0.9)["start"](three))
    assert figure.legends[0].get_title().get_text() == ""


def test_a_run_that_diverged_is_marked_as_the_legend_says() -> None:
    runs = full_study(("ikun", "kaiming"), 3, moments=("",))[:-1]
    lost = dataclasses.replace(full_run("kaiming", 5, moments=("",)), failures=("failed: spectrum: x",))
    made = charts("init", 0.9)["ranks"]([*runs, lost])
    (figure,) = chart_figures(made)
    handles = {
        t.get_text(): h for t, h in zip(figure.legends[0].get_texts(), figure.legends[0].legend_handles, strict=True)
    }
    sign = handles["diverged run"]
    drawn = [line for line in figure.axes[0].lines if line.get_label() == "run kaiming"]
    assert {line.get_marker() for line in drawn} == {
        sign.get_marker(),
        level_looks(["ikun", "kaiming"], "init")["kaiming"].marker,
    }
    (cross,) = [line for line in drawn if line.get_marker() == sign.get_marker()]
    marks = [m for m in made.panels[0].marks if m.note == "diverged"]
    assert sorted(np.asarray(cross.get_ydata(), float)) == sorted(m.value for m in marks)
    assert "×: diverged runs, not included in medians" in caption_of(figure)
    assert "hollow" not in caption_of(figure)
