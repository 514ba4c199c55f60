"""Tests of the progress over all phases of an analysis."""

import math

from hessian_tools.progress import Meter


def test_sums_over_phases_and_corrects_the_expected_number():
    seen = []
    meter = Meter({"a": 10, "b": 5}, lambda *event: seen.append(event))
    step = meter.phase("a")
    step(1, 20, 0.5)
    assert seen[-1] == ("a", 1, 25, 0.5)
    meter.finish("a", 8)
    assert seen[-1][:3] == ("a", 8, 13)
    assert math.isnan(seen[-1][3])
    meter.phase("b")(2, 1000, math.nan)  # no more than a bound: the guess stands
    assert seen[-1][:3] == ("b", 10, 13)
    meter.phase("b")(5, 5, math.nan)
    assert seen[-1][:3] == ("b", 13, 13)


def test_an_unforeseen_phase_adds_to_both():
    seen = []
    meter = Meter({}, lambda *event: seen.append(event))
    meter.phase("x")(3, 7, 0.1)
    assert seen == [("x", 3, 7, 0.1)]


def test_nothing_is_reported_without_a_listener():
    Meter({"a": 1}).phase("a")(1, 1, 0.0)
