"""Versions of the software that can change numerical results."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence

PACKAGES = ("torch", "numpy", "scipy", "numba", "triton", "ikun-hessian")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the version of Python and of each installed package, by name.

    If the environment variable MKL_CBWR is set, its value is the entry "MKL_CBWR". On some processors it determines
    whether MKL gives bit-identical results for every alignment of its arrays.
    """
    found = {"python": platform.python_version()}
    for name in packages:  # a package may be optional, and a source checkout has no metadata
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if mode := os.environ.get("MKL_CBWR"):
        found["MKL_CBWR"] = mode
    return found
