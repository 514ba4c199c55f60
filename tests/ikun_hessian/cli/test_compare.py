"""Tests of the command compare: refusals, single spectra and runs of several seeds."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest
from command_tools import FAST, SHIPPED, Capture, fails
from run_tools import make_run, make_study, write_study

import cli


def test_compare_refuses_what_was_not_measured_alike(analysed: Path, capsys: Capture) -> None:
    path = str(analysed / "b.pt")
    assert cli.run(["spectrum", path, *FAST, "--samples", "50", "--no-density", "--tag", "few"]) == 0
    fails(
        capsys,
        2,
        "number of samples differs, 96",
        "compare",
        str(analysed / "a.pt"),
        str(analysed / "b.few.spectrum.json"),
    )
    fails(capsys, 2, "at least two", "compare", path)
    fails(capsys, 2, "cannot be read", "compare", path, str(analysed / "none.pt"))
    fails(capsys, 2, "no *.spectrum.json", "compare", str(SHIPPED / "..") + "/ikun")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three initializers, six seeds, one run diverged; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder)
    return folder


def test_one_seed_a_level_is_the_table_of_spectra(analysed: Path, tmp_path: Path, capsys: Capture) -> None:
    """Two checkpoints, and a folder of single runs: figure and table as ever, and --by asks for the comparison."""
    paths = [str(analysed / name) for name in ("a.pt", "b.pt")]
    assert cli.run(["compare", *paths, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "scale-free" in out
    assert "effect" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.eigenvalues.pdf", "compare.eigenvalues.png"]
    assert cli.run(["compare", *paths, "--by", "init", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "init: ikun to the reference kaiming" in out
    assert "they need at least 5 pairs (here: 1)" in out
    assert (tmp_path / "compare.csv").exists()


def test_runs_of_several_seeds_are_compared_in_pairs(study: Path, tmp_path: Path, capsys: Capture) -> None:
    assert cli.run(["compare", str(study), "--out", str(tmp_path), "--tag", "x"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[0] == "compared    init: ikun, xavier to the reference kaiming (--reference)"
    assert "! xavier-adam-s3: NaN: the loss is not finite" in lines
    assert "AT THE FIRST EPOCH WITH TRAINING LOSS <= 0.02" in lines
    assert lines[-1].endswith("compare.x.{csv,md}")
    assert shown.err == ""
    with (tmp_path / "compare.x.csv").open() as file:
        assert {row["init"] for row in csv.DictReader(file)} == {"ikun", "kaiming", "xavier"}
    assert (tmp_path / "compare.x.md").read_text().startswith("init: kaiming (6 runs), ikun (6 runs)")


def test_options_reach_the_comparison(study: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ["--reference", "xavier", "--accuracy", "0.8", "--margin", "2", "--moment", "end", "--where", "seed=2"]
    assert cli.run(["compare", str(study), *options, "--json", "--out", str(tmp_path)]) == 0
    (found,) = json.loads(capsys.readouterr().out)["settings"]
    assert (found["setting"], found["reference"], found["accuracy"], found["margin"], found["moments"]) == (
        "",
        "xavier",
        0.8,
        2.0,
        [""],
    )
    assert found["levels"] == {"xavier": 1, "ikun": 1, "kaiming": 1}
    assert "epochs to 80% test accuracy" in {row["measure"] for row in found["rows"]}
    assert found["rows"][0]["p"] is None


def test_damaged_files_of_a_folder_are_named_and_left_out(tmp_path: Path, capsys: Capture) -> None:
    write_study(tmp_path, make_study(seeds=(0, 1), diverged=()))
    (tmp_path / "runs" / "ikun-adam-s0.spectrum.json").write_text("{")
    assert cli.run(["compare", str(tmp_path), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "ikun-adam-s0.spectrum.json: not a JSON file" in said[0]
    assert said[0].endswith("(skipped)")


def test_runs_trained_on_other_data_are_refused(tmp_path: Path, capsys: Capture) -> None:
    """Two folders of images with the same name and no results differ only in the hash in NAME.train.json."""
    images = {"a": {"name": "image-folder", "sha256": "a" * 64}, "b": {"name": "image-folder", "sha256": "b" * 64}}
    kaiming, ikun = (
        make_study((init,), (0, 1), (), moments=[], data=images[name])
        for init, name in (("kaiming", "a"), ("ikun", "b"))
    )
    write_study(tmp_path, [*kaiming, *ikun])
    why = "training data differs, bbbbbbbbbbbb… for ikun-adam-s0 but aaaaaaaaaaaa… for kaiming-adam-s0"
    fails(capsys, 2, why, "compare", str(tmp_path), "--out", str(tmp_path))
    assert not list(tmp_path.glob("compare.*"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--by", "colour"], "no run has a condition 'colour': choose one of"),
        (["--by", "norm"], "at least two levels of norm: all runs have norm bn"),
        (["--by", "seed"], "--by seed: runs are paired by their seed: choose another condition"),
        (["--by", ""], "no run has a condition ''"),
        (["--tag", "a/b"], "--tag a/b: must be a part of a file name; use --out for a folder"),
        (["--reference", "he"], "--reference he: no run has this init"),
        (["--accuracy", "90"], "--accuracy 90: give a share"),
        (["--margin", "1"], "--margin 1: give a ratio above 1"),
        (["--moment", "loss9"], "--moment loss9: no results at it: choose one of end, loss0.02"),
        (["--where", "norm=none"], "--where norm=none: no run matches: norm is bn"),
    ],
)
def test_mistakes_about_runs_get_one_line(study: Path, capsys: Capture, options: list[str], why: str) -> None:
    fails(capsys, 2, why, "compare", str(study), *options)


def test_settings_are_compared_one_at_a_time(tmp_path: Path, capsys: Capture) -> None:
    """The words of train, a block on the screen and a part of the files for every setting."""
    for norm in ("bn", "none"):
        for size in (32, 64):
            made = make_study(
                ("ikun", "kaiming"), (0, 1), (), training={"batch_size": size}, network={"norm": norm}, moments=("",)
            )
            write_study(tmp_path / norm / str(size), made)
    options = ["--by", "batch-size", "--where", "data=digits", "--where", "init=ikun"]
    assert cli.run(["compare", str(tmp_path), *options, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("setting")] == ["setting     bn", "setting     norm none"]
    assert lines.count("compared    batch_size: 64 to the reference 32 (--reference)") == 2
    assert max(map(len, lines[:-1])) <= 80
    with (tmp_path / "compare.csv").open() as file:
        assert {(row["setting"], row["batch_size"]) for row in csv.DictReader(file)} == {
            (setting, size) for setting in ("bn", "norm none") for size in ("32", "64")
        }
    assert (tmp_path / "compare.md").read_text().count("## ") >= 2
    assert cli.run(["compare", str(tmp_path), *options, "--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert [part["setting"] for part in found] == ["bn", "norm none"]


def test_settings_none_of_which_can_be_compared_are_refused(tmp_path: Path, capsys: Capture) -> None:
    for init, optimizer in (("ikun", "adam"), ("kaiming", "sgd")):
        write_study(tmp_path, make_study((init,), (0, 1), (), training={"optimizer": optimizer}, moments=()))
    fails(capsys, 2, "all runs have lr 0.01: choose --by init or optimizer", "compare", str(tmp_path), "--by", "lr")
    write_study(tmp_path, make_study(("ikun",), (0, 1), (), training={"optimizer": "sgd"}, moments=()))
    fails(capsys, 2, "sgd: --reference he: no run has this init", "compare", str(tmp_path), "--reference", "he")
    assert not list(tmp_path.glob("compare*"))


def test_a_study_says_what_it_compares(tmp_path: Path, capsys: Capture) -> None:
    """study.json in the folder or above it gives --by and --accuracy, unless asked for or damaged."""
    made = [make_run("ikun", s, training={"alpha": a}, moments=("",)) for s in (0, 1) for a in (0.5, 1.0)]
    made = [dataclasses.replace(run, name=f"a{i}") for i, run in enumerate(made)]
    write_study(tmp_path, made)
    record = tmp_path / "study.json"
    out = ["--out", str(tmp_path / "out")]
    record.write_text(json.dumps({"schema": "ikun-hessian/study/1", "by": "alpha", "accuracy": 0.8, "runs": {}}))
    for folder in (tmp_path, tmp_path / "runs"):
        assert cli.run(["compare", str(folder), *out]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("compared    alpha: 1 to the reference 0.5 (--reference)")
        assert "epochs to 80% test accuracy" in shown
    assert cli.run(["compare", str(tmp_path), "--accuracy", "0.7", *out]) == 0
    assert "epochs to 70% test accuracy" in capsys.readouterr().out
    fails(capsys, 2, "all runs have init ikun: choose --by alpha", "compare", str(tmp_path), "--by", "init")
    record.write_text("{")
    fails(capsys, 2, "all runs have init ikun: choose --by alpha", "compare", str(tmp_path))
