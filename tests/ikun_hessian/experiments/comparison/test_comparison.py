"""Tests of the comparison of runs, against numbers computed by hand and by SciPy."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from run_tools import make_run, make_study
from scipy import stats
from study_tools import changed, row, text

from hessian_tools.io.json import ResultError
from ikun_hessian.experiments.comparison.comparison import _differences, compare_runs, compare_settings
from ikun_hessian.experiments.comparison.measures import GAP
from ikun_hessian.experiments.comparison.pairing import chosen_runs
from ikun_hessian.experiments.comparison.result import Comparison
from ikun_hessian.experiments.runs import TrainingRun
from ikun_hessian.reports.comparison import comparison_lines, settings_lines
from ikun_hessian.reports.comparison_files import settings_json, settings_markdown, settings_rows
from ikun_hessian.reports.comparison_text import remarks

EPOCHS = "epochs to 90% test accuracy"


def tops(runs: list[TrainingRun], init: str, moment: str = "") -> dict[int, float]:
    return {
        run.value("seed"): run.spectra[moment].spectra["ggn"].eigenvalues[0].value
        for run in runs
        if run.value("init") == init and moment in run.spectra
    }


# --- numbers


@pytest.mark.parametrize("moment", ["", "loss0.02"])
def test_a_ratio_is_that_computed_by_hand(runs: list[TrainingRun], found: Comparison, moment: str) -> None:
    """Hodges and Lehmann's estimate and the exact test on logarithms of seed-by-seed ratios, by NumPy and SciPy."""
    one = row(found, "ggn lambda_max", "ikun", moment)
    own, base = tops(runs, "ikun", moment), tops(runs, "kaiming", moment)
    d = np.log([own[seed] / base[seed] for seed in range(6)])
    walsh = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(d, 2))
    assert one.ratio
    assert one.pairs == 6
    assert one.shift.value == pytest.approx(math.exp(np.median(walsh)))
    assert (one.shift.low, one.shift.high) == pytest.approx((math.exp(walsh[0]), math.exp(walsh[-1])))
    assert one.p == pytest.approx(stats.wilcoxon(d, method="exact").pvalue)
    assert one.median.value == pytest.approx(np.median(list(own.values())))
    assert one.values == {f"ikun-adam-s{seed}": value for seed, value in own.items()}
    assert one.effect.value == pytest.approx(
        d.mean() / d.std(ddof=1) * math.gamma(2.5) / math.gamma(2) / math.sqrt(2.5)
    )
    assert one.superiority.value == 1
    assert row(found, "ggn lambda_max", "xavier", moment).pairs == 5  # one diverged
    base_row = row(found, "ggn lambda_max", "kaiming", moment)
    assert (base_row.pairs, math.isnan(base_row.p), base_row.lost) == (0, True, 0)


def test_a_difference_is_that_computed_by_hand(runs: list[TrainingRun], found: Comparison) -> None:
    """lambda_min is negative: differences, without a margin. Accuracies are differences too."""
    one = row(found, "hessian lambda_min", "ikun")
    lows = {
        init: [
            run.spectra[""].spectra["hessian"].smallest_eigenvalues[0].value
            for run in runs
            if run.value("init") == init
        ]
        for init in ("ikun", "kaiming")
    }
    d = np.subtract(lows["ikun"], lows["kaiming"])
    walsh = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(d, 2)]
    assert not one.ratio
    assert one.shift.value == pytest.approx(np.median(walsh))
    assert one.shift.value < 0
    assert math.isnan(one.equivalence)
    gap = row(found, GAP, "ikun")
    lines = {run.name: run.log[-1] for run in runs}
    assert gap.values == {
        name: pytest.approx(lines[name]["accuracy"] - lines[name]["test_accuracy"]) for name in gap.values
    }
    assert not row(found, "test accuracy", "ikun").ratio
    assert row(found, "train loss", "ikun").ratio


