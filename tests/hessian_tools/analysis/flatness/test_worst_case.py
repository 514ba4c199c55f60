"""Tests of worst-case sharpness against exact maxima over balls, and of its independence of the surrogate."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import objectives
import pytest
import torch
from draws import normal
from objectives import filled_objective
from scipy.optimize import brentq
from torch import Tensor, nn

from hessian_tools.analysis.flatness.worst_case import BALLS, at, m_sharpness, sam_sharpness, worst_case
from hessian_tools.objective import Objective, make_objective
from hessian_tools.seeding import stream

BALLS_IN_NORM = ("l2", "adaptive", "filter")
Loss = Callable[[Tensor, Tensor], Tensor]


class Remembering(nn.Module):
    """Outputs its weights for every sample, and remembers all weights it ever had, copies included."""

    visited: list[Tensor]

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.visited = Visited()

    def forward(self, x: Tensor) -> Tensor:
        self.visited.append(self.w.detach().clone())
        return self.w.expand(len(x), *self.w.shape)


class Visited(list[Tensor]):
    def __deepcopy__(self, memo: dict[int, Any]) -> Visited:
        return self


objective_on = functools.partial(objectives.objective_on, model=Remembering)


def expansion(a: Tensor, g: Tensor, w: Tensor, scale: float = 1.0) -> Objective:
    """L(w + d) = scale (2 + g'd + d'Ad / 2)."""

    def loss(o: Tensor, y: Tensor) -> Tensor:
        d = o - w
        return scale * (2 + (d @ g + (d @ a * d).sum(1) / 2).mean())

    return objective_on(w, loss)


def matrix(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))
    a: Tensor = q * eigenvalues @ q.T
    return a


def exact_maximum(a: Tensor, g: Tensor, radius: float) -> float:
    """max g'd + d'Ad / 2 over ||d|| <= radius, by the dense eigenvalues: (t I - A) d = g with t >= lambda_max, 0."""
    values, vectors = np.linalg.eigh(a.numpy())
    c = vectors.T @ g.numpy()

    def excess(t: float) -> float:
        return float(np.linalg.norm(c / (t - values))) - radius

    least = max(values[-1], 0.0)
    if values[-1] < 0 and excess(0.0) <= 0:
        d = -c / values
    else:
        d = c / (brentq(excess, least + 1e-12, least + 2 * np.linalg.norm(c) / radius + 1, xtol=1e-15) - values)
    return float(c @ d + (values * d) @ d / 2)


def test_at_a_stationary_point_the_worst_is_lambda_max() -> None:
    """No gradient at w: r^2 lambda_max / 2, r = rho ||w||."""
    a, w = matrix(torch.linspace(0.1, 3.0, 25, dtype=torch.float64)), normal(25, seed=1)
    found = worst_case(expansion(a, 0 * w, w), 0.2, kind="l2", steps=150)
    exact = 3.0 * (0.2 * float(w.norm())) ** 2 / 2
    assert found.radius == pytest.approx(0.2 * float(w.norm()), rel=1e-12)
    assert found.loss == 2
    assert found.ascent == pytest.approx(exact, rel=1e-3)
    assert 0.3 * exact < found.search <= exact * (1 + 1e-12)
    assert (found.value, found.by) == (found.ascent, "ascent")


@pytest.mark.parametrize("kind", ["semidefinite", "indefinite", "mostly negative", "inner maximum"])
@pytest.mark.parametrize("pull", [0.03, 1.0])
def test_the_ascent_finds_the_trust_region_solution(kind: str, pull: float) -> None:
    values = {
        "semidefinite": torch.linspace(0, 3, 12),
        "indefinite": torch.linspace(-3, 3, 12),
        "mostly negative": torch.linspace(-12, 2, 12),
        "inner maximum": torch.linspace(-8, -1, 12),
    }[kind].double()
    w, rho = normal(12, seed=2), 0.4
    a, g = matrix(values), pull * normal(12, seed=3)
    exact = exact_maximum(a, g, rho * float(w.norm()))
    found = worst_case(expansion(a, g, w), rho, kind="l2", steps=100)
    assert found.ascent == pytest.approx(exact, rel=1e-3)
    assert 0 < found.search <= exact * (1 + 1e-12)


def test_balls_of_other_units_are_the_l2_ball_of_rescaled_weights() -> None:
    """max over ||d / s|| <= rho sqrt(P) of g'd + d'Ad / 2 is that of S g and S A S over ||u|| <= rho sqrt(P)."""
    w = normal(4, 5, seed=4)
    a, g = matrix(torch.linspace(0, 2, 20, dtype=torch.float64)), 0.1 * normal(20, seed=5)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        d = (o - w).flatten(1)
        return (d @ g + (d @ a * d).sum(1) / 2).mean()

    rows = w.square().mean(1, keepdim=True).sqrt().expand(4, 5)
    for kind, s in (("adaptive", w.abs().flatten()), ("filter", rows.flatten())):
        exact = exact_maximum(s[:, None] * a * s, s * g, 0.1 * 20**0.5)
        found = worst_case(objective_on(w, loss), 0.1, kind=kind, steps=100)
        assert found.ascent == pytest.approx(exact, rel=1e-3)
        assert found.radius == pytest.approx(0.1 * 20**0.5)


def test_the_worst_case_in_a_box_lies_in_a_corner() -> None:
    """L = sum a_i w_i^2 / 2, a >= 0: the worst d_i is eps (|w_i| + 1) away from 0."""
    w, a = normal(30, seed=6), normal(30, seed=7).square()
    w[:5] = 0
    a[20:] = 0
    found = worst_case(objective_on(w, lambda o, y: (a * o.square()).sum(1).mean() / 2), 1e-3, kind="keskar", steps=3)
    start = float((a * w**2).sum() / 2)
    rise = float((a * (w.abs() + 1e-3 * (w.abs() + 1)) ** 2).sum() / 2) - start
    assert found.loss == pytest.approx(start, rel=1e-12)
    assert found.ascent == pytest.approx(rise, rel=1e-9)
    assert 0 < found.search <= rise * (1 + 1e-12)
    assert found.value == pytest.approx(100 * rise / (1 + start), rel=1e-9)
    assert found.radius == 1e-3


def test_the_worst_case_of_a_product_of_two_weights_is_the_closed_form() -> None:
    """L = (ab - 1)^2 / 2 does not change under a -> ca, b -> b / c: nor does the adaptive ball's worst case."""

    def found(kind: str, c: float) -> list[float]:
        w = torch.tensor([2.0 * c, 0.7 / c], dtype=torch.float64)
        result = worst_case(objective_on(w, lambda o, y: (o.prod(1) - 1).square().mean() / 2), 0.1, kind=kind)
        return [result.value, result.ascent, result.search]

    # r = .1 sqrt 2: the worst is both weights up by 10%
    assert found("adaptive", 1)[0] == pytest.approx((1.4 * 1.1**2 - 1) ** 2 / 2 - 0.4**2 / 2, rel=1e-6)
    assert found("adaptive", 8) == pytest.approx(found("adaptive", 1), rel=1e-9)
    assert abs(found("l2", 8)[0] / found("l2", 1)[0] - 1) > 0.5


