"""Tests of the selection and pairing of runs."""

from __future__ import annotations

import dataclasses
import re

import pytest
from run_tools import make_run, make_study
from study_tools import row, text

from hessian_tools.io.json import ResultError
from ikun_hessian.experiments.comparison.comparison import compare_runs, compare_settings
from ikun_hessian.experiments.comparison.pairing import chosen_runs, several_seeds
from ikun_hessian.experiments.comparison.result import Comparison
from ikun_hessian.experiments.runs import TrainingRun


def test_a_run_without_a_partner_is_named() -> None:
    made = [*make_study(("ikun", "kaiming"), range(3), ()), make_run("ikun", 7)]
    c = compare_runs(made)
    assert (c.seeds, c.levels) == (("0", "1", "2", "7"), {"kaiming": 3, "ikun": 4})
    assert row(c, "ggn lambda_max", "ikun").pairs == 3
    assert c.unpaired == {"ikun": ("ikun-adam-s7",)}
    assert "Not paired: 1 of 4 runs of ikun (ikun-adam-s7)." in text(c)
    with pytest.raises(ResultError, match=r"ikun-adam-s0 and ikun-adam-s0 have the same recorded settings"):
        compare_runs([*made, made[0]])


def test_runs_pair_though_some_lack_a_setting(runs: list[TrainingRun], found: Comparison) -> None:
    """NAME.train.json lost, and a study that was begun before there was an option."""
    lost = dataclasses.replace(runs[0], data={"name": "digits"})
    later = [dataclasses.replace(run, training={**run.training, "gain": 1.0}) for run in runs[1:]]
    (c,) = compare_settings([lost, *later]).values()
    assert isinstance(c, Comparison)
    assert (c.unpaired, c.follows, c.rows) == ({}, {}, found.rows)
    other = dataclasses.replace(runs[0], name="ikun-gain", training={**runs[0].training, "gain": 2.0})
    why = "ikun-adam-s0 and ikun-gain differ in gain, which is not recorded for all runs: choose with --where gain=2"
    assert compare_settings([*runs, other]) == {"": why}


def on_other_data(run: TrainingRun, sha256: str | None, **data: object) -> TrainingRun:
    return dataclasses.replace(run, data={**run.data, "sha256": sha256, **data})


@pytest.mark.parametrize("bare", [True, False], ids=["no spectra", "spectra alike"])
def test_runs_trained_on_other_data_are_refused(runs: list[TrainingRun], bare: bool) -> None:
    """Folders of images under one name: only the hash of the training samples tells them apart."""
    made = [dataclasses.replace(run, spectra={}, flatness={}) if bare else run for run in runs]
    made[3] = on_other_data(made[3], "e" * 64)
    why = (
        "not comparable: training data differs, eeeeeeeeeeee… for ikun-adam-s3 but dddddddddddd… for kaiming-adam-s3: "
        "train both runs of a pair on the same data"
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
def test_data_may_differ_if_they_are_what_is_compared(key: str) -> None:
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
    with pytest.raises(ResultError, match=r"training data differs, c for 8-0 but b for 4-0: train both runs of a"):
        compare_runs(made, by="patience", reference="4")


def test_settings_that_do_not_affect_training_do_not_prevent_pairs() -> None:
    made = [make_run("ikun", s, training={"alpha": 0.1, "snapshots": s, "save_at_loss": [s]}) for s in range(2)]
    c = compare_runs([*made, *(make_run("kaiming", s) for s in range(2))], moments=["end"])
    assert row(c, "train loss", "ikun").pairs == 2
    assert c.follows["alpha"] == {"kaiming": "1", "ikun": "0.1"}


def test_runs_are_selected_by_condition(runs: list[TrainingRun]) -> None:
    assert {run.value("init") for run in chosen_runs(runs, ["init=ikun", "optimizer=adam"])} == {"ikun"}
    assert chosen_runs(runs, []) == runs
    for condition, why in (
        ("init", "give a condition and its value"),
        ("init=x", "no run matches: init is ikun or kaiming or xavier"),
        ("inti=ikun", "did you mean init?"),
    ):
        with pytest.raises(ResultError, match=re.escape(why)):
            chosen_runs(runs, [condition])


def test_several_seeds_need_two_levels_and_two_seeds_of_one(runs: list[TrainingRun]) -> None:
    assert several_seeds(runs, "init")
    assert not several_seeds(runs[:6], "init")
    assert not several_seeds([runs[0], runs[6], runs[12]], "init")
    assert not several_seeds([runs[0], dataclasses.replace(runs[0], name="b"), runs[6]], "init")