def test_holm_adjusts_within_the_family(found: Comparison) -> None:
    """All comparisons of one family at one moment: two operators, raw and scaled, two levels."""
    some = [r for r in found.rows if (r.family, r.moment) == ("lambda_max", "") and r.pairs]
    assert len(some) == 8
    ordered = sorted(some, key=lambda r: r.p)
    assert [r.holm for r in ordered] == sorted(r.holm for r in some)
    assert ordered[0].holm == pytest.approx(8 * ordered[0].p)
    assert min(r.needed.effect for r in some) == 9  # 2 / 2^9 is the first below 0.05 / 8
    assert {r.family for r in found.rows} == {
        "outcome", "speed", "lambda_max", "lambda_min", "trace", "loss under noise"
    }  # fmt: skip
    assert not [r for r in found.rows if r.moment and r.measure in ("train loss", EPOCHS)]


def test_matched_loss_is_the_log_line_of_it(runs: list[TrainingRun], found: Comparison) -> None:
    at = row(found, "test accuracy", "ikun", "loss0.02")
    for run in runs[:6]:
        line = next(line for line in run.log if line["loss"] <= 0.02)
        assert at.values[run.name] == line["test_accuracy"]


def test_alike_is_said_with_an_interval_never_as_no_difference() -> None:
    """Copies with little noise: equivalent within the margin, and the interval lies there."""
    made = []
    for seed in range(8):
        base = make_run("kaiming", seed)
        made += [base, dataclasses.replace(make_run("twin", seed, curvature=1.0), spectra=base.spectra)]
    c = compare_runs(made, moments=["end"])
    one = row(c, "ggn lambda_max", "twin")
    assert one.shift.low == one.shift.high == 1
    assert one.p == 1
    assert one.equivalence <= 8 * 2 / 2**8
    assert "~ [1, 1]" in text(c)
    assert "no difference" not in text(c).lower()
    far = compare_runs(made, moments=["end"], margin=1.001)
    assert row(far, "adaptive average sharpness", "twin").equivalence > 0.05


def test_correlation_with_the_gap_is_kendalls(runs: list[TrainingRun], found: Comparison) -> None:
    (one,) = [c for c in found.correlations if (c.measure, c.moment) == ("ggn lambda_max", "")]
    kept = [run for run in runs if not run.diverged]
    x = [run.spectra[""].spectra["ggn"].eigenvalues[0].value for run in kept]
    y = [run.log[-1]["accuracy"] - run.log[-1]["test_accuracy"] for run in kept]
    assert one.overall.value == pytest.approx(stats.kendalltau(x, y).statistic)
    assert one.overall.n == 17
    assert one.within.value != one.overall.value


# --- runs that went wrong


def test_diverged_runs_stay_and_count_as_worst(found: Comparison) -> None:
    loss, speed, top = (row(found, name, "xavier") for name in ("train loss", EPOCHS, "ggn lambda_max"))
    assert loss.values["xavier-adam-s3"] == speed.values["xavier-adam-s3"] == math.inf
    assert row(found, "test accuracy", "xavier").values["xavier-adam-s3"] == -math.inf
    assert math.isnan(top.values["xavier-adam-s3"])
    assert (loss.lost, speed.lost, top.lost) == (1, 1, 1)
    assert (loss.pairs, speed.pairs, top.pairs) == (6, 6, 5)
    assert loss.shift.high == math.inf
    assert found.lost == {"xavier-adam-s3": "NaN: the loss is not finite"}
    assert "! xavier-adam-s3: NaN: the loss is not finite" in comparison_lines(found)
    assert "5+1" in text(found)
    assert "never]" in text(found)


def test_a_pair_in_which_both_diverged_is_ignored() -> None:
    c = compare_runs(make_study(("ikun", "kaiming"), range(6), (("ikun", 2), ("kaiming", 2))))
    for measure in ("train loss", "test accuracy"):
        one = row(c, measure, "ikun")
        assert (one.pairs, one.lost) == (5, 1)
        assert math.isfinite(one.shift.high)


