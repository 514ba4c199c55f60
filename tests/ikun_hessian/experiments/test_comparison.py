"""Runs compared: numbers by hand and by SciPy, pairs, what is refused, what went wrong, and the screen."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_tools import make_run, make_study
from scipy import stats

from hessian_tools.io.files import write_table
from hessian_tools.io.json import ResultError
from hessian_tools.results.spectrum import SpectrumResult
from ikun_hessian.experiments.comparison import Comparison, Row, _differences, compare_runs, compare_settings
from ikun_hessian.experiments.measures import GAP
from ikun_hessian.experiments.pairing import chosen_runs, several_seeds
from ikun_hessian.experiments.runs import TrainingRun
from ikun_hessian.reports.comparison import (
    comparison_lines,
    comparison_rows,
    markdown_lines,
    moment_title,
    remarks,
    settings_json,
    settings_lines,
    settings_markdown,
    settings_rows,
)

EPOCHS = "epochs to 90% test accuracy"


@pytest.fixture(scope="module")
def runs() -> list[TrainingRun]:
    return make_study()


@pytest.fixture(scope="module")
def found(runs: list[TrainingRun]) -> Comparison:
    return compare_runs(runs)


def row(c: Comparison, measure: str, level: str, moment: str = "") -> Row:
    (one,) = [r for r in c.rows if (r.measure, r.level, r.moment) == (measure, level, moment)]
    return one


def tops(runs: list[TrainingRun], init: str, moment: str = "") -> dict[int, float]:
    return {
        run.value("seed"): run.spectra[moment].spectra["ggn"].eigenvalues[0].value
        for run in runs
        if run.value("init") == init and moment in run.spectra
    }


def changed(run: TrainingRun, **parts: dict[str, Any]) -> TrainingRun:
    """The run with parts of all of its spectra changed."""
    spectra: dict[str, SpectrumResult] = {}
    for key, r in run.spectra.items():
        spectra[key] = dataclasses.replace(r, **{name: {**getattr(r, name), **new} for name, new in parts.items()})
    return dataclasses.replace(run, spectra=spectra)


def text(c: Comparison) -> str:
    return " ".join(" ".join(settings_lines({"": c})).split())


# --- numbers


@pytest.mark.parametrize("moment", ["", "loss0.02"])
def test_a_ratio_by_hand(runs: list[TrainingRun], found: Comparison, moment: str) -> None:
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


def test_a_difference_by_hand(runs: list[TrainingRun], found: Comparison) -> None:
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


def test_holm_over_the_family(found: Comparison) -> None:
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


def test_two_that_diverged_say_nothing_of_one_another() -> None:
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


def test_weights_kept_by_early_stopping(runs: list[TrainingRun]) -> None:
    kept = [dataclasses.replace(run, best_epoch=7) if not run.diverged else run for run in runs]
    one = row(compare_runs(kept), "train loss", "ikun")
    assert one.values["ikun-adam-s0"] == runs[0].log[6]["loss"]


def test_results_without_logs(runs: list[TrainingRun]) -> None:
    bare = [dataclasses.replace(run, log=(), start=None) for run in runs if not run.diverged]
    c = compare_runs(bare)
    assert row(c, "train loss, the samples analysed", "ikun").values["ikun-adam-s0"] == runs[0].spectra[""].loss
    assert "No log (NAME.train.jsonl): train loss and accuracy are those of the samples analysed" in text(c)
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
    """An initializer that matters under one optimizer alone: pairs are a setting's seeds, each has its own ratio."""
    made = crossed()
    with pytest.raises(ResultError, match=r"runs of several settings \(adam; sgd\)"):
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
    assert "lr goes with optimizer (adam 0.01, sgd 0.1)" in text(c)
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


def test_a_run_without_a_partner() -> None:
    made = [*make_study(("ikun", "kaiming"), range(3), ()), make_run("ikun", 7)]
    c = compare_runs(made)
    assert (c.seeds, c.levels) == (("0", "1", "2", "7"), {"kaiming": 3, "ikun": 4})
    assert row(c, "ggn lambda_max", "ikun").pairs == 3
    assert c.unpaired == {"ikun": ("ikun-adam-s7",)}
    assert "Without a partner: 1 of 4 runs of ikun (ikun-adam-s7)." in text(c)
    with pytest.raises(ResultError, match=r"ikun-adam-s0 and ikun-adam-s0 differ in nothing"):
        compare_runs([*made, made[0]])


