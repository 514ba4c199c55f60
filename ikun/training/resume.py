"""The state of an interrupted training run: read it and compare its settings with those of the run that resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ikun.checkpoint import CheckpointError, read_plain
from ikun.data.spec import DataSpec
from ikun.networks import Spec
from ikun.training.spec import TrainingSpec

NO_STATE = "not the state of an interrupted run: delete this file and start again"


def read_resume(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read the state of an interrupted run.

    Args:
        path: The file of the state.
        settings: The settings of this run: "network", "data" and "training", each a dict of plain values.

    Returns:
        The state, with at least "network", "optimizer", "epoch", "history", "best" and "stopped".

    Raises:
        CheckpointError: If there is no such file, it is not a state, or the interrupted run had other settings.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise CheckpointError(f"{path}: not a regular file: remove it and start again")
    if not path.exists():
        raise CheckpointError(f"{path}: no interrupted run to resume: start a new one")
    state = read_plain(path)
    known = state.get("settings")
    if (
        not isinstance(known, dict)
        or {"network", "optimizer", "epoch", "history", "best", "stopped"} - set(state)
        or not all(isinstance(known.get(part), dict) for part in settings)
    ):
        raise CheckpointError(f"{path}: {NO_STATE}")
    for part, default in (("network", Spec()), ("data", DataSpec()), ("training", TrainingSpec())):
        had = {**dataclasses.asdict(default), **known[part]}  # an older version may have had fewer settings
        for key, value in settings[part].items():
            if had.get(key) != value:
                raise CheckpointError(
                    f"{path}: the interrupted run had {key} {had.get(key)!r}, not {value!r}: "
                    "resume with the original settings, or delete this file and start again"
                )
    return state