def relu_network(c: float) -> Objective:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, eps=1e-30), nn.ReLU(), nn.Linear(6, 3)).double()
    x = normal(40, 5, seed=8)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=9 + i))
        norm = model[1]
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factors = c ** torch.arange(-2, 4).double()  # of each filter in front of the norm
        weight, bias, *_ = model.parameters()
        weight.mul_(factors[:, None])
        bias.mul_(factors)
        norm.running_mean.copy_(factors * 0.3)
        norm.running_var.copy_(factors**2 * 2)
    return make_objective(model, nn.functional.cross_entropy, (x, x[:, :3].argmax(1)))


@pytest.mark.parametrize("kind", BALLS)
def test_rescaled_filters_before_a_batch_norm_have_the_same_worst_case(kind: str) -> None:
    """Rescaled, they leave the function as it was: adaptive and filter balls do not notice, the others do."""
    one, other = (worst_case(relu_network(c), 0.05, kind=kind, steps=10, searches=30) for c in (1.0, 3.0))
    same = [one.ascent, one.search] == pytest.approx([other.ascent, other.search], rel=1e-7)
    assert same == (kind in ("adaptive", "filter"))
    assert one.loss == pytest.approx(other.loss, rel=1e-12)


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("steps", [1, 7])
def test_every_point_lies_in_the_ball(kind: str, steps: int) -> None:
    w = normal(30, seed=20)
    w[:4] = 0
    a = matrix(torch.linspace(-1, 2, 30, dtype=torch.float64))
    objective = expansion(a, normal(30, seed=21), w)
    found = worst_case(objective, 0.1, kind=kind, steps=steps, searches=50)
    assert isinstance(objective.model, Remembering)
    points = torch.stack(objective.model.visited)
    assert len(points) == found.gradients + found.forwards == steps + 53
    scale = {"l2": torch.ones(30), "keskar": w.abs() + 1}.get(kind, w.abs()).double()
    d = points - w
    assert (d[:, scale == 0] == 0).all()
    u = d[:, scale != 0] / scale[scale != 0]
    sizes = u.abs().amax(1) if kind == "keskar" else u.norm(dim=1)
    assert sizes.max() == pytest.approx(found.radius, rel=1e-12)
    losses = 2 + d @ normal(30, seed=21) + (d @ a * d).sum(1) / 2
    assert max(found.ascent, found.search) == pytest.approx(float(losses.max()) - 2, rel=1e-10)
    assert torch.equal(objective.weights(), w)


