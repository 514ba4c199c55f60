"""How many cores this process may use. This module is for the time before torch loads."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use, at least 1.

    That is the number in its affinity mask, or the quota of its control group (cgroup version 1 or 2), rounded down,
    if that is smaller. Containers and batch systems set either.

    Args:
        root: The root of the file system.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(min([float(cores), *_quotas(root)]))))


def _quotas(root: Path) -> list[float]:
    """Return the quotas, in cores, of the control groups of this process and of the groups that contain them."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path, *_ = *line.split(":", 2), "", "", ""
        folder = root / "sys/fs/cgroup" / ("cpu" if "cpu" in kinds.split(",") else "")
        if kinds and "cpu" not in kinds.split(","):
            continue
        place = folder / path.lstrip("/")
        for each in (place, *place.parents):
            if not each.is_relative_to(folder):
                break
            quota, period = _text(each / "cpu.cfs_quota_us"), _text(each / "cpu.cfs_period_us")
            words = [quota, period] if kinds else _text(each / "cpu.max").split()
            found.append(_cores(words))
    return found


def _cores(words: list[str]) -> float:
    """Return quota / period, or infinity where there is no quota."""
    try:
        quota, period = (float(word) for word in words)
    except ValueError:
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
