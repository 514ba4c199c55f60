"""Lines and planes against closed forms, and the figure and the screen that are made of them."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from figure_tools import collisions, line, on_paper, said, words
from matplotlib.figure import Figure
from torch import Tensor, nn

from hessian_tools.analysis.context import AnalysisError
from hessian_tools.analysis.landscape import LandscapeSettings, landscape, random_direction
from hessian_tools.io import json as results
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import ggn, hessian
from hessian_tools.perturbation import accuracy, mean_loss, noise, outputs_at
from hessian_tools.plots import landscape as landscape_panels
from hessian_tools.plots.landscape import contour_levels, landscape_figure
from hessian_tools.results.landscape import LANDSCAPE_SCHEMA, LandscapeResult, Line, Plane
from hessian_tools.resume import Phases
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun_hessian.reports.landscape import landscape_lines, rises

FEW = LandscapeSettings(points=9, plane_points=5, memory=0.1)
PROVENANCE: dict[str, Any] = {
    "checkpoint": {"path": "/somewhere/ckpt.pt", "sha256": "0123456789abcdef"},
    "data": {"name": "digits", "split": "train", "loss": "mse"},
    "network": {
        "model": "csnn", "neuron": "if", "reset": "hard", "detach_reset": False, "surrogate": "atan:2", "timesteps": 4,
        "coding": "direct", "norm": "bn", "ties": "first",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Itself(nn.Module):
    """Outputs its weights [P]."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), *self.w.shape)


def on_weights(w: Tensor, loss: Callable[[Tensor], Tensor]) -> Objective:
    """The loss [N] of the outputs [N, P], mean over one sample."""
    data = torch.zeros(1, 1, dtype=w.dtype), torch.zeros(1, dtype=w.dtype)
    return make_objective(Itself(w), lambda o, y: loss(o).mean(), data)


def quadratic(a: Tensor, w: Tensor, scale: float = 1.0) -> Objective:
    return on_weights(w, lambda o: scale * ((o @ a.to(o.dtype)) * o).sum(1) / 2)


def problem(definite: bool = False) -> tuple[Tensor, Tensor]:
    """A symmetric A [12, 12], indefinite unless asked for, and weights [12]."""
    generator = torch.Generator().manual_seed(3)
    b = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    a = b @ b.T if definite else b + b.T
    return a, torch.randn(12, dtype=torch.float64, generator=generator)


def spiking(relaxed: bool = False, samples: int = 24, dtype: torch.dtype = torch.float64, **changes: Any) -> Objective:
    torch.manual_seed(5)
    spec = Spec(**{"model": "mlp", "hidden": (6,), "input_shape": (1, 3, 3), "classes": 3, **changes}, relaxed=relaxed)
    net = Network(spec)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(samples, 1, *spec.input_shape[1:], generator=generator), torch.arange(samples) % 3
    return make_objective(net, LOSSES["mse"], (x, y), batch_size=16, dtype=dtype)


@pytest.fixture(scope="module")
def measured() -> LandscapeResult:
    settings = dataclasses.replace(FEW, accuracy=True)
    return landscape(spiking(), settings, relaxed=spiking(True), provenance=PROVENANCE)


def plain(result: LandscapeResult) -> dict[str, Any]:
    """All that must not depend on the clock."""
    return {**results.clean(dataclasses.asdict(result)), "seconds": 0}


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
    objective, relaxed = spiking(), spiking(True)
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
    result = landscape(spiking(dtype=torch.float32), settings, relaxed=spiking(True, dtype=torch.float32))
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
    before, after = (landscape(quadratic(a, w, s), FEW) for s in (1.0, scale))
    for x, y in zip(before.lines, after.lines, strict=True):
        for name in ("hessian", "ggn", "slope"):
            assert getattr(y, name) == pytest.approx(scale * getattr(x, name), rel=1e-6, abs=1e-6 * scale)
        assert y.loss == pytest.approx(scale * np.array(x.loss), rel=1e-6)
    assert after.refused == {}


def test_accuracies_on_request(measured: LandscapeResult) -> None:
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


