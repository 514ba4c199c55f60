"""Tests of the command flatness."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_tools import Capture, fails, interrupted
from result_tools import numbers

import cli
from hessian_tools.analysis.agreement import correlation_within_kinds
from hessian_tools.analysis.calibration import CalibrationSettings
from hessian_tools.io.json import load_result, save_result
from hessian_tools.results.calibration import CALIBRATION_SCHEMA as CALIBRATION
from hessian_tools.results.calibration import Calibration, CalibrationResult
from hessian_tools.results.flatness import FLATNESS_SCHEMA, FlatnessResult
from ikun_hessian.jobs.analyses.calibration import calibration_of, own_calibration
from ikun_hessian.jobs.job import Job
from ikun_hessian.jobs.open import open_job

QUICK = ["--samples", "6", "--draws", "4", "--batch-size", "6"]


def changed(path: Path, target: Path, name: str, value: float) -> Path:
    """A checkpoint whose tensor `name` is all of this value."""
    saved = torch.load(path, weights_only=True)
    (state,) = [v for v in saved.values() if isinstance(v, dict) and name in v]
    state[name] = torch.full_like(state[name], value)
    torch.save(saved, target)
    return target


@pytest.fixture(scope="module")
def both(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with the flatness of a.pt and b.pt, and the screen."""
    out, screen = tmp_path_factory.mktemp("flatness"), io.StringIO()
    with contextlib.redirect_stdout(screen):
        part = [str(trained / "a.pt"), str(trained / "b.pt"), *QUICK, "--out", str(out), "--full"]
        assert cli.run(["flatness", *part]) == 0
    return out, screen.getvalue().splitlines()


@pytest.fixture
def measured(both: tuple[Path, list[str]]) -> Path:
    return both[0]


def test_flatness_leaves_its_result(measured: Path) -> None:
    assert sorted(path.name for path in measured.iterdir()) == ["a.flatness.json", "b.flatness.json"]
    result = load_result(measured / "a.flatness.json", FlatnessResult, FLATNESS_SCHEMA)
    assert list(result.main)[:4] == ["ggn lambda_max", "ggn trace", "hessian lambda_max", "hessian trace"]
    assert result.data["samples"] == 6
    assert result.settings["draws"] == 4
    assert len(result.checkpoint["sha256"]) == 64
    assert result.network["surrogate"] == "atan:2"
    assert not [m.note for m in result.main.values() if m.note]


