"""Check the files of a command line before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

ENDINGS = (".pt", ".pth", ".safetensors", ".nir")  # of checkpoints in a folder


def checkpoint_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the checkpoints, with each folder replaced by the checkpoints in it, in the order of their names.

    Raises:
        click.UsageError: If a path does not exist, or a folder has no checkpoints.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix in ENDINGS and file.is_file())
            if not inside:
                raise click.UsageError(f"{path}: a folder without checkpoints ({', '.join(ENDINGS)})")
            found += inside
        elif not path.exists():
            raise click.UsageError(f"{path}: no such file")
        else:
            found.append(path)
    return tuple(dict.fromkeys(found))


def one_checkpoint(path: Path) -> Path:
    """Return the checkpoint, or the only one in a folder.

    Raises:
        click.UsageError: If the path does not exist, or is a folder with no or several checkpoints.
    """
    found = checkpoint_files([path])
    if len(found) > 1:
        raise click.UsageError(f"{path}: a folder with {len(found)} checkpoints: choose one of them")
    return found[0]
