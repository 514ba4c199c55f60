"""Tests of the figures of several landscapes, and of surfaces."""

from __future__ import annotations

import numpy as np
import pytest
from figure_tools import collisions, said
from landscape_tools import made, not_finite, without_relaxed

from hessian_tools.plots.landscapes import landscapes_figure, surfaces_figure

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def test_all_networks_share_axes_levels_and_one_legend() -> None:
    found = [("one", made()), ("two", made(2.0)), ("three", without_relaxed())]
    figure = landscapes_figure(found)
    lines, planes = figure.axes[:6], figure.axes[6:12]
    assert len({ax.get_ylim() for ax in lines}) == 1
    for ax in lines:
        solid = [line for line in ax.lines if line.get_linestyle() == "-"]
        assert [line.get_ydata()[10] for line in solid] == pytest.approx([0.1, 0.2, 0.1])
        assert len(ax.lines) == 5  # two of them relaxed
    assert [ax.get_title(loc="left").split("  ")[-1] for ax in planes] == ["one", "two", "three"] * 2
    levels = {tuple(np.round(ax.collections[0].levels, 9)) for ax in planes}  # type: ignore[attr-defined]
    assert len(levels) == 1
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two", "three", "relaxed network"]
    assert "1437 samples" in said(figure)
    assert collisions(figure) == []


def test_directions_that_not_all_have_are_left_out() -> None:
    figure = landscapes_figure([("one", made()), ("two", made(lines=made().lines[:2], planes=()))])
    assert len(figure.axes) == 2
    with pytest.raises(ValueError, match="no direction in common"):
        landscapes_figure([("one", made(lines=made().lines[:1])), ("two", made(lines=made().lines[1:]))])


def test_surfaces_share_one_height_and_colour_scale() -> None:
    figure = surfaces_figure([("one", made()), ("two", made(2.0))])
    axes = [ax for ax in figure.axes if ax.name == "3d"]
    assert [ax.get_title(loc="left").split("  ")[-1] for ax in axes] == ["one", "two"] * 2
    assert len({ax.get_zlim() for ax in axes}) == 1  # type: ignore[attr-defined]
    alone = surfaces_figure([("one", made())])
    titles = [ax.get_title(loc="left").split("  ")[-1] for ax in alone.axes if ax.name == "3d"]
    assert titles == ["true loss", "relaxed network"] * 2
    for found in (not_finite(), without_relaxed()):
        surfaces_figure([("odd", found)])
    with pytest.raises(ValueError, match="no plane"):
        surfaces_figure([("one", made(planes=()))])