def test_a_condition_that_some_runs_do_not_have_hinders_no_pair(runs: list[TrainingRun], found: Comparison) -> None:
    """NAME.train.json lost, and a study that was begun before there was an option."""
    lost = dataclasses.replace(runs[0], data={"name": "digits"})
    later = [dataclasses.replace(run, training={**run.training, "gain": 1.0}) for run in runs[1:]]
    (c,) = compare_settings([lost, *later]).values()
    assert isinstance(c, Comparison)
    assert (c.unpaired, c.follows, c.rows) == ({}, {}, found.rows)
    other = dataclasses.replace(runs[0], name="ikun-gain", training={**runs[0].training, "gain": 2.0})
    why = "ikun-adam-s0 and ikun-gain differ in gain, which is not known of all runs: choose with --where gain=2"
    assert compare_settings([*runs, other]) == {"": why}


def test_seeds_are_no_levels(runs: list[TrainingRun]) -> None:
    assert compare_settings(runs, by="seed") == {"": "--by seed: runs pair by their seed: choose another condition"}


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
    assert "all from the spectrum: samples differs (143, 0)" in text(c)
    assert "held_out goes with patience (0 0, 4 143)" in text(c)


def on_other_data(run: TrainingRun, sha256: str | None, **data: object) -> TrainingRun:
    return dataclasses.replace(run, data={**run.data, "sha256": sha256, **data})


@pytest.mark.parametrize("bare", [True, False], ids=["no spectra", "spectra alike"])
def test_runs_trained_on_other_data_are_refused(runs: list[TrainingRun], bare: bool) -> None:
    """Folders of images under one name: only the hash of the training samples tells them apart."""
    made = [dataclasses.replace(run, spectra={}, flatness={}) if bare else run for run in runs]
    made[3] = on_other_data(made[3], "e" * 64)
    why = (
        "not comparable: training data differs, eeeeeeeeeeee… for ikun-adam-s3 but dddddddddddd… for kaiming-adam-s3: "
        "train a pair on the same data"
    )
    with pytest.raises(ResultError) as error:
        compare_runs(made)
    assert str(error.value) == why
    assert compare_settings(made) == {"": why}


def test_data_may_differ_with_the_seed_or_where_not_known(runs: list[TrainingRun], found: Comparison) -> None:
    """Subsets are drawn by the seed; a result without its NAME.train.json may not know its training data."""
    drawn = [on_other_data(run, str(run.value("seed"))) for run in runs]
    assert compare_runs(drawn).rows == found.rows
    unknown = [on_other_data(run, None) if i == 3 else run for i, run in enumerate(drawn)]
    assert compare_runs(unknown).rows == found.rows
    alone = [*drawn, on_other_data(make_run("ikun", 7), "e" * 64)]  # without a partner
    assert compare_runs(alone).unpaired["ikun"] == ("ikun-adam-s7",)


@pytest.mark.parametrize("key", ["name", "subset", "held_out"])
def test_data_that_are_compared_may_differ(key: str) -> None:
    """By the data themselves, and by what they follow (held-out samples of early stopping). But where two levels have
    the same of it, they must have the same samples."""
    made = []
    for seed in range(2):
        for patience, value in ((0, "a"), (4, "b"), (8, "b")):
            run = make_run("ikun", seed, training={"patience": patience}, data={key: value}, moments=[])
            made.append(dataclasses.replace(on_other_data(run, value), name=f"{patience}-{seed}"))
    assert compare_runs([run for run in made if run.value("patience") < 8], by=key).reference == "a"
    assert compare_runs(made, by="patience").follows == {key: {"0": "a", "4": "b", "8": "b"}}
    assert compare_runs(made, by="patience", reference="4").reference == "4"
    made[2] = on_other_data(made[2], "c")
    with pytest.raises(ResultError, match=r"training data differs, c for 8-0 but b for 4-0: train a pair on the same"):
        compare_runs(made, by="patience", reference="4")


def test_a_log_that_was_cut_is_not_known_to_never(runs: list[TrainingRun], found: Comparison) -> None:
    """Three lines of twelve: no epochs, no loss at the end; the survival median has it censored at the third."""
    short = dataclasses.replace(runs[0], log=runs[0].log[:3], epochs_run=12, best_epoch=None)
    c = compare_runs([short, *runs[1:]], accuracy=0.9)
    assert math.isnan(row(c, EPOCHS, "ikun").values["ikun-adam-s0"])
    assert math.isnan(row(c, "train loss", "ikun").values["ikun-adam-s0"])
    assert row(c, EPOCHS, "ikun").pairs == row(found, EPOCHS, "ikun").pairs - 1
    assert c.lost["ikun-adam-s0"] == "the log ends at epoch 3 of 12: what came later is not known"
    times = [value for name, value in row(found, EPOCHS, "ikun").values.items() if name != "ikun-adam-s0"]
    left = stats.ecdf(stats.CensoredData(uncensored=times, right=[3])).sf
    expected = next(t for t, share in zip(left.quantiles, left.probabilities, strict=True) if share <= 0.5)
    assert row(c, EPOCHS, "ikun").median.value == expected