def test_epochs_are_survival_times(runs: list[TrainingRun], found: Comparison) -> None:
    """p from who got there first in each pair; an unfinished run is censored where it stopped, not as never."""
    one = row(found, EPOCHS, "ikun")
    first = {run.name: next(x["epoch"] for x in run.log if x["test_accuracy"] >= 0.9) for run in runs[:12]}
    assert one.values == {name: epoch for name, epoch in first.items() if name.startswith("ikun")}
    assert one.p == stats.binomtest(6, 6).pvalue
    high = compare_runs(runs, accuracy=0.999)
    assert not [r for r in high.rows if r.family == "speed"]  # nothing to compare
    assert "No run reached 99.9% test accuracy" in text(high)
    stopped = [
        dataclasses.replace(run, log=run.log[:2], finished=False, best_epoch=None, spectra={}, flatness={})
        if i == 0
        else run
        for i, run in enumerate(runs)
    ]
    c = compare_runs(stopped)
    one = row(c, EPOCHS, "ikun")
    assert math.isnan(one.values["ikun-adam-s0"])
    assert math.isnan(row(c, "train loss", "ikun").values["ikun-adam-s0"])
    assert (one.pairs, one.p) == (5, stats.binomtest(5, 5).pvalue)
    assert c.lost["ikun-adam-s0"] == "not finished"


def test_weights_kept_by_early_stopping_are_of_their_epoch(runs: list[TrainingRun]) -> None:
    kept = [dataclasses.replace(run, best_epoch=7) if not run.diverged else run for run in runs]
    one = row(compare_runs(kept), "train loss", "ikun")
    assert one.values["ikun-adam-s0"] == runs[0].log[6]["loss"]


def test_results_without_logs_are_compared(runs: list[TrainingRun]) -> None:
    bare = [dataclasses.replace(run, log=(), start=None) for run in runs if not run.diverged]
    c = compare_runs(bare)
    assert row(c, "train loss, the samples analysed", "ikun").values["ikun-adam-s0"] == runs[0].spectra[""].loss
    assert "No run has a log (NAME.train.jsonl): train loss and accuracy are from the samples analysed" in text(c)
    assert "No run reached" not in text(c)
    assert not [r for r in c.rows if r.measure in ("test accuracy", GAP, EPOCHS)]
    assert not c.correlations


# --- pairs


def crossed(seeds: range = range(6)) -> list[TrainingRun]:
    return [
        make_run(init, seed, training={"optimizer": optimizer, "lr": lr}, curvature=curvature)
        for optimizer, lr, curvature in (("adam", 0.01, None), ("sgd", 0.1, 1.0))
        for init in ("ikun", "kaiming")
        for seed in seeds
    ]


def test_settings_are_compared_apart() -> None:
    """An initializer that matters under only one optimizer; each optimizer is compared on its own."""
    made = crossed()
    with pytest.raises(ResultError, match=r"the runs have several settings \(adam; sgd\)"):
        compare_runs(made)
    found = compare_settings(made, accuracy=0.8, margin=2.0, moments=["end"])
    assert list(found) == ["adam", "sgd"]
    for name, c in found.items():
        some = [run for run in made if run.value("optimizer") == name]
        assert isinstance(c, Comparison)
        assert c == compare_runs(some, accuracy=0.8, margin=2.0, moments=["end"])
        one = row(c, "ggn lambda_max", "ikun")
        d = [math.log(tops(some, "ikun")[seed] / tops(some, "kaiming")[seed]) for seed in range(6)]
        assert (one.pairs, one.p) == (6, pytest.approx(stats.wilcoxon(d, method="exact").pvalue))
        assert one.shift.value == pytest.approx(2.5 if name == "adam" else 1.0, rel=0.3)
        assert all(tau.within.n <= 12 for tau in c.correlations)
    by_optimizer = compare_settings(made, by="optimizer", reference="adam")
    assert list(by_optimizer) == ["ikun", "kaiming"]
    c = by_optimizer["ikun"]
    assert isinstance(c, Comparison)
    assert c.follows == {"lr": {"adam": "0.01", "sgd": "0.1"}}
    assert "lr depends on optimizer (adam 0.01, sgd 0.1)" in text(c)
    screen = settings_lines(found)
    assert [line for line in screen if line.startswith("setting")] == ["setting     adam", "setting     sgd"]
    assert " ".join(screen).count("two one-sided tests") == 1
    assert {r["setting"] for r in settings_rows(found)} == {"adam", "sgd"}
    assert len(settings_rows(found)) == sum(len(c.rows) for c in found.values() if isinstance(c, Comparison))


