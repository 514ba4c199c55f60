"""Fixtures of the tests of commands and studies.

Tests may add files with a tag beside the trained networks, and must not change the files that are there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from command_tools import FAST
from run_tools import make_study

import cli
from ikun_hessian.experiments.comparison.comparison import compare_runs
from ikun_hessian.experiments.comparison.result import Comparison
from ikun_hessian.experiments.runs import TrainingRun


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options = ["--channels", "2", "--epochs", "2", "--subset", "200", "--snapshots", "1", "--lr", "0.01"]
    assert cli.run(["train", *options, "--out", str(folder / "a.pt")]) == 0
    assert cli.run(["train", *options, "--init", "kaiming", "--out", str(folder / "b.pt")]) == 0
    return folder


@pytest.fixture(scope="session")
def analysed(trained: Path) -> Path:
    assert cli.run(["spectrum", str(trained / "a.pt"), str(trained / "b.pt"), *FAST]) == 0
    return trained


@pytest.fixture(scope="module")
def runs() -> list[TrainingRun]:
    """Made-up runs of three initializers and six seeds."""
    return make_study()


@pytest.fixture(scope="module")
def found(runs: list[TrainingRun]) -> Comparison:
    return compare_runs(runs)
