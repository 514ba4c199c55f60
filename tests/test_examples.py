"""Run every script of examples/ as a user does, in its own process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_tools import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EXPECTED = {
    "compare_two": ("digits-csnn-kaiming: loss", "scaled", "compare-two.pdf"),
    "during_training": ("GGN lambda_max", "    0  ", "    6  "),
    "events_to_figure": ("test accuracy", "hessian: lambda_max", "events.spectrum.png"),
    "own_torch_model": ("hessian: trace", "residual", "digits-mlp.spectrum.json"),
    "spikingjelly_network": ("surrogate: exact", "hessian:", "ggn:"),
}


def test_every_example_is_known() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(EXPECTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    if path.stem.startswith("spikingjelly") and importlib.util.find_spec("spikingjelly") is None:
        pytest.skip("needs SpikingJelly")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(path), str(tmp_path)]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in EXPECTED[path.stem]:
        assert words in done.stdout
    for word in done.stdout.rpartition("written:")[2].split() if "written:" in done.stdout else []:
        assert (tmp_path / word).stat().st_size > 0
