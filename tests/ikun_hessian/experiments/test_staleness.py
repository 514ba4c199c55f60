"""Tests of results whose checkpoint was trained again after they were measured."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from command_tools import FAST, Capture

import cli
from hessian_tools.io.json import ResultError
from ikun_hessian.experiments.runs import gather
from ikun_hessian.experiments.staleness import StaleError, refuse_stale

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


@pytest.fixture
def elsewhere(analysed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of results that were written with --out, of two checkpoints in another folder."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("a.pt", "b.pt"):
        shutil.copy(analysed / name, Path("runs", name))
    assert cli.run(["spectrum", "runs/a.pt", str(tmp_path / "runs/b.pt"), *FAST, "--out", "out"]) == 0
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["a", "b"])  # one path was recorded relative, the other absolute
@pytest.mark.parametrize("working", [".", "out", "runs"])
def test_results_in_another_folder_than_their_checkpoint(
    name: str, working: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(elsewhere.parent / working)
    files = [str(elsewhere / f"{stem}.spectrum.json") for stem in "ab"]
    assert len(gather([elsewhere])) == 2
    shutil.copy(elsewhere.parent / "runs" / ("b.pt" if name == "a" else "a.pt"), elsewhere.parent / f"runs/{name}.pt")
    for command in ("compare", "figures"):
        capsys.readouterr()
        assert cli.run([command, *files, "--out", "drawn"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {elsewhere / name}.spectrum.json: not of the weights that")
        assert not Path("drawn").exists()
    said: list[str] = []
    assert [len(run.spectra) for run in gather([elsewhere], said.append)] == [1]
    assert len(said) == 1


def test_a_copy_of_the_checkpoint_next_to_the_result_settles_it(elsewhere: Path) -> None:
    shutil.copy("runs/a.pt", elsewhere / "a.pt")
    shutil.copy("runs/b.pt", "runs/a.pt")
    assert len(gather([elsewhere])) == 2


@pytest.mark.parametrize(
    "path", ["", ".", "/", "..", "a\0.pt", "x" * 300 + "/a.pt", "loop", "/dev/zero", "pipe", "out"]
)
def test_paths_that_lead_to_no_file_are_no_checkpoint(path: str, elsewhere: Path) -> None:
    (elsewhere / "loop").symlink_to("loop")
    os.mkfifo(elsewhere / "pipe")
    refuse_stale(elsewhere / "a.spectrum.json", {"path": path, "sha256": "0" * 64})


def test_the_error_is_a_result_error() -> None:
    assert issubclass(StaleError, ResultError)