def test_one_setting_has_no_name(runs: list[TrainingRun], found: Comparison) -> None:
    alone = compare_settings(runs)
    assert alone == {"": found}
    assert settings_lines(alone)[: len(comparison_lines(found))] == comparison_lines(found)


def test_a_setting_that_cannot_be_compared_is_named() -> None:
    made = [run for run in crossed(range(2)) if run.name not in ("kaiming-sgd-s0", "kaiming-sgd-s1")]
    found = compare_settings(made)
    why = "a comparison needs at least two levels of init: all runs have init ikun"
    assert found["sgd"] == why
    assert f"! Not compared: sgd: {why}" in " ".join(" ".join(settings_lines(found)).split())
    parts = settings_json(found)["settings"]
    assert [part["setting"] for part in parts] == ["adam", "sgd"]
    assert parts[1] == {"setting": "sgd", "refused": why}


def test_seeds_are_no_levels(runs: list[TrainingRun]) -> None:
    why = "--by seed: runs are paired by their seed: choose another condition"
    assert compare_settings(runs, by="seed") == {"": why}


def test_what_varies_is_named_where_the_levels_do_not(runs: list[TrainingRun]) -> None:
    made = [
        make_run("ikun", seed, training={"alpha": alpha}, network={"norm": norm})
        for seed in range(2)
        for alpha, norm in ((0.5, "bn"), (1.0, "none"))
    ]
    why = "a comparison needs at least two levels of init: all runs have init ikun: choose --by alpha or norm"
    assert compare_settings(made) == {"": why}


def test_samples_that_go_with_the_level_are_left_out() -> None:
    """Early stopping holds samples out, so that no pair can be measured on the same ones."""
    made = []
    for seed in range(2):
        for patience, held_out in ((0, 0), (4, 143)):
            run = make_run("ikun", seed, training={"patience": patience}, data={"held_out": held_out})
            made.append(dataclasses.replace(changed(run, data={"sha256": f"{held_out}"}), name=f"{patience}-{seed}"))
    c = compare_runs(made, by="patience")
    assert {r.family for r in c.rows} >= {"outcome", "speed"}
    assert not {"lambda_max", "trace"} & {r.family for r in c.rows}
    assert "all results from the spectrum, because of different samples (143, 0)" in text(c)
    assert "held_out depends on patience (0 0, 4 143)" in text(c)


def test_a_log_that_was_cut_is_not_known_to_never(runs: list[TrainingRun], found: Comparison) -> None:
    """Three lines of twelve: no epochs, no loss at the end; the survival median has it censored at the third."""
    short = dataclasses.replace(runs[0], log=runs[0].log[:3], epochs_run=12, best_epoch=None)
    c = compare_runs([short, *runs[1:]], accuracy=0.9)
    assert math.isnan(row(c, EPOCHS, "ikun").values["ikun-adam-s0"])
    assert math.isnan(row(c, "train loss", "ikun").values["ikun-adam-s0"])
    assert row(c, EPOCHS, "ikun").pairs == row(found, EPOCHS, "ikun").pairs - 1
    assert c.lost["ikun-adam-s0"] == "the log ends at epoch 3 of 12: later epochs are unknown"
    times = [value for name, value in row(found, EPOCHS, "ikun").values.items() if name != "ikun-adam-s0"]
    left = stats.ecdf(stats.CensoredData(uncensored=times, right=[3])).sf
    expected = next(t for t, share in zip(left.quantiles, left.probabilities, strict=True) if share <= 0.5)
    assert row(c, EPOCHS, "ikun").median.value == expected


