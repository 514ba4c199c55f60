"""Results without their wall time, so that two of them can be compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hessian_tools.io.json import clean


def untimed(result: Any) -> dict[str, Any]:
    """The fields of a result with `seconds` set to 0."""
    return {**clean(dataclasses.asdict(result)), "seconds": 0}


def numbers(path: Path) -> dict[str, Any]:
    """The content of a result's file without `seconds`."""
    raw: dict[str, Any] = json.loads(path.read_text())
    return {key: value for key, value in raw.items() if key != "seconds"}