def test_saved_and_loaded(measured: LandscapeResult, tmp_path: Path) -> None:
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
def test_resumed_after_an_interruption_in_any_part(part: str, measured: LandscapeResult, tmp_path: Path) -> None:
    settings = LandscapeSettings(**{**vars(FEW), "accuracy": True})
    calls: list[str] = []

    def stop(name: str, done: int, total: int, worst: float) -> None:
        calls.append(name)
        if calls.count(part) == 2:
            raise StoppedError

    def analyse(**more: Any) -> LandscapeResult:
        state = Phases(tmp_path / "state", {"a": 1})
        return landscape(spiking(), settings, relaxed=spiking(True), provenance=PROVENANCE, phases=state, **more)

    with pytest.raises(StoppedError):
        analyse(progress=stop)
    assert plain(analyse()) == plain(measured)


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
        ({"range": -1.0}, "range must be a positive number"),
        ({"range": math.nan}, "range must be a positive number"),
        ({"range": math.inf}, "range must be a positive number"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
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
    assert result.refused["plane top1,negative"] == "there is no direction top1"
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


def test_more_eigenvectors_than_there_are() -> None:
    a, w = problem()
    few = quadratic(a[:2, :2], w[:2])
    result = landscape(few, LandscapeSettings(("top1", "top2", "top3", "negative"), (), points=3))
    assert result.refused["top3"] == "there are only 2 eigenvalues"
    values = torch.linalg.eigvalsh(a[:2, :2])
    assert [line.hessian for line in result.lines][:2] == pytest.approx(values.flip(0).tolist())
    assert ("negative" in result.refused) == bool(values[0] >= 0)


def test_weights_that_are_all_zero() -> None:
    with pytest.raises(ValueError, match="all weights are 0"):
        landscape(quadratic(problem()[0], torch.zeros(12, dtype=torch.float64)), FEW)


def test_a_loss_that_is_not_finite_at_the_weights() -> None:
    with pytest.raises(AnalysisError, match="at these weights"):
        landscape(on_weights(problem()[1], lambda o: o.sum(1).log() * math.nan), FEW)


def test_a_loss_that_is_not_finite_elsewhere(tmp_path: Path) -> None:
    """log of the first weight, which is 1: it does not exist beyond distance 1 to one side."""
    objective = on_weights(torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64), lambda o: o.log().sum(1))
    result = landscape(objective, dataclasses.replace(FEW, range=3.0), provenance=PROVENANCE)
    assert any(math.isnan(y) for line in result.lines for y in line.loss)
    assert result.loss == pytest.approx(math.log(4))
    results.save_result(result, tmp_path / "a.json")
    loaded = results.load_result(tmp_path / "a.json", LandscapeResult, LANDSCAPE_SCHEMA)
    assert collisions(landscape_figure(loaded)) == []
    assert landscape_lines(loaded)


def test_an_operator_that_is_no_hessian() -> None:
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


def made(scale: float = 1.0, **changes: Any) -> LandscapeResult:
    """A result of known curves: of the true loss .1 + x^2, of the relaxed network .2 + x^2 / 2."""

    def one(name: str, reach: float, curvature: float) -> Line:
        t = tuple((10 * reach * np.linspace(-1, 1, 21)).tolist())
        x = np.linspace(-1, 1, 21)
        true, soft = (tuple((scale * y).tolist()) for y in (0.1 + x**2, 0.2 + x**2 / 2))
        return Line(name, scale * curvature, scale * 0.5, scale * 0.01, 1e-6, True, t, true, soft, (), ())

    def two(first: str, second: str, reach: float, cosine: float = 0.0) -> Plane:
        x = np.linspace(-1, 1, 7)
        grid = 0.1 + (x[None] - 1 / 3) ** 2 + 3 * x[:, None] ** 2  # least beside the middle
        rows = tuple(tuple((scale * row).tolist()) for row in grid)
        return Plane((first, second), cosine, tuple((10 * reach * x).tolist()), rows, rows)

    base = LandscapeResult(
        schema=LANDSCAPE_SCHEMA,
        **PROVENANCE,
        training={},
        settings={"range": None},
        num_parameters=500,
        parameters={"fc.weight": 500},
        weight_norm=10.0,
        loss=scale * 0.1,
        relaxed_loss=scale * 0.2,
        accuracy=0.9,
        gradient_norm=0.1,
        dtype="float32",
        device="cpu",
        seed=7,
        symmetry_error=1e-7,
        lines=(
            *(one(name, 0.05, c) for name, c in (("top1", 4.0), ("top2", 2.0), ("negative", -3.0), ("gradient", 1.0))),
            *(one(f"random{k}", 0.5, 0.1) for k in (1, 2)),
        ),
        planes=(two("random1", "random2", 0.5), two("top1", "negative", 0.05)),
        refused={},
        products=40,
        evaluations=2256,
        seconds=1.0,
        versions={},
    )
    base = dataclasses.replace(base, data={**base.data, "samples": 1437})
    return dataclasses.replace(base, **changes)


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left").split("  ")[-1] for ax in figure.axes if ax.get_title(loc="left")]


def test_what_is_drawn() -> None:
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
        "is another one: its loss at w is 0.2", "piecewise constant", "ckpt.pt (sha256 01234567)",
        "digits, train, 1437 samples", "seed 7", "P = 500", "Hessian's quadratic", "least on the grid",
    ):  # fmt: skip
        assert part in text
    assert "right angles" not in text


