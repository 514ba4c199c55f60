"""Tests of the figure of a landscape."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from figure_tools import collisions, line, on_paper, said, words
from landscape_tools import made, many, not_finite, with_accuracy, without_relaxed
from matplotlib.figure import Figure

from hessian_tools.plots import landscape as landscape_panels
from hessian_tools.plots.landscape import contour_levels, landscape_figure
from hessian_tools.results.landscape import LandscapeResult

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left").split("  ")[-1] for ax in figure.axes if ax.get_title(loc="left")]


def test_curves_and_planes_are_drawn_from_the_result() -> None:
    result = made()
    figure = landscape_figure(result)
    assert titles(figure) == [
        "eigenvector 1", "eigenvector 2", "most negative eigenvector", "gradient", "random 1", "random 2",
        "true loss", "relaxed", "true loss", "relaxed",
    ]  # fmt: skip
    for ax, found in zip(figure.axes, result.lines, strict=False):
        x, y = line(ax, "true")
        assert x == pytest.approx(np.array(found.distances) / 10)
        assert y.tolist() == list(found.loss)
        assert line(ax, "relaxed")[1].tolist() == list(found.relaxed_loss)
        for name, curvature in (("hessian", found.hessian), ("ggn", found.ggn)):
            x, y = line(ax, name)
            assert y == pytest.approx(0.1 + 0.01 * 10 * x + curvature * (10 * x) ** 2 / 2)
        at, y = line(ax, "step")
        assert at.tolist() == pytest.approx([-x[-1] / 5, x[-1] / 5])
        assert y == pytest.approx(0.1 + 0.2**2)
        assert ax.get_ylim() == figure.axes[0].get_ylim()
        assert ax.get_ylim()[0] < 0.1 < 1.1 < ax.get_ylim()[1]
        e = found.distances[12]
        assert f"L″ = {2 * 0.2**2 / e**2:.2g}" in ax.texts[0].get_text()
    assert "v′Hv = −3" in figure.axes[2].texts[0].get_text()
    for ax, reach in zip(figure.axes[6:10], (0.5, 0.5, 0.05, 0.05), strict=True):
        assert ax.get_aspect() == 1
        assert ax.get_xlim() == ax.get_ylim() == pytest.approx((-reach, reach))
        assert [part.tolist() for part in line(ax, "weights")] == [[0], [0]]
        least = [float(part[0]) for part in line(ax, "least")]
        assert least == pytest.approx([reach / 3, 0])
    text = said(figure).replace("\n", " ")
    for part in (
        "‖w‖ = 10", "second difference of the true loss at the circles", "point uphill", "filter-normalized",
        "It is a different network: its loss at w is 0.2", "piecewise constant", "ckpt.pt (sha256 01234567)",
        "digits, train, 1437 samples", "seed 7", "P = 500", "quadratic of the Hessian", "smallest loss on the grid",
    ):  # fmt: skip
        assert part in text
    assert "not orthogonal" not in text


def test_contours_are_logarithmic_and_the_same_in_all_planes() -> None:
    levels, norm = contour_levels([[[1.0, 10.0], [100.0, 1000.0]], [[0.1, math.nan]]])
    assert levels[[0, -1]] == pytest.approx([0.1, 1000])
    assert np.diff(np.log(levels)) == pytest.approx(np.full(12, math.log(1e4) / 12))
    assert (norm.vmin, norm.vmax) == (0.1, 1000)
    levels, norm = contour_levels([[[-1.0, 2.0]]])
    assert np.diff(levels) == pytest.approx(np.full(12, 0.25))
    for nothing in ([[[3.0, 3.0]]], [[[math.nan]]]):
        assert len(contour_levels(nothing)[0]) == 0


def flat() -> LandscapeResult:
    lines = tuple(dataclasses.replace(line, loss=(0.1,) * 21, relaxed_loss=(0.1,) * 21) for line in made().lines)
    rows = ((0.1,) * 7,) * 7
    return made(lines=lines, planes=(dataclasses.replace(made().planes[0], loss=rows, relaxed_loss=rows),))


def oblique() -> LandscapeResult:
    return made(planes=(dataclasses.replace(made().planes[0], directions=("gradient", "top1"), cosine=0.61),))


CASES: dict[str, tuple[Callable[[], LandscapeResult], str]] = {
    "no relaxed network": (without_relaxed, "true loss"),
    "accuracy": (with_accuracy, "accuracy (right axis)"),
    "flat": (flat, "the loss is 0.1 everywhere"),
    "not finite": (not_finite, "no finite loss"),
    "oblique": (oblique, "Directions that are not orthogonal: cosine of gradient and eigenvector 1 0.61."),
    "one line": (lambda: made(lines=made().lines[2:3], planes=()), "most negative eigenvector"),
    "two lines, one plane": (lambda: made(lines=made().lines[4:], planes=made().planes[:1]), "random 2"),
    "four lines": (lambda: made(lines=made().lines[:4], planes=()), "gradient"),
    "three planes": (lambda: made(planes=(*made().planes, made().planes[0])), "(l)"),
    "many": (many, "(27)"),
    "no provenance": (lambda: made(checkpoint={}, network={}, data={}), "P = 500"),
    "small losses": (lambda: made(1e-12), "loss"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_landscape_can_be_read(case: str) -> None:
    make, message = CASES[case]
    figure = landscape_figure(make())
    text = said(figure).replace("\n", " ").replace(r"$\mathbf{", "").replace("}$", "")
    assert message in text
    assert collisions(figure) == []
    assert min(float(t.get_fontsize()) for t in words(figure)) >= 7
    assert figure.get_size_inches()[0] == 7


@pytest.mark.parametrize("scale", [1e-12])
def test_scaling_the_loss_only_relabels_the_figure(scale: float) -> None:
    before, after = landscape_figure(made()), landscape_figure(made(scale))
    for a, b in zip(before.axes[:10], after.axes[:10], strict=True):
        assert on_paper(b) == pytest.approx(on_paper(a), abs=1e-6)


def test_the_figure_needs_no_torch() -> None:
    tree = ast.parse(Path(str(landscape_panels.__file__)).read_text(encoding="utf-8"))
    body = [node for node in tree.body if not isinstance(node, ast.If)]  # but for types
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.split(".")[0] in ("torch", "ikun") or "pyplot" in name}
    assert "hessian_tools.analysis.landscape" not in names
