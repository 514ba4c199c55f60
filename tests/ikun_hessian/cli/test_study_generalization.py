"""Tests of the command `study` on a study of generalization: to the answer, resumed, and moved to another folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_tools import Capture, fails
from generalization_tools import TINY

import cli
from ikun_hessian.experiments.generalization import network

SMALL = TINY
for old, new in (
    ("seeds = 2", "seeds = 1"),
    ("short = {timesteps = 2}\n", ""),
    ("observations = 2", "observations = 0"),
    ("threshold = 0.09", "threshold = 0.099"),
):
    SMALL = SMALL.replace(old, new)
COUNT = 8


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def studied(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "out"
    assert cli.run(["study", str(preset), "--out", str(folder), "--jobs", "1"]) == 0
    return folder


def test_the_answer_is_written(studied: Path) -> None:
    assert len(list((studied / "runs").glob("*.generalization.json"))) == COUNT
    for name in ("tables.md", "measures.csv", "networks.csv", "study.json", "figures/generalization.png"):
        assert (studied / name).stat().st_size > 0


def test_a_moved_study_runs_only_what_is_missing(
    preset: Path, studied: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(studied / "runs", moved / "runs")
    shutil.copy(studied / "study.json", moved)
    gone = sorted((moved / "runs").glob("*.generalization.json"))[3]
    before = gone.read_text()
    gone.unlink()
    ran: list[str] = []
    work = network.trained_and_measured
    monkeypatch.setattr(network, "trained_and_measured", lambda unit: (ran.append(unit.name), work(unit))[1])
    study = ["study", str(preset), "--out", str(moved), "--jobs", "1"]
    assert cli.run([*study, "--dry-run"]) == 0
    assert "8, 7 done" in capsys.readouterr().out
    assert cli.run(study) == 0
    assert ran in ([], [gone.name.removesuffix(".generalization.json")])  # [] if another process ran it
    settled = [line for line in before.splitlines() if '"training": ' not in line and '"measuring": ' not in line]
    assert [line for line in gone.read_text().splitlines() if line in settled] == settled
    shown = capsys.readouterr().out.splitlines()
    answer = shown[next(i for i, line in enumerate(shown) if line.startswith("primary ")) :]
    assert shown[: len(shown) - len(answer)] == [line for line in shown if line[:5] in ("study", "runs ", "steps")]
    assert len(answer) <= 12
    assert max(map(len, answer[:-1])) <= 80


def test_other_settings_and_bad_settings_are_refused(preset: Path, studied: Path, capsys: Capture) -> None:
    study = ["study", str(preset), "--out", str(studied)]
    fails(capsys, 2, "had another samples (40, now 30)", *study, "--set", "generalization.samples=30")
    fails(capsys, 2, "draws must be even", *study, "--set", "generalization.draws=7")
    fails(capsys, 2, "cannot be combined", *study, "--as-published")