def test_what_does_not_move_training_does_not_hinder_pairs() -> None:
    made = [make_run("ikun", s, training={"alpha": 0.1, "snapshots": s, "save_at_loss": [s]}) for s in range(2)]
    c = compare_runs([*made, *(make_run("kaiming", s) for s in range(2))], moments=["end"])
    assert row(c, "train loss", "ikun").pairs == 2
    assert c.follows["alpha"] == {"kaiming": "1", "ikun": "0.1"}


def test_reference() -> None:
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
        ({"reference": "lecun"}, "--reference lecun: no run has it: init is ikun, kaiming, xavier"),
        ({"accuracy": 90}, "--accuracy 90: give a share"),
        ({"accuracy": 0.0}, "--accuracy 0: give a share"),
        ({"margin": 0.8}, "--margin 0.8: give a ratio above 1"),
        ({"margin": math.nan}, "--margin nan"),
        ({"margin": 1e308}, "--margin 1e+308: give a ratio above 1 and at most 100"),
        ({"by": ""}, "no run has a condition ''"),
        ({"moments": ["loss0.5"]}, "--moment loss0.5: nothing was measured there: end, loss0.02"),
    ],
)
def test_mistakes(runs: list[TrainingRun], options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        compare_runs(runs, **options)


def test_chosen_runs(runs: list[TrainingRun]) -> None:
    assert {run.value("init") for run in chosen_runs(runs, ["init=ikun", "optimizer=adam"])} == {"ikun"}
    assert chosen_runs(runs, []) == runs
    for condition, why in (
        ("init", "give a condition and its value"),
        ("init=x", "no such run: init is ikun or kaiming or xavier"),
        ("inti=ikun", "did you mean init?"),
    ):
        with pytest.raises(ResultError, match=re.escape(why)):
            chosen_runs(runs, [condition])


def test_several_seeds(runs: list[TrainingRun]) -> None:
    assert several_seeds(runs, "init")
    assert not several_seeds(runs[:6], "init")
    assert not several_seeds([runs[0], runs[6], runs[12]], "init")
    assert not several_seeds([runs[0], dataclasses.replace(runs[0], name="b"), runs[6]], "init")


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
    "other samples": (lambda r: changed(r, data={"sha256": "other"}), "measure a pair on the same samples"),
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
    why = r"set of parameters differs, [\d,]+ weights for .* but [\d,]+ weights for ikun-adam-s3: measure all alike"
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
    assert "surrogate of the analysis differs (atan:2, sigmoid:4); analyse all with one --surrogate" in text(c)
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
    assert "3 pairs at most, and 5 are the least" in said
    assert "No exact paired test reaches 0.05 with fewer than 6" in said
    assert re.search(r"would take \d+ to >?\d+ \(column pairs\)", said)
    assert row(c, "ggn lambda_max", "ikun").needed.effect >= 6
    alone = compare_runs([make_run("ikun", 0), make_run("kaiming", 1)])
    assert "0 pairs at most" in text(alone)
    assert "Without a partner: 1 of 1 runs of ikun" in text(alone)


def test_no_finite_difference_is_no_small_one() -> None:
    """Every run of the reference diverged, or all but one: infinite differences say nothing of how many pairs it
    takes."""
    for diverged in (3, 2):
        made = make_study(("ikun", "kaiming"), range(3), [("kaiming", seed) for seed in range(diverged)])
        said = text(compare_runs(made, moments=["end"]))
        assert "fewer than two differences are finite, which is nothing to plan with." in said
        assert "too small" not in said
    alike = [
        dataclasses.replace(make_run(init, seed, moments=[]), log=make_run("kaiming", seed).log)
        for init in ("kaiming", "twin")
        for seed in range(3)
    ]
    assert "the differences seen are too small to plan for." in text(compare_runs(alike))


def test_p_that_holm_can_never_pass_is_said(found: Comparison) -> None:
    said = text(found)
    assert "No p can pass Holm's correction with so few pairs" in said
    assert "9 for outcome (8 comparisons), 7 for speed (2 comparisons)" in said
    many = compare_runs(make_study(("ikun", "kaiming"), range(9), ()), moments=["end"])
    assert not [text for text in remarks(many) if "Holm" in text]
    assert row(many, "ggn lambda_max", "ikun").holm <= 0.05
    assert "*" in text(many).split("lambda_max:")[1]


# --- the screen and the files


@pytest.mark.parametrize(
    "inits",
    [("ikun", "kaiming", "xavier"), ("delta_orthogonal", "gradient_stable", "kaiming", "fluctuation_driven_long_name")],
)
@pytest.mark.parametrize("seeds", [2, 5, 6])
def test_80_columns(inits: tuple[str, ...], seeds: int) -> None:
    c = compare_runs(make_study(inits, range(seeds), ((inits[-1], 1),)))
    lines = comparison_lines(c)
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert any(line.startswith("  delta_ort") for line in lines) == ("delta_orthogonal" in inits)


def test_what_an_initializer_costs_once(runs: list[TrainingRun]) -> None:
    """Medians of the runs that know it, without tests; of initializers alone."""
    costs = {"ikun": [(0.3, 20), (0.1, 31), (0.2, 30)], "kaiming": [(1e-4, 0)] * 3, "xavier": [(2e-4, 1)] * 3}
    made = []
    for run in make_study(seeds=range(3), diverged=()):
        seconds, passes = costs[run.value("init")][run.value("seed")]
        made.append(dataclasses.replace(run, start={"seconds": seconds, "forward_passes": passes, "layers": []}))
    c = compare_runs(made)
    costs_of = "median seconds and forward passes, once:"
    shown = f"{costs_of} kaiming 0.0001, 0; ikun 0.2, 30; xavier 0.0002, 1"
    assert f"initialized {shown}" in text(c)
    assert "- initialized: median forward passes, once: kaiming 0; ikun 30; xavier 1" in markdown_lines(c)
    assert settings_json({"": c})["settings"][0]["start"]["ikun"] == {"seconds": 0.2, "forward_passes": 30}
    assert not {"seconds", "forward_passes"} & {r.measure for r in c.rows}
    unknown = [dataclasses.replace(run, start=None) if run.value("init") != "ikun" or i else run
               for i, run in enumerate(made)]  # fmt: skip
    assert f"initialized {costs_of} ikun 0.3, 20 !" in text(compare_runs(unknown))
    early = [dataclasses.replace(run, start={"layers": []}) for run in made]  # before costs were kept
    assert "initialized" not in text(compare_runs(early))
    by_norm = [make_run("ikun", 0, network={"norm": norm}, moments=[]) for norm in ("bn", "none")]
    assert "initialized" not in text(compare_runs(by_norm, by="norm"))


def test_the_surrogate_of_the_analysis_is_said() -> None:
    """Where it is not the one that all were trained with; per moment where they were analysed with several."""
    made = [
        dataclasses.replace(make_run("ikun", seed, network={"surrogate": surrogate}), name=f"{surrogate}-{seed}")
        for surrogate in ("atan:2", "sigmoid:4")
        for seed in range(2)
    ]
    common = [changed(run, network={"surrogate": "atan:2"}) for run in made]
    c = compare_runs(common, by="surrogate")
    assert c.surrogates == {"": "atan:2", "loss0.02": "atan:2"}
    assert "trained digits, csnn, bn, timesteps 4; curvature under atan:2 runs" in text(c)  # flatness: left out
    assert "digits, csnn, bn, timesteps 4; curvature under atan:2." in markdown_lines(c)[0]
    flat = [dataclasses.replace(run, flatness={}) for run in common]
    end = [dataclasses.replace(run, spectra={"": run.spectra[""], "loss0.02": old.spectra["loss0.02"]})
           for run, old in zip(flat, made, strict=True)]  # fmt: skip
    said = "curvature under atan:2 at the end of training"
    assert f"{said} runs" in text(compare_runs(end, by="surrogate"))
    several = [dataclasses.replace(run, spectra={**run.spectra, "loss0.02": changed(run, network={
        "surrogate": "atan:5"}).spectra["loss0.02"]}) for run in flat]  # fmt: skip
    both = f"{said}; curvature under atan:5 at the first epoch of training loss <= 0.02 runs"
    assert both in text(compare_runs(several, by="surrogate"))
    apart = [
        run if run.value("surrogate") == "atan:2" else changed(run, network={"surrogate": "atan:5"}) for run in made
    ]
    assert compare_runs(apart, by="surrogate").surrogates == {}  # not one: curvatures are left out
    for own in (made, make_study(seeds=range(2))):
        by = "surrogate" if own is made else "init"
        assert "curvature under" not in text(compare_runs(own, by=by))
    only_flat = [
        dataclasses.replace(run, spectra={}, flatness={k: dataclasses.replace(f, network={
            **f.network, "surrogate": "atan:5"}) for k, f in run.flatness.items()})
        for run in made
    ]  # fmt: skip
    assert "curvature under atan:5 runs" in text(compare_runs(only_flat, by="surrogate"))


def test_a_matched_loss_says_which_loss_it_is(found: Comparison) -> None:
    note = "training loss: the log's mean over the batches of an epoch, in training mode"
    lines = comparison_lines(found)
    assert lines[lines.index("AT THE FIRST EPOCH OF TRAINING LOSS <= 0.02") + 1] == note
    assert lines.count(note) == markdown_lines(found).count(f"({note})") == 1
    assert note not in text(dataclasses.replace(found, rows=tuple(r for r in found.rows if not r.moment)))


def test_numbers_of_every_size_fit() -> None:
    for size in (1e-9, 1e7):
        made = make_study(("ikun", "kaiming"), range(6), (), curvature=size)
        assert max(map(len, comparison_lines(compare_runs(made)))) <= 80


def test_rows_for_a_csv(found: Comparison, tmp_path: Path) -> None:
    rows = comparison_rows(found)
    assert len(rows) == len(found.rows)
    write_table(rows, tmp_path / "compare.csv")
    with (tmp_path / "compare.csv").open() as file:
        read = list(csv.DictReader(file))
    (one,) = [r for r in read if (r["measure"], r["init"], r["moment"]) == ("ggn lambda_max", "ikun", "end")]
    expected = row(found, "ggn lambda_max", "ikun")
    assert float(one["against the reference"]) == expected.shift.value
    assert (one["scale"], one["pairs"], one["reference"]) == ("ratio", "6", "kaiming")
    assert float(one["p Holm"]) == expected.holm
    (reference,) = [r for r in read if (r["measure"], r["init"], r["moment"]) == ("ggn lambda_max", "kaiming", "end")]
    assert reference["p"] == reference["against the reference"] == ""


def test_markdown_tables_are_whole(found: Comparison, runs: list[TrainingRun]) -> None:
    lines = markdown_lines(found)
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {16, 8}
    assert "### Loss under noise, at the first epoch of training loss <= 0.02" in lines
    whole = settings_markdown(compare_settings(runs))
    assert "\n".join(lines) in whole
    assert "Hodges and Lehmann" in whole
    assert not re.search(r"no difference", whole, re.IGNORECASE)


def test_markdown_names_what_cannot_be_compared() -> None:
    made = [*make_study(("ikun", "kaiming"), (0, 1), ()), make_run("ikun", 0, training={"optimizer": "sgd"})]
    tables = settings_markdown(compare_settings(made))
    assert "## sgd\n\nNot compared: a comparison needs at least two levels of init: all runs have init ikun" in tables
    assert "## adam" in tables


def test_moment_titles() -> None:
    titles = [moment_title(m) for m in ("", "loss0.02", "epoch0005", "one-image")]
    assert titles == [
        "at the end of training", "at the first epoch of training loss <= 0.02", "after epoch 5",
        "at the end of training, one-image",
    ]  # fmt: skip


def test_another_analysis_by_its_tag() -> None:
    """--moment one-image: the spectra of that tag alone, no outcomes of training again."""
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


def test_never_and_unknown_are_told_apart_in_json(found: Comparison) -> None:
    part = settings_json({"": found})["settings"][0]
    assert (part["setting"], part["reference"], part["margin"]) == ("", "kaiming", 1.25)
    (loss,) = [r for r in part["rows"] if (r["measure"], r["level"]) == ("train loss", "xavier")]
    assert loss["values"]["xavier-adam-s3"] == "inf"
    (test,) = [r for r in part["rows"] if (r["measure"], r["level"], r["moment"]) == ("test accuracy", "xavier", "")]
    assert test["values"]["xavier-adam-s3"] == "-inf"
    (base,) = [r for r in part["rows"] if (r["measure"], r["level"]) == ("train loss", "kaiming")]
    assert math.isnan(base["p"])


def test_the_legend_says_what_becomes_of_diverged_runs(found: Comparison) -> None:
    assert "of curvatures they have none, and drop out with their pairs" in text(found)
    assert math.isnan(row(found, "ggn lambda_max", "xavier").values["xavier-adam-s3"])
