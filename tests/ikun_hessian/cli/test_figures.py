"""Tests of the command figures: files, skipped figures and mistakes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from command_tools import Capture, fails
from run_tools import make_study, write_study

import cli


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three initializers, three seeds, one run diverged, one result damaged; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, make_study(seeds=(1, 2, 3), moments=("",)))
    (folder / "runs" / "ikun-adam-s1.spectrum.json").write_text('{"schema": ')
    return folder


def test_figures_of_a_study_are_written(study: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "figures"
    assert cli.run(["figures", str(study), "--out", str(out), "--width", "1"]) == 0
    shown = capsys.readouterr()
    written = [Path(line) for line in shown.out.splitlines()]
    assert sorted(written) == sorted(out.iterdir())
    assert {p.stem for p in written} >= {"start", "epochs", "ranks", "gap", "training"}
    assert {p.suffix for p in written} == {".png", ".pdf", ".csv"}
    assert "ikun-adam-s1.spectrum.json: not a JSON file" in shown.err
    assert "ikun-adam-s1" not in (out / "ranks.csv").read_text()
    assert "ikun-adam-s2" in (out / "ranks.csv").read_text()
    left = [line for line in shown.err.splitlines() if line.startswith("! skipped figure ")]
    assert [line.split(":")[0].split()[-1] for line in left] == [
        "gain",
        "depth",
        "one-image",
        "layers",
        "samples",
        "calibration",
    ]


def test_figures_and_runs_can_be_selected(study: Path, tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "a")
    arguments = [
        "figures",
        str(study),
        "--out",
        out,
        "--only",
        "epochs",
        "--accuracy",
        "0.8",
        "--where",
        "init=kaiming",
    ]
    assert cli.run(arguments) == 0
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == [
        "epochs.png",
        "epochs.pdf",
        "epochs.csv",
    ]
    table = (tmp_path / "a" / "epochs.csv").read_text()
    assert "share at 80%" in table
    assert "kaiming" in table
    assert "xavier" not in table


def test_a_study_says_what_its_figures_compare(tmp_path: Path, capsys: Capture) -> None:
    runs = [
        dataclasses.replace(run, name=f"{run.name}-{rate}")
        for rate in (0.1, 0.2)
        for run in make_study(seeds=(1,), moments=(), training={"lr": rate, "batch_size": int(640 * rate)})
    ]
    write_study(tmp_path / "s", runs)
    described = {"schema": "ikun-hessian/study/1", "title": "t", "question": "", "by": "lr", "accuracy": 0.8}
    (tmp_path / "s" / "study.json").write_text(json.dumps({**described, "runs": {}, "analyses": {}}))

    def drawn(*options: str) -> str:
        out = tmp_path / "o"
        assert cli.run(["figures", str(tmp_path / "s"), "--only", "epochs", "--out", str(out), *options]) == 0
        capsys.readouterr()
        return (out / "epochs.csv").read_text()

    usual = drawn()
    assert usual.startswith("page,panel,column,lr,mark")
    assert "share at 80%" in usual
    asked = drawn("--by", "batch-size", "--accuracy", "0.7", "--where", "batch-size=64", "--where", "data=digits")
    assert asked.startswith("page,panel,column,batch_size,mark")
    assert "share at 70%" in asked
    assert {row.split(",")[3] for row in asked.splitlines()[1:]} == {"64"}


def test_mistakes_are_one_line(study: Path, tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "none")
    rest = [str(study / "runs" / "kaiming-adam-s1.train.json"), "--out", out]
    fails(capsys, 2, "--only layers: no run has spectra of single layers", "figures", *rest, "--only", "layers")
    fails(capsys, 2, "unknown figure 'rank': choose from start", "figures", *rest, "--only", "rank")
    fails(capsys, 2, "--by inti", "figures", *rest, "--by", "inti")
    fails(capsys, 2, "--where init", "figures", *rest, "--where", "init=none")
    fails(capsys, 2, "--accuracy 90: give a share of the test images", "figures", *rest, "--accuracy", "90")
    fails(capsys, 2, "no *.spectrum.json", "figures", str(tmp_path), "--out", out)
    (tmp_path / "a.calibration.json").write_text("{}")
    fails(capsys, 2, "a.calibration.json", "figures", str(tmp_path / "a.calibration.json"), "--out", out)
    assert not Path(out).exists()
