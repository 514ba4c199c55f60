"""JSON output, and the error of a failed computation."""

from __future__ import annotations

import json
from typing import Any


class FailedError(Exception):
    """The computation failed, but the command line was correct (exit code 1)."""


def dumps(value: Any) -> str:
    """Serialize to JSON, with null for numbers that are not finite."""
    from hessian_tools.io.json import clean

    return json.dumps(clean(value))
