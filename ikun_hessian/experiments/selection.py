"""Conditions as the user names them: the words of `train`, and what a study compares by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FIELDS = {"data": "name"}  # what runs.Run calls an option of `train`, where it is another word


def parse_condition(word: str) -> str:
    """The condition of a run that an option of `train` sets: batch-size is batch_size, data is name."""
    return FIELDS.get(word, word.replace("-", "_"))


def parse_conditions(where: Sequence[str]) -> list[str]:
    """KEY=VALUE each, with KEY as runs have it."""
    return [parse_condition(key) + sign + value for key, sign, value in (text.partition("=") for text in where)]


@dataclass(frozen=True)
class _Study:
    """study.json, as far as it says what is compared."""

    schema: str
    by: str
    accuracy: float


def study_defaults(paths: Sequence[Path]) -> tuple[str | None, float | None]:
    """(the condition compared, the accuracy) of the study.json in a given folder or the one above; None where there is
    none, where it is damaged, and where several disagree."""
    from hessian_tools.io.json import ResultError, load_result
    from ikun_hessian.experiments.study_record import STUDY_SCHEMA

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