def test_contours_are_logarithmic_and_the_same_in_all_planes() -> None:
    levels, norm = contour_levels([[[1.0, 10.0], [100.0, 1000.0]], [[0.1, math.nan]]])
    assert levels[[0, -1]] == pytest.approx([0.1, 1000])
    assert np.diff(np.log(levels)) == pytest.approx(np.full(12, math.log(1e4) / 12))
    assert (norm.vmin, norm.vmax) == (0.1, 1000)
    levels, norm = contour_levels([[[-1.0, 2.0]]])
    assert np.diff(levels) == pytest.approx(np.full(12, 0.25))
    for nothing in ([[[3.0, 3.0]]], [[[math.nan]]]):
        assert len(contour_levels(nothing)[0]) == 0


def without_relaxed() -> LandscapeResult:
    lines = tuple(dataclasses.replace(line, relaxed_loss=()) for line in made().lines)
    planes = tuple(dataclasses.replace(plane, relaxed_loss=()) for plane in made().planes)
    reason = {"relaxed network": "surrogate fast_sigmoid:25 has area 0.08, not 1: it has no relaxed network"}
    return made(lines=lines, planes=planes, relaxed_loss=math.nan, refused=reason)


def with_accuracy() -> LandscapeResult:
    x = np.linspace(-1, 1, 21)
    return made(lines=tuple(dataclasses.replace(line, accuracy=tuple((1 - x**2).tolist())) for line in made().lines))


def flat() -> LandscapeResult:
    lines = tuple(dataclasses.replace(line, loss=(0.1,) * 21, relaxed_loss=(0.1,) * 21) for line in made().lines)
    rows = ((0.1,) * 7,) * 7
    return made(lines=lines, planes=(dataclasses.replace(made().planes[0], loss=rows, relaxed_loss=rows),))


def not_finite() -> LandscapeResult:
    nan = (math.nan,) * 21
    lines = (dataclasses.replace(made().lines[0], loss=nan, relaxed_loss=nan), *made().lines[1:])
    rows = ((math.nan,) * 7,) * 7
    planes = (dataclasses.replace(made().planes[0], loss=rows), made().planes[1])
    return made(lines=lines, planes=planes)


def oblique() -> LandscapeResult:
    return made(planes=(dataclasses.replace(made().planes[0], directions=("gradient", "top1"), cosine=0.61),))


def many() -> LandscapeResult:
    lines = tuple(dataclasses.replace(made().lines[0], name=f"top{k}") for k in range(1, 13))
    return made(lines=lines, planes=made().planes * 4)


CASES: dict[str, tuple[Callable[[], LandscapeResult], str]] = {
    "no relaxed network": (without_relaxed, "true loss"),
    "accuracy": (with_accuracy, "accuracy (right axis)"),
    "flat": (flat, "the loss is 0.1 everywhere"),
    "not finite": (not_finite, "no finite loss"),
    "oblique": (oblique, "Not at right angles, cosine of gradient and eigenvector 1 0.61."),
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


# the screen


def test_screen(measured: LandscapeResult) -> None:
    for result in (measured, made(), without_relaxed(), not_finite(), many()):
        screen = landscape_lines(result)
        assert max(map(len, screen)) <= 80
    screen = landscape_lines(made())
    assert len(screen) <= 32
    (row,) = [line.split() for line in screen if line.startswith("negative")]
    second = 2 * 0.2**2 / (0.2 * 0.5) ** 2
    assert row == ["negative", "0.05", "0.01", "0.01", "-3", "0.5", f"{second:.2g}", f"{second / 2:.2g}", "both", "0"]
    text = " ".join(" ".join(screen).split())
    for part in (
        "piecewise constant", "The relaxed network is another one", "Along negative v'Hv < 0, yet the true loss",
        "random1,random2: least at (0.17, 0); relaxed at (0.17, 0)", "loss 0.1, accuracy 90.00%; 0.2 of the relaxed",
    ):  # fmt: skip
        assert part in text
    text = " ".join(" ".join(landscape_lines(without_relaxed())).split())
    assert "No relaxed network: surrogate fast_sigmoid:25 has area 0.08" in text
    assert "another one" not in text
    text = " ".join(" ".join(landscape_lines(with_accuracy())).split())
    assert "at -e and e: top1 96.0% and 96.0%" in text


@pytest.mark.parametrize(("below", "above", "expected"), [(2, 3, "both"), (0, 3, "+"), (2, 1, "-"), (1, 1, "no")])
def test_sides_on_which_the_loss_rises(below: float, above: float, expected: str) -> None:
    found = Line("top1", 1, 1, 0, 0, True, (-1.0, 0.0, 1.0), (below, 1, above), (), (), ())
    assert rises(found) == expected
    assert found.second_difference(found.loss) == below + above - 2


def test_not_converged_is_said() -> None:
    lines = (dataclasses.replace(made().lines[0], converged=False), *made().lines[1:])
    assert "Not converged: top1." in " ".join(landscape_lines(made(lines=lines)))