def test_two_checkpoints_are_compared(trained: Path, both: tuple[Path, list[str]], capsys: Capture) -> None:
    out, screen = both
    assert sum(line == "FLATNESS: MAIN METRICS" for line in screen) == 2
    assert not [line for line in screen if len(line) > 80 and not line.startswith(("files", "checkpoint"))]
    assert f"files       {out}/b.flatness.json" in screen
    assert screen[screen.index("SIDE BY SIDE") + 1].split() == ["ikun", "kaiming"]
    assert "kaiming minus ikun:" in screen
    assert "calibrated  no (use --calibrate to measure which operator predicts this" in screen
    part = ["flatness", str(trained / "a.pt"), str(trained / "b.pt"), *QUICK, "--out", str(out), "--resume"]
    assert cli.run([*part, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == [json.loads((out / f"{name}.flatness.json").read_text()) for name in "ab"]
    assert cli.run([*part, "--full"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert [line.removesuffix(" (unchanged)") for line in again] == screen


def test_other_settings_do_not_overwrite(trained: Path, measured: Path, capsys: Capture) -> None:
    part = ["flatness", str(trained / "a.pt"), *QUICK, "--out", str(measured)]
    before = (measured / "a.flatness.json").read_bytes()
    for change, message in (
        (["--radius", "0.2"], "made with radius 0.1; now 0.2."),
        (["--operator", "smoothed"], "made with smoothed none; now 0.1."),
        (["--samples", "5"], "made with 6 samples; now 5."),
        (["--surrogate", "atan:4"], "surrogate atan:2; now atan:4."),
        (["--dtype", "float64"], "dtype float32; now float64."),
        (["--params", "fc*"], "parameters"),
        (["--seed", "1"], "--tag NAME"),
    ):
        fails(capsys, 2, message, *part, *change)
    assert (measured / "a.flatness.json").read_bytes() == before
    (measured / "a.y.flatness.json").write_text("{}")
    fails(capsys, 2, "was not written by this version", *part, "--tag", "y")
    (measured / "a.y.flatness.json").unlink()


def test_an_interrupted_run_resumes_to_the_same_file(
    trained: Path, measured: Path, tmp_path: Path, capsys: Capture
) -> None:
    part = ["flatness", str(trained / "a.pt"), *QUICK, "--out", str(tmp_path)]
    interrupted(part, "hessian scaled: eigenvalues", 3)
    assert "with --resume to continue" in capsys.readouterr().err
    assert not (tmp_path / "a.flatness.json").exists()
    fails(capsys, 2, "an interrupted analysis. Use --resume", *part)
    fails(capsys, 2, "the settings changed since", *part, "--seed", "3", "--resume")
    assert cli.run([*part, "--resume"]) == 0
    assert numbers(tmp_path / "a.flatness.json") == numbers(measured / "a.flatness.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.flatness.json"]


@pytest.mark.slow
def test_calibration_gives_the_verdict(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    part = ["flatness", str(trained / "a.pt"), *QUICK, "--out", str(tmp_path), "--full"]
    noise = ["--operator", "smoothed", "--noise", "0.2"]
    assert cli.run([*part, "--calibrate", *noise]) == 0
    screen = capsys.readouterr().out.splitlines()
    ends = ["calibration.json", "calibration.pdf", "calibration.png", "flatness.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{end}" for end in ends]
    assert not [line for line in screen if len(line) > 80 and not line.startswith(("files", "checkpoint"))]
    result = load_result(tmp_path / "a.flatness.json", FlatnessResult, FLATNESS_SCHEMA)
    assert list(result.main)[:2] == ["smoothed 0.2 lambda_max", "smoothed 0.2 trace"]
    found = load_result(tmp_path / "a.calibration.json", CalibrationResult, CALIBRATION)
    (scale,) = found.calibration.scales
    assert scale.scale == 0.2
    for name, a in scale.agreement.items():
        title = name.replace("ggn, fitted", f"fitted: {scale.fitted}")
        row = f"{title:<23}{a.correlation:.2f} [{a.ci95[0]:.2f}, {a.ci95[1]:.2f}]"
        assert any(line.startswith(row) and line.endswith(f" {a.within:.0%}") for line in screen)
    start = screen.index(next(line for line in screen if line.startswith("check ")))
    checks = [line[:23].strip() for line in screen[start + 1 : start + 5]]
    assert checks == ["smoothed", "smoothed, other draws", "one width", "half of the truth"]
    inner = correlation_within_kinds(scale.halves[0], scale.halves[1], found.calibration.kinds)
    assert screen[start + 4].split()[5] == f"{inner:.2f}"
    (at,) = [i for i, line in enumerate(screen) if line.startswith("calibrated")]
    verdict = screen[at : at + 5]
    assert "under noise 0.2, along" in verdict[0]
    assert [line.split()[0] for line in verdict[2:]] == ["smoothed", "ggn", "hessian"]
    before = (tmp_path / "a.calibration.json").read_bytes()
    again = [*part, "--operator", "smoothed", "--calibrate", "--resume"]
    fails(capsys, 2, "made with smoothed 0.2; now 0.3, 0.4.", *again, "--noise", "0.3", "--noise", "0.4")
    for change in ([], ["--calibrate"]):  # from the file
        assert cli.run([*part, *noise, "--resume", *change]) == 0
        later = capsys.readouterr().out.splitlines()
        assert later[at : at + 5] == verdict
        assert (tmp_path / "a.calibration.json").read_bytes() == before


def test_only_its_own_calibration_judges_a_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(name: str, surrogate: str | None = None, params: str = "*") -> Job:
        return open_job(
            trained / name, samples="6", split="train", batch_size=6, params=params, surrogate=surrogate,
            dtype="float32", memory=0.5, data_dir=None, device="cpu",
        )  # fmt: skip

    here = job("a.pt")
    monkeypatch.setattr("hessian_tools.analysis.calibration.calibrate", lambda *_, **__: Calibration((), {}, {}, ()))
    save_result(calibration_of(here, CalibrationSettings()), tmp_path / "a.calibration.json")
    stem = tmp_path / "a.calibration"
    assert own_calibration(stem, here) is not None
    assert own_calibration(stem, job("b.pt")) is None
    assert own_calibration(stem, job("a.pt", surrogate="atan:4")) is None
    assert own_calibration(stem, job("a.pt", params="fc*")) is None
    assert own_calibration(tmp_path / "b.calibration", here) is None
    (tmp_path / "a.calibration.json").write_text("{}")
    assert own_calibration(stem, here) is None


def test_a_network_that_never_spikes_is_reported(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("noise of scale 0.1 does not move the outputs")

    monkeypatch.setattr("hessian_tools.analysis.calibration.calibrate", refuse)  # as it does, after a while
    dead = changed(trained / "a.pt", tmp_path / "dead.pt", "norm2.bias", -1e3)
    part = ["flatness", str(dead), *QUICK, "--surrogate", "triangle:1", "--full"]
    assert cli.run([*part, "--operator", "smoothed", "--calibrate", "--noise", "0.1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "inf" not in text
    assert "nan" not in text
    assert "no surrogate gradient reaches these weights" in text
    assert "adaptive average sharpness" in text
    assert "! The noise does not change the loss of any sample" in text
    assert "not calibrated: noise of scale 0.1 does not move the outputs" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dead.flatness.json", "dead.pt"]


def test_weights_that_are_not_finite_are_refused(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    nan = changed(trained / "a.pt", tmp_path / "nan.pt", "conv1.weight", float("nan"))
    fails(capsys, 2, "NaN", "flatness", str(nan), *QUICK)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--radius", "0"], "radius must be a positive number, not 0"),
        (["--radius", "-1"], "radius must be a positive number"),
        (["--rho", "nan"], "rho must be a positive number"),
        (["--draws", "5"], "antithetic pairs"),
        (["--damping", "0"], "damping must be a positive number"),
        (["--noise", "0.1"], "--noise needs --operator smoothed or --calibrate"),
        (["--operator", "smoothed", "--noise", "0"], "noise must be a positive number"),
        (["--operator", "ggn"], "'--operator': no 'ggn': choose one of smoothed"),
        (["--calibrate", "--noise", "-1"], "noise"),
        (["--samples", "0"], "give a number from 1 to 200, or all"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_bad_options_are_refused(
    trained: Path, tmp_path: Path, capsys: Capture, options: list[str], message: str
) -> None:
    fails(capsys, 2, message, "flatness", str(trained / "a.pt"), "--out", str(tmp_path), *options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_is_refused(tmp_path: Path, capsys: Capture) -> None:
    fails(capsys, 2, "nothing.pt", "flatness", str(tmp_path / "nothing.pt"))


def test_two_checkpoints_of_one_name_are_refused(tmp_path: Path, capsys: Capture) -> None:
    paths = [tmp_path / "x" / "a.pt", tmp_path / "a.pt"]
    paths[0].parent.mkdir()
    for path in paths:
        path.touch()
    fails(capsys, 2, "two checkpoints would both write", "flatness", *map(str, paths), "--out", "x")