def test_the_reference_can_be_chosen() -> None:
    made = make_study(("xavier", "lecun"), (0, 1), ())
    assert compare_runs(made).reference == "lecun"
    assert compare_runs(made, reference="xavier").reference == "xavier"
    ratio, back = (
        row(compare_runs(made, reference=r), "ggn lambda_max", o) for r, o in (("lecun", "xavier"), ("xavier", "lecun"))
    )
    assert ratio.shift.value == pytest.approx(1 / back.shift.value)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"by": "opimizer"}, "no run has a condition 'opimizer': did you mean optimizer"),
        ({"by": "optimizer"}, "at least two levels of optimizer: all runs have optimizer adam"),
        ({"reference": "lecun"}, "--reference lecun: no run has this init: choose one of ikun, kaiming, xavier"),
        ({"accuracy": 90}, "--accuracy 90: give a share"),
        ({"accuracy": 0.0}, "--accuracy 0: give a share"),
        ({"margin": 0.8}, "--margin 0.8: give a ratio above 1"),
        ({"margin": math.nan}, "--margin nan"),
        ({"margin": 1e308}, "--margin 1e+308: give a ratio above 1 and at most 100"),
        ({"by": ""}, "no run has a condition ''"),
        ({"moments": ["loss0.5"]}, "--moment loss0.5: no results at it: choose one of end, loss0.02"),
    ],
)
def test_mistakes_are_refused(runs: list[TrainingRun], options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        compare_runs(runs, **options)


# --- what is not comparable

Change = Callable[[TrainingRun], TrainingRun]
UNLIKE: dict[str, tuple[Change, str]] = {
    "split": (lambda r: changed(r, data={"split": "test"}), "split differs"),
    "samples": (lambda r: changed(r, data={"samples": 5}), "number of samples differs, 1437 for"),
    "loss": (lambda r: changed(r, data={"loss": "ce"}), "loss differs"),
    "timesteps": (lambda r: changed(r, network={"timesteps": 8}), "timesteps T differs"),
    "reset": (lambda r: changed(r, network={"reset": "soft"}), "reset differs"),
    "surrogate": (lambda r: changed(r, network={"surrogate": "atan:5"}), "surrogate of the analysis differs"),
    "norm": (lambda r: changed(r, network={"norm": "none"}), "normalization differs"),
    "ties": (lambda r: changed(r, network={"ties": "last"}), "pooling tie rule differs"),
    "other samples": (lambda r: changed(r, data={"sha256": "other"}), "measure both runs of a pair on"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_was_not_measured_alike_is_refused(runs: list[TrainingRun], name: str) -> None:
    """One run of a level that differs: the condition is named with both runs."""
    change, why = UNLIKE[name]
    with pytest.raises(ResultError, match=f"^not comparable: .*{why}|{why}") as error:
        compare_runs([*runs[:3], change(runs[3]), *runs[4:]])
    assert "ikun-adam-s3" in str(error.value)


def test_other_flatness_settings_and_sizes_are_refused(runs: list[TrainingRun]) -> None:
    r = runs[3]
    flat = {k: dataclasses.replace(f, settings={**f.settings, "draws": 64}) for k, f in r.flatness.items()}
    with pytest.raises(ResultError, match="setting draws differs, 32 for kaiming-adam-s0 but 64 for ikun-adam-s3"):
        compare_runs([*runs[:3], dataclasses.replace(r, flatness=flat), *runs[4:]])
    why = r"set of parameters differs, [\d,]+ weights for .* but [\d,]+ weights for ikun-adam-s3: measure all runs"
    with pytest.raises(ResultError, match=why):
        compare_runs([*runs[:3], changed(r, parameters={"more": 1}), *runs[4:]])


def test_mixed_networks_are_compared_apart() -> None:
    made = [make_run(i, s, network={"norm": n}) for i in ("ikun", "kaiming") for s in (0, 1) for n in ("bn", "none")]
    assert compare_runs(chosen_runs(made, ["norm=none"])).levels == {"kaiming": 2, "ikun": 2}
    tables = settings_markdown(compare_settings(made))
    assert "## bn" in tables
    assert "## norm none" in tables
    assert tables.count("### lambda_max, at the end of training") == 2


def test_the_compared_condition_itself_leaves_curvatures_out() -> None:
    """By surrogate: losses and what noise does to the spiking loss stay; curvatures only under one common surrogate."""
    made = [
        dataclasses.replace(run, name=f"{surrogate[0]}{seed}")
        for surrogate in ("atan:2", "sigmoid:4")
        for seed in range(2)
        for run in [make_run("ikun", seed, network={"surrogate": surrogate})]
    ]
    c = compare_runs(made, by="surrogate")
    assert {r.family for r in c.rows} == {"outcome", "speed", "loss under noise"}
    assert c.reference == "atan:2"
    assert (
        "different surrogate of the analysis (atan:2, sigmoid:4). To compare them, analyse all runs with the same "
        "--surrogate" in text(c)
    )
    common = compare_runs([changed(run, network={"surrogate": "atan:2"}) for run in made], by="surrogate")
    assert {"lambda_max", "lambda_min", "trace"} <= {r.family for r in common.rows}
    by_timesteps = [
        dataclasses.replace(make_run("ikun", seed, network={"timesteps": t}), name=f"{t}-{seed}")
        for t in (2, 4)
        for seed in range(2)
    ]
    c = compare_runs(by_timesteps, by="timesteps")
    assert {r.family for r in c.rows} == {"outcome", "speed"}  # the loss itself depends on T
    assert c.reference == "2"


# --- few seeds


def test_few_seeds_have_no_p() -> None:
    c = compare_runs(make_study(seeds=range(3), diverged=()))
    assert all(math.isnan(r.p) and math.isnan(r.holm) and math.isnan(r.shift.low) for r in c.rows)
    said = text(c)
    assert "they need at least 5 pairs (here: 3)" in said
    assert "No exact paired test reaches 0.05 with fewer than 6" in said
    assert re.search(r"need \d+ to >?\d+ pairs \(column pairs\)", said)
    assert row(c, "ggn lambda_max", "ikun").needed.effect >= 6
    alone = compare_runs([make_run("ikun", 0), make_run("kaiming", 1)])
    assert "they need at least 5 pairs (here: 0)" in text(alone)
    assert "Not paired: 1 of 1 runs of ikun" in text(alone)


def test_no_finite_difference_is_no_small_one() -> None:
    """Every run of the reference diverged, or all but one: infinite differences say nothing of how many pairs it
    takes."""
    for diverged in (3, 2):
        made = make_study(("ikun", "kaiming"), range(3), [("kaiming", seed) for seed in range(diverged)])
        said = text(compare_runs(made, moments=["end"]))
        assert "Fewer than two differences are finite, so the number of pairs needed cannot be estimated." in said
        assert "too small" not in said
    alike = [
        dataclasses.replace(make_run(init, seed, moments=[]), log=make_run("kaiming", seed).log)
        for init in ("kaiming", "twin")
        for seed in range(3)
    ]
    assert "The observed effects are too small to estimate the number of pairs needed." in text(compare_runs(alike))


def test_p_that_holm_can_never_pass_is_said(found: Comparison) -> None:
    said = text(found)
    assert "With so few pairs, no p-value can be significant after Holm's correction" in said
    assert "9 for outcome (8 comparisons), 7 for speed (2 comparisons)" in said
    many = compare_runs(make_study(("ikun", "kaiming"), range(9), ()), moments=["end"])
    assert not [text for text in remarks(many) if "Holm" in text]
    assert row(many, "ggn lambda_max", "ikun").holm <= 0.05
    assert "*" in text(many).split("lambda_max:")[1]


# --- the screen and the files


def test_a_tagged_analysis_can_be_compared() -> None:
    """With --moment one-image only the spectra of that tag are compared, without the outcomes of training."""
    c = compare_runs(make_study(seeds=range(2), diverged=(), tags=("one-image",)), moments=["one-image"])
    assert {r.family for r in c.rows} == {"lambda_max", "lambda_min", "trace"}
    assert c.correlations
    assert "one-image" not in compare_runs(make_study(seeds=range(2), tags=("one-image",))).moments


def test_rounding_breaks_no_ties() -> None:
    tests = [(0.9333333333333333, 0.9305555555555556), (0.9361111111111111, 0.9388888888888889), (0.95, 0.95)]
    d = _differences(tests, ratio=False)  # of 360 samples: one more, one fewer, as many
    assert d[0] == -d[1] == pytest.approx(1 / 360, rel=1e-9)
    assert d[2] == 0
    assert list(_differences([(math.inf, 3.0), (3.0, math.inf)], ratio=True)) == [math.inf, -math.inf]
    assert list(_differences([(0.0, 0.0)], ratio=False)) == [0.0]
    thirds = _differences([(0.3, 0.1), (3.0, 1.0)], ratio=True)
    assert thirds[0] == thirds[1] == pytest.approx(math.log(3))
