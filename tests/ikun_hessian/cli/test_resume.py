"""Tests of the command spectrum when it is interrupted, killed or out of space, and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_tools import FAST, KILL, ROOT, Capture, equal, fails, interrupted

import cli

PHASES = ["symmetry", "eigenvalues", "density", "trace", "error from the data", "scale-free"]


@pytest.mark.parametrize(
    ("phase", "call"), [*((f"hessian: {p}", c) for p in PHASES for c in (1, 2)), ("ggn: density", 9)]
)
def test_a_run_interrupted_in_any_phase_resumes_to_the_same_file(
    analysed: Path, tmp_path: Path, phase: str, call: int, capsys: Capture
) -> None:
    """Stopped at the beginning or in the middle of a phase, resumed: the same arrays as without the interruption."""
    part = ["spectrum", str(analysed / "a.pt"), *FAST, "--out", str(tmp_path)]
    interrupted(part, phase, call)
    assert cli.run([*part, "--resume"]) == 0
    equal(tmp_path / "a", analysed / "a")
    assert not list(tmp_path.glob("*.resume*"))


@pytest.mark.parametrize(
    ("phase", "call", "name"),
    [
        ("hessian: eigenvalues", 9, "SIGKILL"),
        ("hessian: density", 5, "SIGKILL"),
        ("hessian: slope x 2", 3, "SIGTERM"),
        ("ggn: trace", 2, "SIGKILL"),
    ],
)
def test_a_killed_run_resumes_to_the_same_file(
    analysed: Path, tmp_path: Path, phase: str, call: int, name: str
) -> None:
    part = ["spectrum", str(analysed / "a.pt"), *FAST, "--out", str(tmp_path)]
    script = KILL.format(phase=phase, call=call, signal=name)
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the run it is compared with
    killed = subprocess.run([sys.executable, "-c", script, *part], cwd=ROOT, env=one, capture_output=True, text=True)
    if name == "SIGKILL":
        assert killed.returncode == -signal.SIGKILL
    else:
        assert killed.returncode == 130
        assert killed.stderr.splitlines()[-1] == "Interrupted. Run the same command with --resume to continue."
    assert (tmp_path / "a.spectrum.resume").exists()
    assert not (tmp_path / "a.spectrum.json").exists()
    assert cli.run([*part, "--resume"]) == 0
    equal(tmp_path / "a", analysed / "a")
    assert not list(tmp_path.glob("*.resume*"))


def test_resuming_with_changed_settings_is_refused(analysed: Path, tmp_path: Path, capsys: Capture) -> None:
    for file in ("a", "b"):
        shutil.copy(analysed / f"{file}.pt", tmp_path)
    part = ["spectrum", str(tmp_path / "a.pt"), *FAST]
    interrupted(part, "hessian: density", 1)
    fails(capsys, 2, "an interrupted analysis. Use --resume", *part)
    fails(capsys, 2, "the settings changed since", *part, "--seed", "3", "--resume")
    fails(capsys, 2, "(--resume with the same settings, or --force)", *part, "--samples", "90", "--resume")
    shutil.copy(tmp_path / "a.pt", tmp_path / "kept.pt")
    shutil.copy(tmp_path / "b.pt", tmp_path / "a.pt")
    fails(capsys, 2, "the checkpoint", *part, "--resume")
    shutil.copy(tmp_path / "kept.pt", tmp_path / "a.pt")
    assert cli.run([*part, "--resume"]) == 0
    equal(tmp_path / "a", analysed / "a")
    before = (tmp_path / "a.spectrum.json").read_bytes()
    assert cli.run([*part, "--resume"]) == 0  # nothing left to do
    assert (tmp_path / "a.spectrum.json").read_bytes() == before


def test_a_full_disk_loses_nothing(analysed: Path, tmp_path: Path, capsys: Capture) -> None:
    """With files limited to 20 kB the run ends with one line, and it resumes once there is room."""
    part = ["spectrum", str(analysed / "a.pt"), *FAST, "--out", str(tmp_path)]
    script = (
        "import resource, signal, sys, cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "sys.exit(cli.run(sys.argv[1:]))"
    )
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = subprocess.run([sys.executable, "-c", script, *part], cwd=ROOT, env=one, capture_output=True, text=True)
    assert full.returncode == 2
    last = full.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "a.spectrum.resume" in last
    assert "File too large" in last
    assert cli.run([*part, "--resume"]) == 0
    equal(tmp_path / "a", analysed / "a")