@pytest.mark.parametrize("searches", [1, 2, 3, 20, 21, 22, 23, 45])
def test_the_search_takes_what_passes_it_was_given(searches: int) -> None:
    objective = expansion(matrix(torch.ones(6).double()), normal(6, seed=1), normal(6, seed=2))
    found = worst_case(objective, 0.1, kind="l2", steps=1, searches=searches)
    assert isinstance(objective.model, Remembering)
    assert len(objective.model.visited) == searches + 4
    again = worst_case(objective, 0.1, kind="l2", steps=1, searches=searches)
    assert found == again
    assert worst_case(objective, 0.1, kind="l2", steps=1, searches=searches, seed=1).search != found.search


def test_the_search_is_better_than_its_directions() -> None:
    a = matrix(torch.cat([torch.full((199,), 0.01), torch.ones(1)]).double())
    objective = expansion(a, 0 * a[0], normal(200, seed=30))
    radius = 0.1 * float(objective.weights().norm())
    random = normal(210, 200, seed=31)
    random = radius * random / random.norm(dim=1, keepdim=True)
    found = worst_case(objective, 0.1, kind="l2", steps=1, searches=210)
    assert found.search > 3 * float((random @ a * random).sum(1).max()) / 2


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("kind", BALLS_IN_NORM)
def test_scaling_the_loss_scales_the_worst_case(kind: str, scale: float) -> None:
    a, g, w = matrix(torch.linspace(-1, 2, 10, dtype=torch.float64)), normal(10, seed=1), normal(10, seed=2)
    one, other = (worst_case(expansion(a, g, w, c), 0.1, kind=kind, searches=30) for c in (1.0, scale))
    assert [other.ascent, other.search] == pytest.approx([scale * one.ascent, scale * one.search], rel=1e-9)


# --- one step


def test_sam_sharpness_of_a_quadratic_is_the_closed_form() -> None:
    a, g, w = matrix(torch.linspace(-1, 2, 10, dtype=torch.float64)), normal(10, seed=1), normal(10, seed=2)
    objective = expansion(a, g, w)
    found = sam_sharpness(objective, 0.3)
    assert found.value == pytest.approx(0.3 * float(g.norm()) + 0.3**2 / 2 * float(g @ a @ g / (g @ g)), rel=1e-12)
    assert (found.samples, found.batches, found.without_gradient) == (1, 1, 0)
    assert math.isnan(found.stderr)
    assert worst_case(objective, 0.3 / float(w.norm()), kind="l2", steps=1, searches=1).ascent == pytest.approx(
        found.value, rel=1e-12
    )


