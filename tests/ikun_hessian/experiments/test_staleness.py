"""Tests of results whose checkpoint was trained again after they were measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_tools import FAST, Capture

import cli
from hessian_tools.io.json import ResultError
from ikun_hessian.experiments.runs import gather
from ikun_hessian.experiments.staleness import StaleError

NAMES = ["a.pt", "b.pt", "a.spectrum.json", "b.spectrum.json", "a.train.json", "b.train.json"]


@pytest.fixture
def again(analysed: Path, tmp_path: Path) -> Path:
    """Two analysed checkpoints, of which `a` was trained again."""
    for name in NAMES:
        shutil.copy(analysed / name, tmp_path / name)
    assert [list(run.spectra) for run in gather([tmp_path])] == [[""], [""]]
    shutil.copy(analysed / "b.pt", tmp_path / "a.pt")
    return tmp_path


def test_a_stale_result_in_a_folder_is_skipped_with_a_line(again: Path) -> None:
    said: list[str] = []
    runs = gather([again], said.append)
    assert [list(run.spectra) for run in runs] == [[], [""]]
    (line,) = said
    assert line.startswith(f"{again / 'a.spectrum.json'}: not of the weights that {again / 'a.pt'} has now")
    assert line.endswith("(skipped)")
    assert "Run `ikun-hessian spectrum` on it again" in line


@pytest.mark.parametrize("name", ["a.pt", "a.spectrum.json"])
def test_a_stale_result_that_was_named_is_refused(name: str, again: Path) -> None:
    with pytest.raises(ResultError, match="not of the weights that"):
        gather([again / name, again / "b.pt"], lambda _: None)


def test_other_results_of_the_checkpoint_are_used(again: Path) -> None:
    shutil.copy(again / "b.spectrum.json", again / "a.new.spectrum.json")
    said: list[str] = []
    shutil.copy(again / "b.pt", again / "new.pt")
    (run,) = gather([again / "a.pt"], said.append)
    assert list(run.spectra) == ["new"]
    assert len(said) == 1


def test_a_result_without_its_checkpoint_is_used(again: Path) -> None:
    (again / "a.pt").unlink()
    assert [list(run.spectra) for run in gather([again])] == [[""], [""]]


@pytest.mark.parametrize("command", ["compare", "figures"])
def test_the_commands_refuse_it(command: str, again: Path, capsys: Capture) -> None:
    out = ["--out", str(again / "out")]
    both = [str(again / "a.pt"), str(again / "b.pt")]
    assert cli.run([command, *both, *out]) == 2
    assert "not of the weights that" in capsys.readouterr().err.splitlines()[-1]
    assert not (again / "out").exists()
    assert cli.run(["spectrum", both[0], *FAST, "--force"]) == 0
    assert cli.run([command, *both, *out]) == 0


def test_compare_leaves_it_out_of_a_folder(again: Path, capsys: Capture) -> None:
    assert cli.run(["compare", str(again), "--out", str(again / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "not of the weights that" in said[0]
    assert said[-1] == "error: a comparison needs at least two results"


def test_the_error_is_a_result_error() -> None:
    assert issubclass(StaleError, ResultError)
