"""Tests of the command spectrum under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_tools import KILL, ROOT

import cli
from hessian_tools.results.spectrum import load_spectrum


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_with_a_line(trained: Path, tmp_path: Path) -> None:
    """torchrun with two gloo ranks, of which rank 1 kills itself in the density; --resume ends as one process does."""
    common = [
        "spectrum",
        str(trained / "a.pt"),
        "--samples",
        "40",
        "--top",
        "2",
        "--smallest",
        "0",
        "--dtype",
        "float64",
    ]
    common += ["--batch-size", "16", "--operator", "hessian", "--steps", "8", "--out", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "dying.py"
    dying = KILL.format(phase="hessian: density", call=5, signal="SIGKILL")
    script.write_text(dying.replace("if calls ==", 'if os.environ["RANK"] == "1" and calls =='))
    one = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = {"cwd": ROOT, "env": one, "capture_output": True, "text": True}
    died = subprocess.run([*launch, str(script), *common], **run)  # type: ignore[call-overload]
    assert died.returncode != 0
    lines = [line for line in died.stderr.splitlines() if "rank 0 of 2" in line]
    assert len(lines) == 1, died.stderr
    assert "--resume" in lines[0]
    assert (tmp_path / "two/a.spectrum.resume").exists()
    resumed = subprocess.run([*launch, str(ROOT / "cli.py"), *common, "--resume"], **run)  # type: ignore[call-overload]
    assert resumed.returncode == 0, resumed.stderr
    common[-1] = str(tmp_path / "one")
    assert cli.run(common) == 0
    found, expected = (load_spectrum(tmp_path / f"{n}/a.spectrum.json").spectra["hessian"] for n in ("two", "one"))
    assert [e.value for e in found.eigenvalues] == pytest.approx([e.value for e in expected.eigenvalues], rel=1e-9)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(trained: Path, tmp_path: Path) -> None:
    """torchrun with two gloo ranks: the eigenvalues of one process."""
    common = [
        "spectrum",
        str(trained / "a.pt"),
        "--samples",
        "60",
        "--top",
        "4",
        "--smallest",
        "2",
        "--dtype",
        "float64",
    ]
    common += ["--batch-size", "16", "--no-density", "--operator", "hessian", "--json"]
    assert cli.run([*common, "--out", str(tmp_path / "one")]) == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "cli.py"),
    ]
    two = subprocess.run(
        [*torchrun, *common, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0, two.stderr
    found = json.loads(two.stdout)["spectra"]["hessian"]
    expected = json.loads((tmp_path / "one/a.spectrum.json").read_text())["spectra"]["hessian"]
    norm = max(abs(e["value"]) for e in expected["eigenvalues"])
    for kind in ("eigenvalues", "smallest_eigenvalues"):
        for a, b in zip(found[kind], expected[kind], strict=True):
            assert a["value"] == pytest.approx(b["value"], abs=1e-10 * norm)