def distances(w: Tensor, y: Tensor) -> Objective:
    """Sample i loses ||w - y_i||^2 / 2; its own step raises that by rho ||w - y_i|| + rho^2 / 2."""
    return objective_on(w, lambda o, y: (o - y).square().sum(1).mean() / 2, y)


def test_m_sharpness_of_single_samples_is_the_mean_over_samples() -> None:
    w, y = normal(4, seed=1), normal(9, 4, seed=2)
    y[3] = w  # no gradient
    lengths = (w - y).norm(dim=1)
    rises = (0.2 * lengths + 0.2**2 / 2) * (lengths > 0)
    found = m_sharpness(distances(w, y), 0.2, 1)
    assert found.value == pytest.approx(float(rises.mean()), rel=1e-12)
    assert found.stderr == pytest.approx(float(rises.std()) / 3, rel=1e-12)
    assert (found.samples, found.batches, found.without_gradient) == (1, 9, 1)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 11])
def test_m_sharpness_of_batches_is_the_mean_over_batches(batch_size: int) -> None:
    """The mean over disjoint batches of 4, 4 and 3, whatever the objective's own batches are."""
    w, y = normal(4, seed=1), normal(11, 4, seed=2)
    parts = torch.randperm(11, generator=stream(5)).split(4)
    rises = [0.2 * float((w - y[part].mean(0)).norm()) + 0.2**2 / 2 for part in parts]
    found = m_sharpness(distances(w, y).rebatched(batch_size), 0.2, 4, seed=5)
    assert found.value == pytest.approx((4 * rises[0] + 4 * rises[1] + 3 * rises[2]) / 11, rel=1e-12)
    assert (found.samples, found.batches) == (4, 3)
    assert m_sharpness(distances(w, y).rebatched(batch_size), 0.2, 11).value == pytest.approx(
        sam_sharpness(distances(w, y), 0.2).value, rel=1e-12
    )


# --- spiking networks


spiking = functools.partial(
    filled_objective,
    40,
    1.5,
    samples=32,
    inputs_seed=50,
    batch_size=10,
    dtype=torch.float32,
    input_shape=(1, 4, 4),
    hidden=(12,),
)


def test_the_search_does_not_depend_on_the_surrogate() -> None:
    one, other = (worst_case(spiking(surrogate=s), 0.05, steps=8, searches=42) for s in ("atan:1", "atan:8"))
    assert (one.loss, one.search) == (other.loss, other.search)
    assert one.ascent != other.ascent
    assert one.ascent > one.search > 0


def test_a_network_that_never_spikes_has_no_worst_case() -> None:
    """No gradient and no change of the loss anywhere in the ball: 0, and it says that nothing was found."""
    dead = spiking(surrogate="triangle:1", threshold=1e6)
    for kind in BALLS:
        found = worst_case(dead, 0.05, kind=kind, steps=3, searches=10)
        assert (found.value, found.by, found.ascent, found.search) == (0, "neither", 0, 0)
    one = sam_sharpness(dead, 0.05)
    assert (one.value, one.without_gradient) == (0, 1)
    assert m_sharpness(dead, 0.05, 8).without_gradient == 4


def test_the_search_counts_if_the_surrogate_misleads_the_ascent() -> None:
    """A step whose surrogate gradient points down: ascent finds nothing, search does."""

    class Misled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (2 * self.w.detach() - self.w).expand(len(x), 8)  # value w, gradient -1

    objective = make_objective(Misled(), lambda o, y: o.sum(1).mean(), (torch.zeros(1, 1), torch.zeros(1)))
    found = worst_case(objective, 0.1, kind="l2")
    assert (found.ascent, found.by, found.value) == (0, "search", found.search)
    assert 0.5 * 0.1 * 8 < found.search <= 0.1 * 8
    assert sam_sharpness(objective, 0.1).value == pytest.approx(-0.1 * 8**0.5)


