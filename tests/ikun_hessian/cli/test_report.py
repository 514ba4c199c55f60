"""Tests of the command report."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_tools import Capture, fails
from landscape_tools import made
from run_tools import make_run, write_run

import cli
from hessian_tools.io import json as results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("results")
    write_run(make_run("ikun", 1, moments=("",)), place)
    results.save_result(made(), place / "one.landscape.json")
    return place


def test_a_folder_a_checkpoint_and_files_become_one_page(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "r.html"
    assert cli.run(["report", str(folder), "-o", str(out), "--title", "Mine"]) == 0
    assert capsys.readouterr().out == f"files       {out}\n"
    page = out.read_text()
    assert "<title>Mine</title>" in page
    (spectrum,) = folder.glob("*.spectrum.json")
    checkpoint = next(folder.glob("*.pt"))
    for paths, part in (
        ([spectrum], "spectra"),
        ([folder / "one.landscape.json"], "landscapes"),
        ([checkpoint], "training"),
        ([spectrum, folder / "one.landscape.json"], "landscapes"),
    ):
        assert cli.run(["report", *map(str, paths), "--out", str(out)]) == 0
        assert f'<section id="{part}">' in out.read_text()


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = ["-o", str(tmp_path / "r.html")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    (tmp_path / "bad.landscape.json").write_text("[1, 2")
    for path, message in (
        (tmp_path / "empty", "no results"),
        (tmp_path / "none.spectrum.json", "none.spectrum.json"),
        (tmp_path / "none.pt", "no results next to the checkpoint"),
        (tmp_path / "a.txt", "not a folder, a checkpoint (.pt) or a result"),
        (tmp_path / "bad.landscape.json", "not a JSON file"),
    ):
        fails(capsys, 2, message, "report", str(path), *out)
    fails(capsys, 2, "no run has a condition 'sede'", "report", str(folder), "--by", "sede", *out)
    fails(capsys, 2, "directory", "report", str(folder), "-o", str(tmp_path))
    assert not (tmp_path / "r.html").exists()


def test_what_is_left_out_is_said(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    write_run(make_run("ikun", 1, moments=("",)), tmp_path)
    (tmp_path / "bad.landscape.json").write_text("[1, 2")
    assert cli.run(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 0
    assert "bad.landscape.json: not a JSON file" in capsys.readouterr().err
