"""Compile the Triton kernels for GPUs ahead of time, and read their machine code. No GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernels

ROOT = Path(__file__).parents[3]
CASE = kernels.Case("fp32")

pytest.importorskip("triton", reason="Triton is not installed")
compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None, reason="this Triton has no compiler for CUDA"
)


def table(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark, with warnings of Triton as errors."""
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "benchmarks" / "kernels.py"), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@compiles
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--quick", "--arch", "80", "90"], id="quick"),
        pytest.param([], id="all", marks=pytest.mark.extended),
    ],
)
def test_kernels_compile_without_spills_and_spikes_without_fused_multiply_adds(options: list[str]) -> None:
    done = table(*options)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if re.match(r"\| (value|tangent|adjoint)", line)]
    assert len(rows) == (8 if options else 4 * len(kernels.CASES))
    assert all(len(row) == (4 if options else 6) and all(int(cell.split()[0]) > 16 for cell in row[2:]) for row in rows)


@compiles
def test_fused_multiply_adds_are_found_in_machine_code() -> None:
    code = """
import os, sys
os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, sys.argv[1])
from benchmarks import kernels
from ikun.kernels import triton_kernels
triton_kernels.EXACT = triton_kernels.FUSED
print(kernels.wrong({("value", kernels.CASES[0], 90): kernels.compiled("value", kernels.CASES[0], 90)}))
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert re.search(r"value \(float32\) on sm_90 has [1-9][0-9]* fused multiply-adds", done.stdout), done.stderr


def test_spills_are_told() -> None:
    found = {
        ("adjoint", CASE, 80): kernels.Compiled(64, kernels.SPILLS + 1, 9),
        ("value", CASE, 90): kernels.Compiled(32, 2, 0),
    }
    assert kernels.wrong(found) == ["adjoint (float32) on sm_80 has 5 spills, more than 4"]
    assert "| value | float32 | 32 (spills: 2) |" in kernels.table({("value", CASE, 90): found["value", CASE, 90]})
