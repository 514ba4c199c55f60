"""Freed memory is kept for the next tensors."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
{door}
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def tensors():
    return [torch.ones(2**20) for _ in range(40)]  # 160 MiB
tensors()
before = faults()
for _ in range(5):
    tensors()
print(faults() - before)
"""


def faults(door: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(door=door)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_tensors_use_the_pages_of_freed_ones() -> None:
    assert faults("import ikun_hessian") < 0.5 * faults("")  # the first use of pages varies
