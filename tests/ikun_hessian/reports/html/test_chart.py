"""Tests of the charts: places of numbers, ticks, and what is cut."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from hessian_tools.plots.curves import ValueAxis
from ikun_hessian.reports.html.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    PixelScale,
    SvgChart,
    chosen_axis,
    linear_ticks,
)

AXES = [ValueAxis("linear", -1, 3), ValueAxis("log", 0.01, 100), ValueAxis("symlog", -10, 10, 0.1)]


@pytest.mark.parametrize("axis", AXES, ids=lambda a: a.kind)
def test_limits_are_at_the_ends_and_the_middle_is_between(axis: ValueAxis) -> None:
    scale = PixelScale(axis, 100, 0)
    assert (scale(axis.low), scale(axis.high)) == pytest.approx((100, 0))
    middle = {"linear": 1.0, "log": 1.0, "symlog": 0.0}[axis.kind]
    assert scale(middle) == pytest.approx(50)


def test_a_logarithmic_axis_has_no_place_for_zero() -> None:
    assert math.isnan(PixelScale(AXES[1], 0, 1)(0.0))


@pytest.mark.parametrize("low", [-3e5, -1.0, 0.0, 1e-9, 0.37, 12.0])
@pytest.mark.parametrize("span", [0.11, 7.0, 3.3e6])
def test_linear_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    ticks = linear_ticks(low, low + span)
    assert 2 <= len(ticks) <= 7
    assert low - 1e-9 * span <= ticks[0]
    assert ticks[-1] <= low + span * (1 + 1e-9)
    step = ticks[1] - ticks[0]
    assert f"{step:.6e}"[0] in "125"
    assert np.diff(ticks) == pytest.approx(step)


@pytest.mark.parametrize(("low", "high"), [(0.06, 0.2), (0.15, 1.3), (0.003, 2.0), (1e-7, 1e3), (0.9, 1.1)])
def test_logarithmic_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = PixelScale(ValueAxis("log", low, high), 0, 1).ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low <= t <= high * (1 + 1e-9) for t in ticks)


def test_symlog_ticks_hold_zero_and_are_apart() -> None:
    scale = PixelScale(AXES[2], 0, 300)
    ticks = scale.ticks()
    assert 0.0 in ticks
    assert {10.0, -10.0} <= set(ticks)
    assert min(np.diff([scale(t) for t in ticks])) > 20


def test_axes_of_odd_values() -> None:
    for values in ([], [math.nan], [2.0], [0.0, 0.0], [1.0, math.inf]):
        axis = chosen_axis(values)
        assert axis.low < axis.high
    assert chosen_axis([3, 3], kind="linear") == ValueAxis("linear", 2.5, 3.5)


def test_marks_are_at_their_numbers_and_lines_break_at_nan() -> None:
    chart = SvgChart("a <title>", ValueAxis("linear", 0, 4), ValueAxis("linear", 0, 1), "x", "y")
    chart.line([0, 1, 2, 3, 4], [0, 1, math.nan, 0.5, 0.5], 3)
    chart.point(4, 1, 9, "two\nlines")
    chart.bar(0, -5, 5, 0)
    svg = chart.svg()
    assert "a &lt;title&gt;" in svg
    (path,) = re.findall(r'<path d="([^"]+)" class="l c3"/>', svg)
    assert re.findall("[ML]", path) == ["M", "L", "M", "L"]
    assert path.startswith(f"M{LEFT:.1f} {HEIGHT - BOTTOM:.1f}")
    circle = f'<circle cx="{WIDTH - RIGHT:.1f}" cy="{TOP:.1f}" r="3" class="p c1" data-tip="two\nlines"/>'
    assert circle in svg
    assert f'y1="{HEIGHT - BOTTOM:.1f}" y2="{TOP:.1f}" class="e c0"' in svg  # cut at the axes
