"""Test that the workers of a study end soon after its leader was killed, at whatever moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_tools import ROOT

PRESET = """
title = "T"
by = "init"
seeds = 3
[train]
channels = 2
epochs = 100000
subset = 64
[vary]
init = ["ikun", "kaiming"]
"""


def children(pid: int) -> set[int]:
    """The processes that a process started, on Linux."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return {int(word) for task in tasks for word in (task / "children").read_text().split()}
    except OSError:
        return set()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("delay", [0.0, 0.7, 1.5])
def test_workers_of_a_killed_study_end_also_while_they_import(delay: float, tmp_path: Path) -> None:
    """Importing torch takes seconds. The leader dies meanwhile, and a training of hours would begin without it."""
    (tmp_path / "long.toml").write_text(PRESET)
    words = [sys.executable, "-m", "ikun_hessian", "study", "long.toml", "--jobs", "2", "--out", "s"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, **quiet) as leader:  # type: ignore[call-overload]
        end = time.monotonic() + 120
        while len(workers := children(leader.pid)) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(delay)
        workers |= children(leader.pid)
        leader.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    end = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
