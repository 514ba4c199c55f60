"""Names of result files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ikun_hessian.jobs.errors import UsageError


def result_stem(path: Path, out: Path | None, tag: str | None, kind: str) -> Path:
    """Return the path of the results of a checkpoint without their endings: OUT/NAME[.TAG].KIND."""
    name = ".".join([path.stem, *([tag] if tag else []), kind])
    return (out or path.parent) / name


def result_stems(paths: Sequence[Path], out: Path | None, tag: str | None, kind: str) -> list[Path]:
    """Return `result_stem` of every checkpoint. Raise UsageError if two of them are the same."""
    stems = [result_stem(path, out, tag, kind) for path in paths]
    if twice := [stem for i, stem in enumerate(stems) if stem in stems[:i]]:
        raise UsageError(
            f"two checkpoints would both write {twice[0]}.json: rename one, or analyse it separately with another --out"
        )
    return stems
