"""Members of large families of tests that run by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], n: int) -> list[Any]:
    """Return the values as parameters of a test. All but every n-th are marked `extended`."""
    return [v if i % n == 0 else pytest.param(v, marks=pytest.mark.extended) for i, v in enumerate(values)]
