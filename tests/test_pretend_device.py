"""Run the tests that need a GPU on the pretend device (tests/pretend_device), each group in a process of its own.

The kernels are run by numba in the tensors' own memory, because Triton's interpreter is slow. It runs a few cases.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SMALL = "a_training_gradient or (replayed and hessian-fields1) or current_one"
GROUPS: dict[str, list[str]] = {
    "refusals": ["tests/pretend_device/refusals.py"],
    "products": [
        "tests/test_gpu.py",
        "tests/hessian_tools/linalg/test_lanczos.py",
        "tests/hessian_tools/analysis/operator_spectrum/test_pyhessian.py",
        "tests/ikun/data/test_datasets.py",
        "-m",
        "gpu and not extended",
    ],
    "networks": ["tests/test_gpu_networks.py"],
    "commands": ["tests/test_gpu_commands.py"],
    "triton": ["tests/test_gpu.py", "-k", SMALL],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a real device")
@pytest.mark.parametrize("group", list(GROUPS))
def test_tests_of_the_gpu_pass_on_the_pretend_device(group: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PRETEND_KERNELS": "triton" if group == "triton" else "numba",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-m", "pytest", "-p", "pretend_device.plugin", "-n", "0", "-q", *GROUPS[group]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 3, done.stdout[-2000:]
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE)
    assert all("could not import" in line for line in skipped), skipped  # a library that is not installed
