"""Tests of the short screens, of folders as arguments, and of errors that come before anything heavy is imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_tools import FAST, Capture, fails

import cli

EARLY = """
import sys
from ikun_hessian.cli.main import run
codes = [run(words.split()) for words in sys.argv[1:]]
assert codes == [2] * len(codes), codes
assert not {"torch", "scipy", "matplotlib"} & set(sys.modules)
"""


def test_mistakes_are_named_before_torch_is_imported(tmp_path: Path) -> None:
    given = [f"{command} {tmp_path}/missing.pt" for command in ("spectrum", "flatness", "landscape", "info")]
    given += [f"spectrum {tmp_path}", "spectrum x.pt --device cude", "spectrum x.pt --dtype float46", "spectrun x.pt"]
    given += ["train --init kaimng", "train --threads 0"]
    done = subprocess.run([sys.executable, "-c", EARLY, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == f"error: {tmp_path}/missing.pt: no such file"
    assert "a folder without checkpoints" in lines[4]
    assert "give auto, cpu, cuda or cuda:N" in lines[5]
    for line, word in zip(lines[6:9], ("float64", "spectrum", "kaiming"), strict=True):
        assert line.endswith(f"did you mean '{word}'?")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has the device")
def test_a_missing_device_is_named(analysed: Path, capsys: Capture) -> None:
    fails(
        capsys,
        2,
        "--device cuda:3: PyTorch finds no CUDA device",
        "spectrum",
        str(analysed / "a.pt"),
        "--device=cuda:3",
    )


def test_a_spectrum_is_shown_as_briefly_as_asked_for(analysed: Path, tmp_path: Path, capsys: Capture) -> None:
    for name in "ab":
        shutil.copy(analysed / f"{name}.pt", tmp_path)
        shutil.copy(analysed / f"{name}.spectrum.json", tmp_path)
    command = ["spectrum", str(tmp_path), *FAST, "--resume", "--threads", "1"]
    threads = torch.get_num_threads()

    def screen(*options: str) -> list[str]:
        capsys.readouterr()
        assert cli.run([*command, *options]) == 0
        return capsys.readouterr().out.splitlines()

    usual, full, brief = screen(), screen("--full"), screen("--brief")
    assert torch.get_num_threads() == threads
    first, second = (part.splitlines() for part in "\n".join(usual).split("-" * 80 + "\n"))
    assert max(len(first), len(second)) <= 12
    assert max(map(len, usual)) <= 80
    assert [line.split()[0] for line in first[:6]] == ["opened", "data", "curvature", "Hessian", "GGN", "spiking"]
    assert len(full) > 60
    assert len(brief) == 2
    assert "Hessian" in brief[0]
    assert screen("--quiet") == []
    assert screen("-v") == full
