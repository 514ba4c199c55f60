"""Tests of the loss along lines and planes, against closed forms."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from figure_tools import collisions
from landscape_tools import FEW, PROVENANCE, measured, spiking
from objectives import objective_on, quadratic
from result_tools import untimed
from torch import Tensor

from hessian_tools.analysis.context import AnalysisError
from hessian_tools.analysis.landscape import LandscapeSettings, landscape, random_direction
from hessian_tools.io import json as results
from hessian_tools.objective import Objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import ggn, hessian
from hessian_tools.perturbation import accuracy, mean_loss, noise, outputs_at
from hessian_tools.plots.landscape import landscape_figure
from hessian_tools.results.landscape import LANDSCAPE_SCHEMA, LandscapeResult
from hessian_tools.resume import Phases
from ikun_hessian.reports.landscape import landscape_lines

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def on_weights(w: Tensor, loss: Callable[[Tensor], Tensor]) -> Objective:
    """The loss [N] of the outputs [N, P], mean over one sample."""
    return objective_on(w, lambda o, y: loss(o).mean(), torch.zeros(1, dtype=w.dtype))


def problem(definite: bool = False) -> tuple[Tensor, Tensor]:
    """A symmetric A [12, 12], indefinite unless asked for, and weights [12]."""
    generator = torch.Generator().manual_seed(3)
    b = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    a = b @ b.T if definite else b + b.T
    return a, torch.randn(12, dtype=torch.float64, generator=generator)


@pytest.fixture(name="measured", scope="module")
def _measured() -> LandscapeResult:
    return measured()


# what is computed


@pytest.mark.parametrize("reach", [None, 0.3])
def test_curves_of_a_quadratic_are_the_closed_form(reach: float | None) -> None:
    a, w = problem()
    result = landscape(quadratic(a, w), dataclasses.replace(FEW, range=reach))
    vectors = torch.linalg.eigh(a)[1]
    z = noise(quadratic(a, w), 0, 0), noise(quadratic(a, w), 0, 2)
    gradient, norm = a @ w, float(w.norm())
    expected = {
        "top1": vectors[:, -1],
        "top2": vectors[:, -2],
        "negative": vectors[:, 0],
        "gradient": gradient,
        "random1": z[0].sign() * w.abs(),  # in a vector every entry is a filter
        "random2": z[1].sign() * w.abs(),
    }
    assert [line.name for line in result.lines] == list(expected)
    for found in result.lines:
        v = expected[found.name] / expected[found.name].norm()
        if not found.name.startswith("random"):
            v = v * (v @ gradient).sign()
            assert found.slope >= 0
        h, g, far = float(v @ a @ v), float(v @ gradient), reach or (0.5 if "random" in found.name else 0.05)
        t = np.array(found.distances)
        assert t == pytest.approx(far * norm * np.linspace(-1, 1, 9), abs=1e-14)
        assert found.loss == pytest.approx(float(w @ a @ w) / 2 + g * t + h * t**2 / 2, rel=1e-4)
        assert (found.hessian, found.ggn, found.slope) == pytest.approx((h, h, g), rel=1e-3, abs=1e-6)
        assert found.second_difference(found.loss) == pytest.approx(h, rel=1e-3)
        assert found.converged
        assert math.isnan(found.residual) == (found.name not in ("top1", "top2", "negative"))
        assert found.relaxed_loss == ()
    assert result.weight_norm == pytest.approx(norm)
    assert result.gradient_norm == pytest.approx(float(gradient.norm()))
    assert math.isnan(result.relaxed_loss)
    plane = result.planes[1]
    assert plane.directions == ("top1", "negative")
    u, v = (expected[name] * (expected[name] @ gradient).sign() for name in plane.directions)
    for i, t in enumerate(plane.distances):
        for j, s in enumerate(plane.distances):
            x = w + s * u + t * v
            assert plane.loss[i][j] == pytest.approx(float(x @ a @ x) / 2, rel=1e-4)
    assert plane.cosine == pytest.approx(0, abs=1e-9)
    assert result.planes[0].cosine == pytest.approx(float((z[0].sign() * z[1].sign()) @ w.square() / w.square().sum()))


def test_second_differences_of_the_relaxed_loss_are_its_curvature() -> None:
    """As the range shrinks; the true loss is constant there."""
    objective, relaxed = spiking(), spiking(relaxed=True)
    result = landscape(objective, dataclasses.replace(FEW, planes=(), range=1e-5), relaxed=relaxed)
    matrix, surrogate = dense(hessian(relaxed)), dense(hessian(objective))
    vectors = torch.linalg.eigh(surrogate)[1]
    gradient = objective.value_and_gradient()[1]
    expected = {"top1": vectors[:, -1], "negative": vectors[:, 0], "gradient": gradient / gradient.norm()}
    expected |= {f"random{k}": random_direction(objective, 0, k) for k in (1, 2)}
    found = {line.name: line for line in result.lines}
    for name, v in expected.items():
        curvature = found[name].second_difference(found[name].relaxed_loss)
        assert curvature == pytest.approx(float(v @ matrix @ v), rel=1e-3, abs=1e-6)
        assert found[name].hessian == pytest.approx(float(v @ surrogate @ v), rel=1e-3, abs=1e-7)
        assert found[name].ggn == pytest.approx(float(v @ dense(ggn(objective)) @ v), rel=1e-3, abs=1e-7)
        assert len(set(found[name].loss)) == 1
        assert found[name].loss[0] == result.loss
    assert result.relaxed_loss == pytest.approx(relaxed.value_and_gradient()[0])
    assert result.relaxed_loss != pytest.approx(result.loss, rel=1e-3)


def test_the_middle_row_and_column_of_a_plane_are_lines() -> None:
    settings = LandscapeSettings(
        directions=(), planes=(("random1", "random2"), ("gradient", "top1")), points=9, plane_points=5, range=0.2
    )
    result = landscape(spiking(dtype=torch.float32), settings, relaxed=spiking(relaxed=True, dtype=torch.float32))
    lines = {line.name: line for line in result.lines}
    assert list(lines) == ["random1", "random2", "gradient", "top1"]
    for plane in result.planes:
        first, second = (lines[name] for name in plane.directions)
        assert plane.distances == first.distances[::2]
        assert plane.loss[2] == first.loss[::2]
        assert tuple(row[2] for row in plane.loss) == second.loss[::2]
        assert plane.relaxed_loss[2] == first.relaxed_loss[::2]
        assert tuple(row[2] for row in plane.relaxed_loss) == second.relaxed_loss[::2]
    assert lines["top1"].loss[4] == lines["random1"].loss[4] == result.loss
    assert lines["top1"].relaxed_loss[4] == result.relaxed_loss
    assert len(set(lines["random1"].loss)) > 1


def test_a_plane_of_two_ranges_takes_the_smaller() -> None:
    result = landscape(quadratic(*problem()), LandscapeSettings((), (("top1", "random1"),), points=3, plane_points=3))
    assert result.planes[0].distances[-1] == pytest.approx(0.05 * result.weight_norm)
    assert result.lines[1].distances[-1] == pytest.approx(0.5 * result.weight_norm)


def test_filters_of_a_random_direction_have_the_norms_of_the_weights() -> None:
    objective = spiking(model="csnn", channels=2, input_shape=(1, 4, 4), hidden=())
    d = random_direction(objective, 0, 1)
    assert d.dtype == torch.float64
    assert float(d.norm()) == pytest.approx(1)
    z = objective.split(noise(objective, 0, 0))
    scale = float(objective.weights().norm())
    for p, found, drawn in zip(objective.parameters.values(), objective.split(scale * d), z, strict=True):
        weights, got, normal = (t.detach().numpy() for t in (p, found, drawn))
        for i in range(len(weights)):
            wanted = normal[i] / np.sqrt((normal[i] ** 2).sum()) * np.sqrt((weights[i] ** 2).sum())
            assert got[i] == pytest.approx(wanted, abs=1e-12)
    same, other, seed = (random_direction(objective, *key) for key in ((0, 1), (0, 2), (1, 1)))
    assert torch.equal(same, d)
    assert max(abs(float(d @ other)), abs(float(d @ seed))) < 0.5


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_scaled_loss_gives_the_scaled_landscape(scale: float) -> None:
    a, w = problem()
    before, after = (landscape(quadratic(a, w, scale=s), FEW) for s in (1.0, scale))
    for x, y in zip(before.lines, after.lines, strict=True):
        for name in ("hessian", "ggn", "slope"):
            assert getattr(y, name) == pytest.approx(scale * getattr(x, name), rel=1e-6, abs=1e-6 * scale)
        assert y.loss == pytest.approx(scale * np.array(x.loss), rel=1e-6)
    assert after.refused == {}


def test_accuracies_are_measured_on_request(measured: LandscapeResult) -> None:
    objective, w = spiking(), spiking().weights()
    (found,) = [line for line in measured.lines if line.name == "random1"]
    v = random_direction(objective, 0, 1)
    outputs = list(outputs_at(objective, lambda t: w + t * v, found.distances))
    assert found.accuracy == tuple(accuracy(objective, o) for o in outputs)
    assert found.loss == tuple(mean_loss(objective, o) for o in outputs)
    assert len(found.relaxed_accuracy) == 9
    assert measured.accuracy == found.accuracy[4]
    bare = landscape(objective, FEW)
    assert {line.accuracy for line in bare.lines} == {()}


def test_a_saved_landscape_loads_unchanged(measured: LandscapeResult, tmp_path: Path) -> None:
    results.save_result(measured, tmp_path / "a.json")
    loaded = results.load_result(tmp_path / "a.json", LandscapeResult, LANDSCAPE_SCHEMA)
    assert results.clean(dataclasses.asdict(loaded)) == results.clean(dataclasses.asdict(measured))
    assert loaded.planes == measured.planes
    raw = json.loads((tmp_path / "a.json").read_text())
    assert raw["schema"] == "ikun-hessian/landscape/1"
    assert raw["data"]["samples"] == 24
    assert raw["settings"]["planes"] == [["random1", "random2"], ["top1", "negative"]]
    assert raw["lines"][5]["residual"] is None


class StoppedError(Exception):
    pass


PARTS = ["eigenvalues", "v'Gv", "line top2", "plane random1,random2"]


@pytest.mark.parametrize("part", PARTS)
def test_an_interruption_in_any_part_is_resumed_to_the_same_result(
    part: str, measured: LandscapeResult, tmp_path: Path
) -> None:
    settings = LandscapeSettings(**{**vars(FEW), "accuracy": True})
    calls: list[str] = []

    def stop(name: str, done: int, total: int, worst: float) -> None:
        calls.append(name)
        if calls.count(part) == 2:
            raise StoppedError

    def analyse(**more: Any) -> LandscapeResult:
        state = Phases(tmp_path / "state", {"a": 1})
        return landscape(
            spiking(), settings, relaxed=spiking(relaxed=True), provenance=PROVENANCE, phases=state, **more
        )

    with pytest.raises(StoppedError):
        analyse(progress=stop)
    assert untimed(analyse()) == untimed(measured)


def test_progress_ends_at_all_that_was_expected() -> None:
    shown: list[tuple[str, int, int]] = []
    result = landscape(
        quadratic(*problem()), FEW, progress=lambda name, done, total, _: shown.append((name, done, total))
    )
    assert shown[-1][0] == "plane top1,negative"
    assert shown[-1][1] == shown[-1][2] == result.products + result.evaluations
    assert result.evaluations == 6 * 9 + 2 * 25


# what cannot be had


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": ("top1", "up")}, "unknown direction 'up'"),
        ({"directions": ("top0",)}, "unknown direction 'top0'"),
        ({"directions": ("top",)}, "unknown direction 'top'"),
        ({"planes": (("top1", "sideways"),)}, "unknown direction 'sideways'"),
        ({"planes": (("top1", "top1"),)}, "two different directions"),
        ({"directions": (), "planes": ()}, "no direction"),
        ({"points": 40}, "points must be odd"),
        ({"points": 1}, "points must be odd and at least 3"),
        ({"points": -3}, "points must be odd and at least 3"),
        ({"plane_points": 20}, "plane points must be odd"),
        ({"range": 0.0}, "range must be a positive number"),
        ({"range": 1e-170}, "range must be a positive number from 1e-06 to 1e\\+06"),
        ({"range": 1e160}, "range must be a positive number from 1e-06 to 1e\\+06"),
        ({"range": -1.0}, "range must be a positive number"),
        ({"range": math.nan}, "range must be a positive number"),
        ({"range": math.inf}, "range must be a positive number"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LandscapeSettings(**changes)


def test_a_network_without_gradient_is_drawn_in_random_directions() -> None:
    """Neurons too far from firing for a surrogate of bounded support."""
    objective = spiking(surrogate="triangle:0.01", threshold=1e3)
    result = landscape(objective, FEW, provenance=PROVENANCE)
    assert [line.name for line in result.lines] == ["random1", "random2"]
    assert [plane.directions for plane in result.planes] == [("random1", "random2")]
    assert "gradient is 0" in result.refused["gradient"]
    assert {"Hessian is 0" in result.refused[name] for name in ("top1", "top2", "negative")} == {True}
    assert result.refused["plane top1,negative"] == "direction top1 is not available"
    assert {y for line in result.lines for y in line.loss} == {result.loss}
    screen = landscape_lines(result)
    assert [line for line in screen if line.startswith("! No gradient: the surrogate gradient is 0")]
    assert collisions(landscape_figure(result)) == []
    with pytest.raises(ValueError, match="nothing to draw: gradient: the surrogate gradient is 0"):
        landscape(objective, LandscapeSettings(("gradient",), ()))


def test_no_negative_direction_where_nothing_is_negative() -> None:
    result = landscape(quadratic(*problem(definite=True)), FEW)
    assert "is not negative" in result.refused["negative"]
    assert [plane.directions for plane in result.planes] == [("random1", "random2")]


def test_eigenvectors_that_do_not_exist_are_left_out() -> None:
    a, w = problem()
    few = quadratic(a[:2, :2], w[:2])
    result = landscape(few, LandscapeSettings(("top1", "top2", "top3", "negative"), (), points=3))
    assert result.refused["top3"] == "there are only 2 eigenvalues"
    values = torch.linalg.eigvalsh(a[:2, :2])
    assert [line.hessian for line in result.lines][:2] == pytest.approx(values.flip(0).tolist())
    assert ("negative" in result.refused) == bool(values[0] >= 0)


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="all weights are 0"):
        landscape(quadratic(problem()[0], torch.zeros(12, dtype=torch.float64)), FEW)


def test_a_loss_that_is_not_finite_at_the_weights_is_refused() -> None:
    with pytest.raises(AnalysisError, match="at these weights"):
        landscape(on_weights(problem()[1], lambda o: o.sum(1).log() * math.nan), FEW)


def test_a_loss_that_is_not_finite_elsewhere_is_kept(tmp_path: Path) -> None:
    """log of the first weight, which is 1: it does not exist beyond distance 1 to one side."""
    objective = on_weights(torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64), lambda o: o.log().sum(1))
    result = landscape(objective, dataclasses.replace(FEW, range=3.0), provenance=PROVENANCE)
    assert any(math.isnan(y) for line in result.lines for y in line.loss)
    assert result.loss == pytest.approx(math.log(4))
    results.save_result(result, tmp_path / "a.json")
    loaded = results.load_result(tmp_path / "a.json", LandscapeResult, LANDSCAPE_SCHEMA)
    assert collisions(landscape_figure(loaded)) == []
    assert landscape_lines(loaded)


def test_an_operator_that_is_not_a_hessian_is_refused() -> None:
    class Twisted(torch.autograd.Function):
        """A value of 0 whose gradient is a rotation: no Hessian's."""

        @staticmethod
        def forward(ctx: Any, o: Tensor) -> Tensor:
            ctx.save_for_backward(o)
            return o[:, 0] * 0

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (o,) = ctx.saved_tensors
            return g[:, None] * torch.stack([o[:, 1], -o[:, 0]], 1)

    with pytest.raises(AnalysisError, match="not symmetric"):
        landscape(on_weights(torch.tensor([1.0, 2.0]), Twisted.apply), LandscapeSettings(("top1",), ()))


# the figure


# the screen
