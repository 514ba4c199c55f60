"""Names of result files."""

from __future__ import annotations

from pathlib import Path


def result_stem(path: Path, out: Path | None, tag: str | None, kind: str) -> Path:
    """Where the results of a checkpoint go, less the endings: OUT/NAME[.TAG].KIND."""
    name = ".".join([path.stem, *([tag] if tag else []), kind])
    return (out or path.parent) / name
