"""Tests of the command landscape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_tools import Capture, fails, interrupted
from result_tools import numbers

import cli
from hessian_tools.io.json import load_result
from hessian_tools.results.landscape import LANDSCAPE_SCHEMA, LandscapeResult

QUICK = ["--samples", "40", "--points", "5", "--plane-points", "3"]


@pytest.fixture(scope="module")
def drawn(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the landscape of a.pt."""
    out = tmp_path_factory.mktemp("landscape")
    assert cli.run(["landscape", str(trained / "a.pt"), *QUICK, "--out", str(out)]) == 0
    return out


def test_landscape_leaves_its_result_and_figure(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == [f"a.landscape.{end}" for end in ("json", "pdf", "png")]
    assert (drawn / "a.landscape.png").read_bytes()[:4] == b"\x89PNG"
    result = load_result(drawn / "a.landscape.json", LandscapeResult, LANDSCAPE_SCHEMA)
    assert [line.name for line in result.lines] == ["top1", "top2", "negative", "gradient", "random1", "random2"]
    assert [plane.directions for plane in result.planes] == [("random1", "random2"), ("top1", "negative")]
    assert result.data["samples"] == 40
    assert {len(line.loss) for line in result.lines} == {len(line.relaxed_loss) for line in result.lines} == {5}
    assert {len(plane.loss) for plane in result.planes} == {3}
    assert len({line.loss[2] for line in result.lines}) == 1
    assert result.network["surrogate"] == "atan:2"
    assert len(result.checkpoint["sha256"]) == 64


def test_the_screen_and_json_hold_the_result(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    part = ["landscape", str(trained / "a.pt"), str(trained / "b.pt"), *QUICK, "--out", str(tmp_path), "--accuracy"]
    part += ["--directions", "top1,random2", "--range", "0.1", "--tag", "x"]
    assert cli.run([*part, "--full"]) == 0
    screen = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("checkpoint") for line in screen) == 2
    assert not [line for line in screen if len(line) > 80 and not line.startswith(("files", "checkpoint"))]
    assert f"files       {tmp_path}/b.x.landscape.{{json,png,pdf}}" in screen
    assert [line.split()[1] for line in screen if line.startswith(("top1", "random2"))] == ["0.1"] * 4
    assert [line for line in screen if line.startswith("accuracy    at -e and e: top1 ")]
    assert cli.run([*part, "--json", "--resume"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == [json.loads((tmp_path / f"{name}.x.landscape.json").read_text()) for name in "ab"]
    assert printed[0]["planes"] == []
    assert {len(line["accuracy"]) for line in printed[0]["lines"]} == {5}


def test_the_planes_asked_for_are_drawn(trained: Path, tmp_path: Path) -> None:
    part = ["landscape", str(trained / "a.pt"), *QUICK, "--out", str(tmp_path), "--directions", "gradient"]
    assert cli.run([*part, "--plane", "top1, gradient", "--plane", "random3,top2"]) == 0
    result = load_result(tmp_path / "a.landscape.json", LandscapeResult, LANDSCAPE_SCHEMA)
    assert [plane.directions for plane in result.planes] == [("top1", "gradient"), ("random3", "top2")]
    assert [line.name for line in result.lines] == ["gradient", "top1", "random3", "top2"]
    assert cli.run([*part, "--no-planes", "--force"]) == 0
    assert load_result(tmp_path / "a.landscape.json", LandscapeResult, LANDSCAPE_SCHEMA).planes == ()


def test_other_settings_do_not_overwrite(trained: Path, drawn: Path, capsys: Capture) -> None:
    part = ["landscape", str(trained / "a.pt"), *QUICK, "--out", str(drawn)]
    before = (drawn / "a.landscape.json").read_bytes()
    for change, message in (
        (["--points", "7"], "made with points 5; now 7."),
        (["--range", "0.2"], "made with range none; now 0.2."),
        (["--no-planes"], "made with planes "),
        (["--samples", "39"], "--tag"),
        (["--surrogate", "atan:4"], "surrogate atan:2; now atan:4."),
        (["--dtype", "float64"], "dtype"),
        (["--params", "fc*"], "parameters"),
        (["--seed", "1"], "made with seed 0; now 1."),
    ):
        fails(capsys, 2, message, *part, *change)
    assert (drawn / "a.landscape.json").read_bytes() == before
    assert cli.run([*part, "--resume"]) == 0
    assert (drawn / "a.landscape.json").read_bytes() == before
    assert "(unchanged)" in capsys.readouterr().out
    (drawn / "b.landscape.json").write_text("{}")
    fails(capsys, 2, "was not written by this version", "landscape", str(trained / "b.pt"), *QUICK, "--out", str(drawn))
    (drawn / "b.landscape.json").unlink()


@pytest.mark.parametrize("phase", ["line gradient", "plane top1,negative"])
def test_an_interrupted_run_resumes_to_the_same_file(
    trained: Path, drawn: Path, tmp_path: Path, phase: str, capsys: Capture
) -> None:
    part = ["landscape", str(trained / "a.pt"), *QUICK, "--out", str(tmp_path)]
    interrupted(part, phase, 3)
    assert "with --resume to continue" in capsys.readouterr().err
    assert not (tmp_path / "a.landscape.json").exists()
    fails(capsys, 2, "an interrupted analysis. Use --resume", *part)
    fails(capsys, 2, "the settings changed since", *part, "--seed", "3", "--resume")
    assert cli.run([*part, "--resume"]) == 0
    assert numbers(tmp_path / "a.landscape.json") == numbers(drawn / "a.landscape.json")
    for end in ("png", "pdf"):
        assert (tmp_path / f"a.landscape.{end}").read_bytes() == (drawn / f"a.landscape.{end}").read_bytes()
    assert not list(tmp_path.glob("*.resume*"))


def test_a_surrogate_without_a_relaxed_network_is_reported(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    part = [
        "landscape",
        str(trained / "a.pt"),
        *QUICK,
        "--out",
        str(tmp_path),
        "--surrogate",
        "fast_sigmoid:25",
        "--full",
    ]
    assert cli.run([*part, "--directions", "random1,gradient"]) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "! No relaxed network: surrogate fast_sigmoid:25 has area 0.08, not 1" in screen
    result = load_result(tmp_path / "a.landscape.json", LandscapeResult, LANDSCAPE_SCHEMA)
    assert {line.relaxed_loss for line in result.lines} == {()}


def test_weights_that_are_not_finite_are_refused(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    saved = torch.load(trained / "a.pt", weights_only=True)
    states = [value for value in saved.values() if isinstance(value, dict) and "conv1.weight" in value]
    states[0]["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(saved, tmp_path / "nan.pt")
    fails(capsys, 2, "NaN", "landscape", str(tmp_path / "nan.pt"), *QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--range", "0"], "range must be a positive number"),
        (["--range", "-0.5"], "range must be a positive number"),
        (["--range", "nan"], "range must be a positive number"),
        (["--points", "4"], "points must be odd"),
        (["--plane-points", "1"], "plane points must be odd and at least 3"),
        (["--directions", "top1,sideways"], "unknown direction 'sideways'"),
        (["--directions", ","], "no direction chosen"),
        (["--plane", "top1"], "--plane 'top1' is not a pair"),
        (["--plane", "top1,top2,top3"], "is not a pair"),
        (["--plane", "top1,top1"], "two different directions"),
        (["--plane", "top1,east"], "unknown direction 'east'"),
        (["--plane", "top1,top2", "--no-planes"], "exclude each other"),
        (["--samples", "0"], "give a number from 1 to 200, or all"),
        (["--memory", "0"], "must be positive"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_bad_options_are_refused(
    trained: Path, tmp_path: Path, capsys: Capture, options: list[str], message: str
) -> None:
    fails(capsys, 2, message, "landscape", str(trained / "a.pt"), "--out", str(tmp_path), *options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_is_refused(tmp_path: Path, capsys: Capture) -> None:
    fails(capsys, 2, "nothing.pt", "landscape", str(tmp_path / "nothing.pt"))
    (tmp_path / "x").mkdir()
    trained = str(tmp_path / "x" / "a.pt")
    for path in (trained, tmp_path / "a.pt"):
        Path(path).touch()
    fails(
        capsys,
        2,
        "two checkpoints would both write",
        "landscape",
        trained,
        str(tmp_path / "a.pt"),
        "--out",
        str(tmp_path),
    )
