"""Tests of conditions as the user writes them, and of what a study compares by default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ikun_hessian.experiments.selection import parse_condition, parse_conditions, study_defaults


def write(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    record = {"schema": "ikun-hessian/study/1", "by": "batch-size", "accuracy": 0.8, "runs": {}, **changes}
    (folder / "study.json").write_text(json.dumps(record))
    return folder


def test_conditions_have_the_names_of_train_options() -> None:
    assert [parse_condition(word) for word in ("data", "batch-size", "init", "weight_decay")] == [
        "name", "batch_size", "init", "weight_decay",
    ]  # fmt: skip
    assert parse_conditions(["data=digits", "batch-size=64", "name=a-b", "coding"]) == [
        "name=digits", "batch_size=64", "name=a-b", "coding",
    ]  # fmt: skip


def test_a_study_compares_what_it_varies(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    (one / "runs").mkdir()
    assert study_defaults([one]) == study_defaults([one / "runs"]) == ("batch_size", 0.8)
    assert study_defaults([tmp_path, one]) == ("batch_size", 0.8)
    assert study_defaults([one, write(tmp_path / "two", by="data")]) == (None, 0.8)
    assert study_defaults([one, write(tmp_path / "two", accuracy=0.5)]) == ("batch_size", None)
    assert study_defaults([]) == study_defaults([tmp_path, tmp_path / "none"]) == (None, None)
    assert study_defaults([one / "study.json"]) == (None, None)


@pytest.mark.parametrize("change", [{"schema": "x"}, {"by": 3}, {"accuracy": "x"}, {"accuracy": 90}])
def test_a_damaged_record_says_nothing(tmp_path: Path, change: dict[str, object]) -> None:
    assert study_defaults([write(tmp_path, **change)]) == (None, None)


@pytest.mark.parametrize("accuracy", [0, None])
def test_an_impossible_accuracy_is_refused(tmp_path: Path, accuracy: float | None) -> None:
    assert study_defaults([write(tmp_path, accuracy=accuracy)]) == ("batch_size", None)
