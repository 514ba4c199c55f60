"""What commands print."""

from __future__ import annotations

import json
from typing import Any


class FailedError(Exception):
    """The computation failed through no fault of the command line: exit code 1."""


def dumps(value: Any) -> str:
    """JSON with null for what is not finite."""
    from hessian_tools.io.json import clean

    return json.dumps(clean(value))
