"""Tests of the number of cores that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hessian_tools.runtime.cores import available_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system of a machine on whose cores 0 to 7 this process may run, of 64."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    return tmp_path


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_without_control_groups_the_affinity_counts(machine: Path) -> None:
    assert available_cores(machine) == 8


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 8),
        ("300000 100000", 3),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 8),
        ("", 8),
    ],
)
@pytest.mark.parametrize("place", ["", "/jobs", "/jobs/7"])
def test_the_quota_of_a_group_or_of_one_that_contains_it(machine: Path, limit: str, cores: int, place: str) -> None:
    groups = {f"sys/fs/cgroup{p}/cpu.max": "max 100000" for p in ("", "/jobs", "/jobs/7")}
    write(machine, {"proc/self/cgroup": "0::/jobs/7", **groups, f"sys/fs/cgroup{place}/cpu.max": limit})
    assert available_cores(machine) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("200000", 2)])
def test_control_groups_of_version_1(machine: Path, quota: str, cores: int) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/a",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": quota,
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
        },
    )
    assert available_cores(machine) == cores


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "::::", "0::/../../etc"])
def test_what_cannot_be_read_does_not_count(machine: Path, text: str) -> None:
    write(machine, {"proc/self/cgroup": text, "sys/fs/cgroup/cpu.max": "one two three"})
    assert available_cores(machine) == 8
