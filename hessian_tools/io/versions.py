"""Versions of everything that can change a number."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence

PACKAGES = ("torch", "numpy", "scipy", "numba", "triton", "ikun-hessian")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the version of Python and of each installed package, by name.

    If the environment variable MKL_CBWR is set, its value is the entry "MKL_CBWR": on some processors it decides
    whether MKL gives the same bits whatever the alignment of its arrays.
    """
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # optional, or run from a source checkout
            found[name] = importlib.metadata.version(name)
    if mode := os.environ.get("MKL_CBWR"):
        found["MKL_CBWR"] = mode
    return found
