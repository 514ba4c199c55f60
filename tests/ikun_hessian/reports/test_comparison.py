"""Tests of the screen, the tables and the files of a comparison."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from pathlib import Path

import pytest
from run_tools import make_run, make_study
from study_tools import changed, row, text

from hessian_tools.io.files import write_table
from ikun_hessian.experiments.comparison.comparison import compare_runs, compare_settings
from ikun_hessian.experiments.comparison.result import Comparison
from ikun_hessian.experiments.runs import TrainingRun
from ikun_hessian.reports.comparison import comparison_lines
from ikun_hessian.reports.comparison_files import comparison_rows, markdown_lines, settings_json, settings_markdown
from ikun_hessian.reports.comparison_text import moment_title


@pytest.mark.parametrize(
    "inits",
    [("ikun", "kaiming", "xavier"), ("delta_orthogonal", "gradient_stable", "kaiming", "fluctuation_driven_long_name")],
)
@pytest.mark.parametrize("seeds", [2, 5, 6])
def test_the_screen_fits_80_columns(inits: tuple[str, ...], seeds: int) -> None:
    c = compare_runs(make_study(inits, range(seeds), ((inits[-1], 1),)))
    lines = comparison_lines(c)
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert any(line.startswith("  delta_ort") for line in lines) == ("delta_orthogonal" in inits)


def test_the_cost_of_an_initializer_is_shown_once(runs: list[TrainingRun]) -> None:
    """Medians over the runs that record it, without tests, and only if initializers are compared."""
    costs = {"ikun": [(0.3, 20), (0.1, 31), (0.2, 30)], "kaiming": [(1e-4, 0)] * 3, "xavier": [(2e-4, 1)] * 3}
    made = []
    for run in make_study(seeds=range(3), diverged=()):
        seconds, passes = costs[run.value("init")][run.value("seed")]
        made.append(dataclasses.replace(run, start={"seconds": seconds, "forward_passes": passes, "layers": []}))
    c = compare_runs(made)
    costs_of = "median seconds and forward passes per run:"
    shown = f"{costs_of} kaiming 0.0001, 0; ikun 0.2, 30; xavier 0.0002, 1"
    assert f"initialized {shown}" in text(c)
    assert "- initialized: median forward passes per run: kaiming 0; ikun 30; xavier 1" in markdown_lines(c)
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
    assert "trained digits, csnn, bn, timesteps 4; curvature with surrogate atan:2 runs" in text(c)
    assert "digits, csnn, bn, timesteps 4; curvature with surrogate atan:2." in markdown_lines(c)[0]
    flat = [dataclasses.replace(run, flatness={}) for run in common]
    end = [dataclasses.replace(run, spectra={"": run.spectra[""], "loss0.02": old.spectra["loss0.02"]})
           for run, old in zip(flat, made, strict=True)]  # fmt: skip
    said = "curvature with surrogate atan:2 at the end of training"
    assert f"{said} runs" in text(compare_runs(end, by="surrogate"))
    several = [dataclasses.replace(run, spectra={**run.spectra, "loss0.02": changed(run, network={
        "surrogate": "atan:5"}).spectra["loss0.02"]}) for run in flat]  # fmt: skip
    both = f"{said}; curvature with surrogate atan:5 at the first epoch with training loss <= 0.02 runs"
    assert both in text(compare_runs(several, by="surrogate"))
    apart = [
        run if run.value("surrogate") == "atan:2" else changed(run, network={"surrogate": "atan:5"}) for run in made
    ]
    assert compare_runs(apart, by="surrogate").surrogates == {}  # not one: curvatures are left out
    for own in (made, make_study(seeds=range(2))):
        by = "surrogate" if own is made else "init"
        assert "curvature with surrogate" not in text(compare_runs(own, by=by))
    only_flat = [
        dataclasses.replace(run, spectra={}, flatness={k: dataclasses.replace(f, network={
            **f.network, "surrogate": "atan:5"}) for k, f in run.flatness.items()})
        for run in made
    ]  # fmt: skip
    assert "curvature with surrogate atan:5 runs" in text(compare_runs(only_flat, by="surrogate"))


def test_a_matched_loss_says_which_loss_it_is(found: Comparison) -> None:
    note = "training loss: mean over the batches of an epoch in training mode, from the log"
    lines = comparison_lines(found)
    assert lines[lines.index("AT THE FIRST EPOCH WITH TRAINING LOSS <= 0.02") + 1] == note
    assert lines.count(note) == markdown_lines(found).count(f"({note})") == 1
    assert note not in text(dataclasses.replace(found, rows=tuple(r for r in found.rows if not r.moment)))


def test_numbers_of_every_size_fit() -> None:
    for size in (1e-9, 1e7):
        made = make_study(("ikun", "kaiming"), range(6), (), curvature=size)
        assert max(map(len, comparison_lines(compare_runs(made)))) <= 80


def test_the_csv_has_a_row_per_measure_and_level(found: Comparison, tmp_path: Path) -> None:
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
    assert "### Loss under noise, at the first epoch with training loss <= 0.02" in lines
    whole = settings_markdown(compare_settings(runs))
    assert "\n".join(lines) in whole
    assert "Hodges-Lehmann" in whole
    assert not re.search(r"no difference", whole, re.IGNORECASE)


def test_markdown_names_what_cannot_be_compared() -> None:
    made = [*make_study(("ikun", "kaiming"), (0, 1), ()), make_run("ikun", 0, training={"optimizer": "sgd"})]
    tables = settings_markdown(compare_settings(made))
    assert "## sgd\n\nNot compared: a comparison needs at least two levels of init: all runs have init ikun" in tables
    assert "## adam" in tables


def test_moments_have_titles() -> None:
    titles = [moment_title(m) for m in ("", "loss0.02", "epoch0005", "one-image")]
    assert titles == [
        "at the end of training", "at the first epoch with training loss <= 0.02", "after epoch 5",
        "at the end of training, one-image",
    ]  # fmt: skip


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
    assert "their curvatures are unknown and are left out together with their pairs" in text(found)
    assert math.isnan(row(found, "ggn lambda_max", "xavier").values["xavier-adam-s3"])


def test_levels_of_any_text_stay_in_their_cells(tmp_path: Path) -> None:
    """A result file may name an initializer that would end a cell, or that a spreadsheet would run."""
    odd = "=a|b<script>\n\x1b[31m"
    compared = compare_settings(make_study((odd, "kaiming"), range(5), ()))
    lines = settings_markdown(compared).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows
    assert {len(re.split(r"(?<!\\)\|", line)) for line in rows} == {9, 17}
    assert any(r"=a\|b\<script> ?[31m" in line for line in rows)
    write_table(comparison_rows(next(c for c in compared.values() if isinstance(c, Comparison))), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        found = {row["init"] for row in csv.DictReader(file)}
    assert found == {"kaiming", "'=a|b<script>\n?[31m"}