# --- other weights, bad input


def test_at_is_a_copy() -> None:
    w = normal(5, seed=1)
    a, g = matrix(torch.linspace(1, 2, 5, dtype=torch.float64)), normal(5, seed=2)
    objective = expansion(a, g, w)
    d = normal(5, seed=3)
    value, gradient = at(objective, w + d).value_and_gradient()
    torch.testing.assert_close(gradient, g + a @ d)
    assert value == pytest.approx(2 + float(g @ d + d @ a @ d / 2), rel=1e-12)
    assert torch.equal(objective.weights(), w)
    torch.testing.assert_close(objective.value_and_gradient()[1], g)


def test_state_left_by_a_gradient_is_ignored() -> None:
    """State that a gradient has left in the model neither counts nor hinders copying."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.state: Tensor | float = 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.state = self.state + self.w * x
            return torch.as_tensor(self.state)

    def reset(model: nn.Module) -> None:
        model.state = 0.0  # type: ignore[assignment]

    x = torch.ones(4, 1, dtype=torch.float64)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return (o - y).square().mean()

    objective = make_objective(Counting(), loss, (x, 2 * x), batch_size=1, reset=reset)
    objective.value_and_gradient()
    assert worst_case(objective, 0.1).value == pytest.approx(1.1**2 - 1)
    objective.value_and_gradient()
    assert sam_sharpness(objective, 0.1).value == pytest.approx(1.1**2 - 1)


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_radius_is_refused(rho: float) -> None:
    objective = distances(normal(4, seed=1), normal(3, 4, seed=2))
    measures: list[Callable[[], Any]] = [
        lambda: worst_case(objective, rho),
        lambda: sam_sharpness(objective, rho),
        lambda: m_sharpness(objective, rho, 1),
    ]
    for measure in measures:
        with pytest.raises(ValueError, match="rho must be a positive number, not"):
            measure()


def test_bad_input_is_refused() -> None:
    w = normal(4, seed=1)
    objective = distances(w, normal(3, 4, seed=2))
    with pytest.raises(ValueError, match="unknown ball 'l1': choose from l2, adaptive, filter, keskar"):
        worst_case(objective, 0.1, kind="l1")
    with pytest.raises(ValueError, match="at least 1, not 0 and 210"):
        worst_case(objective, 0.1, steps=0)
    with pytest.raises(ValueError, match="at least 1, not 20 and 0"):
        worst_case(objective, 0.1, searches=0)
    for m in (0, 4):
        with pytest.raises(ValueError, match=f"m must lie between 1 and the 3 samples, not {m}"):
            m_sharpness(objective, 0.1, m)
    for kind in BALLS_IN_NORM:
        with pytest.raises(ValueError, match=f"all weights are zero: the ball '{kind}'"):
            worst_case(distances(0 * w, normal(3, 4, seed=2)), 0.1, kind=kind)
    assert worst_case(distances(0 * w, normal(3, 4, seed=2)), 0.1, kind="keskar").value > 0
    with pytest.raises(ValueError, match=r"1 \+ L: it needs a loss above -1, not -5"):
        worst_case(objective_on(w, lambda o, y: 0 * o.sum() - 5), 0.1, kind="keskar")
    broken = dataclasses.replace(objective, parameters={"w": torch.full((4,), math.nan, dtype=torch.float64)})
    for measure in (worst_case, sam_sharpness):
        with pytest.raises(ValueError, match="weights have NaN"):
            measure(broken, 0.1)
        with pytest.raises(ValueError, match=r"the loss .*is not finite at these weights"):
            measure(objective_on(w, lambda o, y: (o * math.nan).sum()), 0.1)
        with pytest.raises(ValueError, match="its surrogate gradient is not finite"):
            measure(objective_on(w, lambda o, y: (0 * o).sqrt().sum()), 0.1)
    with pytest.raises(ValueError, match="use a smaller rho"):
        worst_case(objective_on(w, lambda o, y: (w.square().sum() * 1.1 - o.square().sum()).sqrt()), 0.9, kind="l2")
