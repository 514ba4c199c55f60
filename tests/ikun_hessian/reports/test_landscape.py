"""Tests of the screen of a landscape."""

from __future__ import annotations

import dataclasses

import pytest
from landscape_tools import made, many, measured, not_finite, with_accuracy, without_relaxed

from hessian_tools.results.landscape import Line
from ikun_hessian.reports.landscape import landscape_lines, rises

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def test_the_screen_holds_the_numbers_and_says_what_they_mean() -> None:
    for result in (measured(), made(), without_relaxed(), not_finite(), many()):
        screen = landscape_lines(result)
        assert max(map(len, screen)) <= 80
    screen = landscape_lines(made())
    assert len(screen) <= 32
    (row,) = [line.split() for line in screen if line.startswith("negative")]
    second = 2 * 0.2**2 / (0.2 * 0.5) ** 2
    assert row == ["negative", "0.05", "0.01", "0.01", "-3", "0.5", f"{second:.2g}", f"{second / 2:.2g}", "both", "0"]
    text = " ".join(" ".join(screen).split())
    for part in (
        "piecewise constant",
        "The relaxed network is a different network",
        "Along negative, v'Hv < 0 but the true loss",
        "random1,random2: minimum at (0.17, 0); relaxed at (0.17, 0)",
        "loss 0.1, accuracy 90.00%; relaxed network: 0.2",
    ):
        assert part in text
    text = " ".join(" ".join(landscape_lines(without_relaxed())).split())
    assert "No relaxed network: surrogate fast_sigmoid:25 has area 0.08" in text
    assert "a different network" not in text
    text = " ".join(" ".join(landscape_lines(with_accuracy())).split())
    assert "at -e and e: top1 96.0% and 96.0%" in text


@pytest.mark.parametrize(("below", "above", "expected"), [(2, 3, "both"), (0, 3, "+"), (2, 1, "-"), (1, 1, "no")])
def test_the_sides_on_which_the_loss_rises_are_named(below: float, above: float, expected: str) -> None:
    found = Line("top1", 1, 1, 0, 0, True, (-1.0, 0.0, 1.0), (below, 1, above), (), (), ())
    assert rises(found) == expected
    assert found.second_difference(found.loss) == below + above - 2


def test_eigenvectors_that_did_not_converge_are_named() -> None:
    lines = (dataclasses.replace(made().lines[0], converged=False), *made().lines[1:])
    assert "Not converged: top1." in " ".join(landscape_lines(made(lines=lines)))
