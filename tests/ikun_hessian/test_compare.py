"""The command compare: what it refuses."""

from __future__ import annotations

from pathlib import Path

from command_tools import FAST, SHIPPED, Capture, fails

import cli


def test_compare_refuses_what_was_not_measured_alike(analysed: Path, capsys: Capture) -> None:
    path = str(analysed / "b.pt")
    assert cli.run(["spectrum", path, *FAST, "--samples", "50", "--no-density", "--tag", "few"]) == 0
    fails(
        capsys,
        2,
        "number of samples differs, 96",
        "compare",
        str(analysed / "a.pt"),
        str(analysed / "b.few.spectrum.json"),
    )
    fails(capsys, 2, "at least two", "compare", path)
    fails(capsys, 2, "cannot be read", "compare", path, str(analysed / "none.pt"))
    fails(capsys, 2, "no *.spectrum.json", "compare", str(SHIPPED / "..") + "/ikun")
