"""Whole commands on a CUDA device, against the same commands on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_tools import FAST, Capture, equal, fails, interrupted

import cli
from ikun.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COMMANDS = {
    "spectrum": FAST,
    "flatness": ["--draws", "4", "--samples", "16"],
    "landscape": ["--points", "5", "--plane-points", "3", "--directions", "top1,random1,random2", "--samples", "32"],
}
ONE = ["--samples", "16", "--top", "1", "--smallest", "0", "--no-density", "--memory", "1"]
ANALYSES = {
    "exact": ["--operator", "ggn", "--exact"],
    "diagonal": ["--operator", "relaxed", "--diagonal", "--diagonal-probes", "2"],
    "pyhessian": ["--operator", "hessian", "--backend", "pyhessian", "--method", "power"],
    "layers": ["--operator", "ggn", "--per-layer"],
    "steps": ["--operator", "ggn", "--per-step"],
    "curve": ["--operator", "ggn", "--samples-curve", "4,8", "--resamples", "2"],
    "scaled": ["--operator", "ggn", "--scaled", "1"],
    "fisher": ["--operator", "fisher", "--method", "power"],
    "segments": ["--operator", "hessian", "--memory", "0.0005", "--batch-size", "8"],
}
SHORT = 3  # of these by default
SKIPPED = {"seconds", "time", "path", "device", "versions", "products", "environment", "converged", "residual"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small network, trained on the device as a and on the CPU as b, and a perceptron c."""
    made = tmp_path_factory.mktemp("gpu")
    options = ["--channels", "2", "--epochs", "2", "--subset", "200", "--lr", "0.01"]
    for name, device in (("a", "auto"), ("b", "cpu")):
        assert cli.run(["train", *options, "--device", device, "--out", str(made / f"{name}.pt")]) == 0
    perceptron = ["--model", "mlp", "--hidden", "8", "--epochs", "1", "--subset", "100"]
    assert cli.run(["train", *perceptron, "--device", "cpu", "--out", str(made / "c.pt")]) == 0
    return made


def numbers(value: Any, where: str = "") -> dict[str, float]:
    """Return the numbers of a result by their place, without those that say how it was computed."""
    found: dict[str, float] = {}
    if isinstance(value, dict):
        for name, part in value.items():
            if not any(word in name for word in SKIPPED):
                found |= numbers(part, f"{where}/{name}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            found |= numbers(part, f"{where}/{i}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found[where] = float(value)
    return found


def test_training_on_the_device_is_that_on_the_cpu(folder: Path) -> None:
    there, here = (load_checkpoint(folder / f"{name}.pt").build().state_dict() for name in ("a", "b"))
    for name, expected in here.items():
        torch.testing.assert_close(there[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_command_gives_the_numbers_of_the_cpu(command: str, folder: Path) -> None:
    results, name = [], "c" if command == "flatness" else "a"  # it needs thousands of forward passes
    for device in ("cpu", "cuda"):
        options = [*COMMANDS[command], "--device", device, "--tag", device, "--memory", "1"]
        assert cli.run([command, str(folder / f"{name}.pt"), *options]) == 0
        results.append(numbers(json.loads((folder / f"{name}.{device}.{command}.json").read_text())))
    here, there = results
    assert here.keys() == there.keys()
    assert len(here) > 20
    for place, expected in here.items():
        assert there[place] == pytest.approx(expected, rel=5e-3, abs=1e-4, nan_ok=True), place


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.extended] if i >= SHORT else []) for i, n in enumerate(ANALYSES)]
)
def test_an_analysis_gives_the_numbers_of_the_cpu(name: str, folder: Path, tmp_path: Path) -> None:
    results = []
    for device in ("cpu", "cuda"):
        options = [*ONE, *ANALYSES[name], "--device", device, "--out", str(tmp_path / device)]
        assert cli.run(["spectrum", str(folder / "c.pt"), *options]) == 0
        results.append(numbers(json.loads((tmp_path / device / "c.spectrum.json").read_text())))
    here, there = results
    assert here.keys() == there.keys()
    for place, expected in here.items():
        assert there[place] == pytest.approx(expected, rel=5e-3, abs=1e-4, nan_ok=True), place


def test_results_of_both_devices_are_compared_and_a_checkpoint_is_described(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    spectra = [str(folder / f"a.{device}.spectrum.json") for device in ("cpu", "cuda")]  # of the test before
    assert cli.run(["compare", *spectra, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert cli.run(["info", str(folder / "a.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_command_runs_on_the_device_of_its_number(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    run = ["spectrum", str(folder / "c.pt"), "--samples", "16", "--top", "1", "--smallest", "0", "--no-density"]
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    for device in ("cpu", "cuda:1"):
        assert cli.run([*run, "--device", device, "--out", str(tmp_path / device)]) == 0
    assert torch.cuda.current_device() == 1
    assert torch.cuda.max_memory_allocated(0) == before
    here, there = (
        json.loads((tmp_path / device / "c.spectrum.json").read_text())["spectra"]["ggn"]["eigenvalues"][0]["value"]
        for device in ("cpu", "cuda:1")
    )
    assert there == pytest.approx(here, rel=1e-4)
    message = f"--device cuda:99: PyTorch finds {torch.cuda.device_count()} CUDA device(s): use cuda:0 to cuda:"
    fails(capsys, 2, message, *run, "--device", "cuda:99")


@pytest.mark.parametrize(
    ("phase", "call"),
    [("hessian: eigenvalues", 5), pytest.param("ggn: trace", 2, marks=pytest.mark.extended)],
)
def test_an_interrupted_run_resumes_on_the_device_bit_for_bit(
    folder: Path, tmp_path: Path, phase: str, call: int
) -> None:
    run = ["spectrum", str(folder / "a.pt"), *FAST, "--device", "cuda", "--memory", "1", "--out", str(tmp_path)]
    interrupted(run, phase, call)
    assert cli.run([*run, "--resume"]) == 0
    equal(tmp_path / "a", folder / "a.cuda.x")
