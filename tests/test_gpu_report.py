"""Tests of `benchmarks/gpu.py --all`: a run on the pretend device with small sizes, and parts that fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.gpu_report import Output, Part, failure, plain, runner

ROOT = Path(__file__).parents[1]
SIZES = ["--rounds", "1", "--channels", "2", "--steps", "2", "--batch", "4", "--size", "64", "--checkpoints", "1"]
SPECTRUM = "--samples 16 --top 1 --smallest 0 --no-density --params fc2*"


def report(python: str, out: Path, tests: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "benchmarks/gpu.py", "--all", "--out", str(out), "--python", python, *SIZES]
    command += ["--spectrum", SPECTRUM, "--tests", tests]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_small_report_on_the_pretend_device(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "report.md"
    done = report(f"{sys.executable} -m pretend_device", out, "tests/test_gpu.py::test_no_tf32_in_a_product")
    text = out.read_text()
    assert done.returncode == 1, done.stdout + done.stderr  # there is no such test
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1] for line in text.splitlines() if "passed |" in line}
    assert set(rows) == {"Machine", "Products", "CPU and GPU", "Registers of the kernels"}, text
    assert "cuda:1 Pretend" in text
    assert "| Hessian product |" in text
    assert "| digits-csnn-ikun | cuda |" in text
    assert "| adjoint_tangent | float32, pooled, static |" in text
    assert "| Tests | FAILED |" in text
    assert "not found" in text


def test_without_a_device_every_part_says_so_and_the_report_is_written(tmp_path: Path) -> None:
    """Python that fails at once stands for what may go wrong in every part."""
    out = tmp_path / "report.md"
    done = report(f"{sys.executable} -S -E", out, "tests")  # without any installed package
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all("is not installed" in line for line in lines[:-1]), lines
    assert out.read_text().count("FAILED") == 5


def test_a_part_that_takes_too_long_is_ended() -> None:
    run = runner([sys.executable], time.monotonic() + 100)
    found = run("-c", "import time; print('begun', flush=True); time.sleep(60)", limit=1)
    assert found.code is None
    assert plain("Part", found) == Part("Part", False, "ended after 1 s", "```text\nbegun\n```", found.seconds)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (Output(1, "ModuleNotFoundError: No module named 'pyhessian'", 1), "left out: pyhessian is not installed"),
        (Output(1, "/usr/bin/python3: No module named pytest", 1), "left out: pytest is not installed"),
        (Output(2, "a\nb: wrong\n", 1), "failed (exit code 2): b: wrong"),
        (Output(-11, "", 1), "failed (exit code -11)"),
    ],
)
def test_a_failure_is_told_in_one_line(output: Output, reason: str) -> None:
    assert failure(output) == reason


def test_values_that_differ_are_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = iter([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.1, 4.0]])
    monkeypatch.setattr(gpu_report, "_values", lambda file: next(values))
    part = gpu_report.comparison(lambda *arguments, limit: Output(0, "", 1.0), [tmp_path / "a.pt"], [])
    assert not part.passed
    assert part.summary == "largest relative difference 3.3e-02"
