"""Conditions as the user names them, by options of `train`, and the default comparison of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FIELDS = {"data": "name"}  # options of `train` that have another name in runs.TrainingRun


def parse_condition(word: str) -> str:
    """Return the condition of a run that an option of `train` sets: batch-size is batch_size, data is name."""
    return FIELDS.get(word, word.replace("-", "_"))


def parse_conditions(where: Sequence[str]) -> list[str]:
    """Replace KEY in each KEY=VALUE by the name of the condition."""
    return [parse_condition(key) + sign + value for key, sign, value in (text.partition("=") for text in where)]


@dataclass(frozen=True)
class _Study:
    """The part of study.json that says what is compared."""

    schema: str
    by: str
    accuracy: float


def study_defaults(paths: Sequence[Path]) -> tuple[str | None, float | None]:
    """Read which condition a study compares, and its target accuracy.

    Args:
        paths: Folders. Each is searched for a study.json, and then the folder above it.

    Returns:
        The condition and the accuracy, each None if no study.json is found or if several disagree. Damaged files are
        ignored.
    """
    from hessian_tools.io.json import ResultError, load_result
    from ikun_hessian.experiments.study.record import STUDY_SCHEMA

    found: list[_Study] = []
    for folder in (path for path in paths if path.is_dir()):
        for file in (folder / "study.json", folder / ".." / "study.json"):
            if file.is_file():
                try:
                    found.append(load_result(file, _Study, STUDY_SCHEMA))
                except ResultError:
                    continue
                break
    by, accuracy = {parse_condition(study.by) for study in found}, {study.accuracy for study in found}
    possible = len(accuracy) == 1 and 0 < min(accuracy) <= 1
    return by.pop() if len(by) == 1 else None, accuracy.pop() if possible else None
