"""Find results of weights that their checkpoint does not have any more, because it was trained again or replaced."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from hessian_tools.io.json import ResultError


class StaleError(ResultError):
    """A result was measured at other weights than its checkpoint has now."""


def refuse_stale(file: Path, checkpoint: Mapping[str, Any]) -> None:
    """Compare the SHA-256 that a result recorded with that of its checkpoint, if the checkpoint can be found.

    A checkpoint next to the result decides. Otherwise, because the result may have been written with --out, those at
    the recorded path do; a relative path is also followed from the folders that contain the result. The result is
    accepted if one of them has the recorded weights, or if there is none.

    Args:
        file: The file of the result.
        checkpoint: The field `checkpoint` of the result, with "path" and "sha256".

    Raises:
        StaleError: If files are found, and all of them have other weights.
    """
    recorded, path = checkpoint.get("sha256"), PurePath(str(checkpoint.get("path", "")))
    if not path.name or not isinstance(recorded, str) or not re.fullmatch("[0-9a-f]{64}", recorded):
        return
    beside = file.parent / path.name
    above = [] if path.is_absolute() else Path(os.path.abspath(file)).parents
    places = [beside] if _digest_of(beside) else [Path(path), *(folder / path for folder in above)]
    found = {place: digest for place in places if (digest := _digest_of(place))}
    if found and recorded not in found.values():
        command = file.name.removesuffix(".json").rpartition(".")[2]
        raise StaleError(
            f"{file}: not of the weights that {next(iter(found))} has now: it was trained again or replaced. Run "
            f"`ikun-hessian {command}` on it again, or put the checkpoint of this result next to it"
        )


def _digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, or "" if there is no such file or it cannot be read."""
    try:
        if not path.is_file():
            return ""
        found = path.stat()
        return _digest(path, found.st_ino, found.st_size, found.st_mtime_ns)
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return ""


@functools.lru_cache(4096)
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
