"""Tests of extended.txt, the list of tests that do not run by default."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent


def test_what_is_listed_exists_once() -> None:
    listed = (TESTS / "extended.txt").read_text(encoding="utf-8").splitlines()
    assert listed == sorted(set(listed))
    for line in listed:
        path, _, name = line.partition("[")[0].partition("::")
        assert f"def {name}(" in (TESTS.parent / path).read_text(encoding="utf-8"), line
