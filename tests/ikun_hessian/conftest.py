"""Two trained networks, and their spectra; tests leave them as they are and add only files with a tag."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_tools import FAST

import cli


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
