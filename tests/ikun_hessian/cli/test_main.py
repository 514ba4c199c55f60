"""Tests of exit codes, error lines, and the ways to start the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from command_tools import FAST, ROOT, SHIPPED, Capture, fails

import cli


def test_places_that_cannot_be_written_are_refused(trained: Path, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(
        capsys, 2, "choose another place", "spectrum", str(trained / "a.pt"), *FAST, "--out", str(tmp_path / "file/x")
    )
    fails(capsys, 2, "choose another place", "train", "--epochs", "0", "--out", str(tmp_path / "file" / "x.pt"))


def test_help_is_light_and_interruption_is_130(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    code = "import sys, cli; cli.run(['spectrum', '--help']); assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--smallest" in done.stdout

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hessian_tools.analysis.spectrum.spectrum", interrupted)
    assert cli.run(["spectrum", str(trained / "a.pt"), "--tag", "x"]) == 130


def test_computation_failures_are_exit_code_1(monkeypatch: pytest.MonkeyPatch, trained: Path, capsys: Capture) -> None:
    from hessian_tools.analysis.context import AnalysisError

    for error, message in ((AnalysisError("not symmetric"), "not symmetric"), (MemoryError(), "lower --batch-size")):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("hessian_tools.analysis.spectrum.spectrum", fail)
        fails(capsys, 1, message, "spectrum", str(trained / "a.pt"), "--tag", "x")


@pytest.mark.parametrize("start", [["ikun-hessian"], ["python", "-m", "ikun_hessian"]])
def test_files_of_the_same_names_in_the_working_directory_are_not_imported(tmp_path: Path, start: list[str]) -> None:
    """A user's own modules, first on the path, shadow nothing of ours and are not run."""
    for name in ("cli", "commands", "main", "options", "opening", "screen", "train", "spectrum", "info", "compare"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(99)\n")
    command = Path(sysconfig.get_path("scripts"), start[0])
    if not command.exists():
        pytest.skip("not installed")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for arguments, expected in ((["--help"], "spectrum"), (["info", str(SHIPPED / "digits-csnn-ikun.pt")], "forward")):
        line = [str(command), *start[1:], *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
