"""Tests of the width of the screens and of JSON on standard output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_tools import FAST, Capture

import cli


def test_screen_fits_80_columns(analysed: Path, capsys: Capture) -> None:
    assert cli.run(["info", str(analysed / "a.pt")]) == 0
    assert cli.run(["compare", str(analysed / "a.pt"), str(analysed / "b.pt"), "--out", str(analysed)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if str(analysed) not in line]
    assert len(lines) > 30
    assert max(map(len, lines)) <= 80
    assert (analysed / "compare.eigenvalues.png").exists()


def test_with_json_nothing_else_is_on_stdout(analysed: Path, capsys: Capture) -> None:
    capsys.readouterr()
    both = [str(analysed / "a.pt"), str(analysed / "b.pt")]
    assert cli.run(["spectrum", *both, *FAST, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["training"]["init"] for r in found] == ["ikun", "kaiming"]
    assert cli.run(["spectrum", both[0], *FAST, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "ikun-hessian/spectrum/1"
    assert cli.run(["info", both[0], "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {"initialization", "trained"} == set(layers)
    assert {"rule_variance", "weight_variance", "derivative_square", "forward_gain", "backward_gain"} <= set(
        layers["trained"][1]
    )


@pytest.mark.parametrize("name", ["a\x1b[31m\x07.pt", "a\nb.pt", "a\udcff.pt"])
def test_control_bytes_of_a_file_name_do_not_reach_the_terminal(
    name: str, analysed: Path, tmp_path: Path, capsys: Capture
) -> None:
    capsys.readouterr()
    path = tmp_path / name
    for command in ("info", "spectrum", "compare", "figures", "study"):
        assert cli.run([command, str(path.with_suffix(".toml") if command == "study" else path)]) == 2
        said = capsys.readouterr()
        shown = said.out + said.err
        assert "".join(c for c in shown if not c.isprintable() and c != "\n") == ""
        assert len([line for line in said.err.splitlines() if not line.startswith("opening")]) == 1 or "\n" in name
    shutil.copy(analysed / "a.pt", path)
    assert cli.run(["spectrum", str(path), *FAST]) == 0
    said = capsys.readouterr()
    assert "".join(c for c in said.out + said.err if not c.isprintable() and c != "\n") == ""
