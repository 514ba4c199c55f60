"""Tests of average sharpness, PAC-Bayes sigma and critical sharpness: closed forms, invariances and coverage."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from objectives import objective_on, positive_definite, quadratic
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor, nn

from hessian_tools.analysis.flatness import average_sharpness as average
from hessian_tools.analysis.flatness.average_sharpness import (
    NOISE_KINDS,
    NoiseEstimate,
    PacBayes,
    average_sharpness,
    draw_losses,
    over_draws,
    pac_bayes_sigma,
    smoothed_loss,
)
from hessian_tools.analysis.flatness.critical_sharpness import CriticalSharpness, critical_sharpness
from hessian_tools.io import json as results
from hessian_tools.objective import Objective, make_objective
from hessian_tools.perturbation import noise
from ikun.data.datasets import load_dataset
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

PLAIN = ("isotropic", "filter", "elementwise")


def scales_of(kind: str, w: Tensor) -> Tensor:
    """D [4, 5] for a matrix of four filters, from the definition."""
    n = w.numpy()
    rows = np.sqrt((n**2).sum(1, keepdims=True)) * np.ones_like(n)
    return torch.from_numpy(
        {
            "isotropic": np.full_like(n, np.sqrt((n**2).mean())),
            "filter": rows / 5**0.5,
            "elementwise": np.abs(n),
            "filter_norm": rows,
        }[kind]
    )


# --- average sharpness and the smoothed loss


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_average_sharpness_and_smoothed_loss_of_a_quadratic_are_the_closed_form(kind: str) -> None:
    a, flat = positive_definite()
    w, radius = flat.reshape(4, 5), 0.3
    exact = radius**2 / 2 * float(a.diagonal() @ scales_of(kind, w).flatten() ** 2)
    found = average_sharpness(quadratic(a, w), radius, kind=kind, draws=600)
    assert abs(found.value - exact) < 4 * found.stderr < 0.2 * exact
    low, high = found.ci95
    half = 1.9679 * found.stderr  # Student's t, 299 degrees, widened for skewness
    assert 0.999 * half <= min(found.value - low, high - found.value)
    assert max(found.value - low, high - found.value) <= 1.15 * half
    assert found.draws == 600
    assert math.isnan(found.data_stderr)
    smooth = smoothed_loss(quadratic(a, w), radius, kind=kind, draws=600)
    assert smooth.value == pytest.approx(found.value + float(flat @ a @ flat) / 2)
    assert smooth.stderr == pytest.approx(found.stderr)


def test_kinds_but_that_of_lpf_have_one_expected_norm() -> None:
    w = positive_definite()[1].reshape(4, 5)
    norms = [float(NOISE_KINDS[kind](quadratic(torch.eye(20, dtype=torch.float64), w)).norm()) for kind in PLAIN]
    assert norms == pytest.approx([float(w.norm())] * 3)


def test_smoothed_loss_is_smoothed_by_the_norms_of_filters() -> None:
    a, flat = positive_definite()
    w = flat.reshape(4, 5)
    exact = float(flat @ a @ flat) / 2 + 0.01**2 / 2 * 5 * float(a.diagonal() @ scales_of("filter", w).flatten() ** 2)
    found = smoothed_loss(quadratic(a, w))
    assert abs(found.value - exact) < 4 * found.stderr < 1e-3 * exact


def test_linear_terms_cancel_in_every_pair() -> None:
    slope = torch.linspace(-1, 1, 20, dtype=torch.float64)
    found = average_sharpness(objective_on(positive_definite()[1], lambda o, y: (o @ slope).mean()), 0.5, kind="filter")
    assert abs(found.value) < 1e-14
    assert found.stderr < 1e-14


def test_one_set_of_draws_serves_all_metrics() -> None:
    a, w = positive_definite()
    target = quadratic(a, w, torch.rand(7, dtype=torch.float64))
    losses, at = draw_losses(target, 0.2, kind="filter", draws=20, seed=5)
    assert losses.shape == (20, 7)
    expected = [
        [float(y) * float(p @ a @ p) / 2 for y in target.batches[0][1]]
        for p in (w + 0.2 * w.abs() * noise(target, 5, i) for i in range(20))
    ]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    assert over_draws(losses - at) == average_sharpness(target, 0.2, kind="filter", draws=20, seed=5)
    assert over_draws(losses) == smoothed_loss(target, 0.2, kind="filter", draws=20, seed=5)


def test_the_interval_over_draws_covers_the_truth() -> None:
    a, w = positive_definite()
    target, exact = quadratic(a, w), 0.1**2 / 2 * float(a.trace()) * float(w.square().mean())
    hits = 0
    for seed in range(500):
        low, high = average_sharpness(target, kind="isotropic", draws=20, seed=seed).ci95
        hits += low <= exact <= high
    assert 0.92 <= hits / 500 <= 0.985


def test_the_data_error_covers_the_truth() -> None:
    """Samples of random curvature, 40 of them: the sharpness over all data has the mean curvature."""
    w = torch.ones(50, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(500):
        y = torch.rand(40, dtype=torch.float64, generator=generator)
        found = average_sharpness(quadratic(torch.eye(50, dtype=torch.float64), w, y), kind="filter", draws=4)
        exact = found.value / float(y.mean()) / 2  # of the same draws
        hits += abs(found.value - exact) <= 2.02 * found.data_stderr
    assert 0.92 <= hits / 500 <= 0.98


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_loss_scales_average_sharpness(scale: float) -> None:
    a, w = positive_definite()
    y = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    one, other = quadratic(a, w, y), quadratic(a, w, y, scale)
    x, z = (average_sharpness(o, kind="filter", draws=4) for o in (one, other))
    assert [z.value / scale, z.stderr / scale, z.data_stderr / scale] == pytest.approx(
        [x.value, x.stderr, x.data_stderr]
    )
    x, z = (critical_sharpness(o, o.value_and_gradient()[1]) for o in (one, other))
    assert [z.value / scale, z.step * scale] == pytest.approx([x.value, x.step])


# --- what must not change it


def product_loss(o: Tensor, y: Tensor) -> Tensor:
    return ((o[:, 0] * o[:, 1] - 1).square() / 2).mean()


def test_a_rescaled_product_is_as_flat_elementwise_alone() -> None:
    r = 0.2
    for c in (1.0, 10.0):
        w = torch.tensor([c, 1 / c], dtype=torch.float64)
        found = average_sharpness(objective_on(w, product_loss), r, kind="elementwise", draws=1000)
        assert abs(found.value - ((1 + r**2) ** 2 - 1) / 2) < 4 * found.stderr  # E (x^2 y^2 - 2 x y + 1) / 2
        other = average_sharpness(objective_on(w, product_loss), r, kind="isotropic", draws=1000)
        s = r * float(w.square().mean()) ** 0.5
        exact = ((c**2 + s**2) * (c**-2 + s**2) - 1) / 2
        assert abs(other.value - exact) < 4 * other.stderr
        if c == 1:
            first = found, other
    assert found.value == pytest.approx(first[0].value, rel=1e-12)
    assert other.value > 100 * first[1].value


def test_filter_noise_is_blind_to_the_scale_of_filters_before_a_norm() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))
    net = net.double()
    conv, bn = net[0], net[1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    bn.eps = 0.0
    bn.running_mean.normal_()
    data = torch.randn(30, 1, 5, 5, dtype=torch.float64), torch.arange(30) % 3

    def metrics() -> dict[str, NoiseEstimate]:
        target = make_objective(net, nn.functional.cross_entropy, data)
        found = {kind: average_sharpness(target, 0.5, kind=kind) for kind in NOISE_KINDS}
        return found | {"lpf": smoothed_loss(target), "sigma": pac_bayes_sigma(target, draws=20).sigma}

    before = metrics()
    c = torch.logspace(-1, 1, 6, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.mul_(c[:, None, None, None])
    bn.running_mean.mul_(c)
    bn.running_var.mul_(c**2)
    after = metrics()
    for name in ("filter", "filter_norm", "lpf", "sigma", "elementwise"):
        assert after[name].value == pytest.approx(before[name].value, rel=1e-9), name
        assert after[name].ci95 == pytest.approx(before[name].ci95, rel=1e-9), name
    assert after["isotropic"].value > 1.5 * before["isotropic"].value


@functools.cache
def trained() -> Network:
    """An MLP trained a little on 60 digits."""
    torch.manual_seed(0)
    data = load_dataset("digits", subset=60)
    net = Network(Spec(model="mlp", hidden=(24, 16), norm="none", timesteps=3, surrogate="atan:2"))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        LOSSES["mse"](net(data.images), data.labels).backward()
        optimizer.step()
    return net


def trained_objective(surrogate: str) -> Objective:
    """The trained MLP, its spikes and weights the same whatever the surrogate."""
    data = load_dataset("digits", subset=60)
    net = Network(replace(trained().spec, surrogate=surrogate))
    net.load_state_dict(trained().state_dict())
    return make_objective(net, LOSSES["mse"], (data.images, data.labels))


def test_the_surrogate_changes_the_direction_of_critical_sharpness_alone() -> None:
    one, other = trained_objective("atan:2"), trained_objective("atan:5")
    for kind in NOISE_KINDS:
        found = average_sharpness(one, kind=kind, draws=20)
        assert found == average_sharpness(other, kind=kind, draws=20)
        assert found.value > 0
    assert smoothed_loss(one, draws=20) == smoothed_loss(other, draws=20)
    found = pac_bayes_sigma(one, draws=20)
    assert found == pac_bayes_sigma(other, draws=20)
    assert 0.02 < found.sigma.value < 2
    gradient = one.value_and_gradient()[1]
    assert critical_sharpness(one, gradient) == critical_sharpness(other, gradient)
    assert critical_sharpness(one, gradient) != critical_sharpness(other, other.value_and_gradient()[1])


def test_permuted_neurons_are_as_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trained_objective("atan:2")
    model = Network(trained().spec)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    index = dict(zip(one.parameters, one.split(torch.arange(one.size)), strict=True))
    index["fc1.weight"], index["fc2.weight"] = index["fc1.weight"][order], index["fc2.weight"][:, order]
    permutation = torch.cat([i.reshape(-1) for i in index.values()])
    with torch.no_grad():
        for p, v in zip(model.parameters(), one.split(one.weights()[permutation]), strict=True):
            p.copy_(v)
    other = replace(one, model=model, parameters=dict(model.named_parameters()))
    assert not other.weights().equal(one.weights())
    for kind in PLAIN:
        x, y = (average_sharpness(o, kind=kind, draws=64) for o in (one, other))
        assert max(x.ci95[0], y.ci95[0]) < min(x.ci95[1], y.ci95[1])
        with monkeypatch.context() as patch:
            patch.setattr(average, "noise", lambda o, seed, i: noise(o, seed, i)[permutation])
            z = average_sharpness(other, kind=kind, draws=64)
        assert z.value == pytest.approx(x.value, rel=1e-3)  # sums in another order may cross a threshold


def test_batches_and_threads_change_nothing() -> None:
    one = trained_objective("atan:2")
    losses, at = draw_losses(one, kind="filter", draws=6)
    for target in (one.rebatched(7), one.rebatched(60)):
        torch.testing.assert_close(draw_losses(target, kind="filter", draws=6)[0], losses)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert draw_losses(one, kind="filter", draws=6)[0].equal(losses)
    finally:
        torch.set_num_threads(threads)
    assert one.weights().equal(trained_objective("atan:2").weights())
    assert at.mean().item() == pytest.approx(one.value_and_gradient()[0], rel=1e-6)


# --- PAC-Bayes sigma


class Signs(nn.Module):
    """Sample i is classified by the sign of weight i, and rightly at the weights."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, x: Tensor) -> Tensor:
        margins = x @ self.w
        return torch.stack([-margins, margins], 1)


def signs(w: Tensor) -> Objective:
    return make_objective(
        Signs(w), nn.functional.cross_entropy, (torch.eye(len(w), dtype=w.dtype), (w > 0).long()), batch_size=500
    )


def test_sigma_is_a_standard_deviation() -> None:
    """A flip has probability Phi(-1/s): 0.1 at s = 0.780. Handed to the generator as a variance it would be 0.883."""
    w = torch.linspace(-2, 2, 1000, dtype=torch.float64)
    for kind in ("elementwise", "filter"):
        found = pac_bayes_sigma(signs(w), kind=kind)
        exact = -1 / float(norm.ppf(0.1))
        assert abs(found.sigma.value - exact) < 4 * found.sigma.stderr < 0.05
        assert found.sharpness.value == pytest.approx(found.sigma.value**-2)
        assert found.sharpness.ci95 == pytest.approx((found.sigma.ci95[1] ** -2, found.sigma.ci95[0] ** -2))
        low, high = found.sigma.ci95
        assert low < found.sigma.value < high
        assert 2.13 < (high - low) / 2 / found.sigma.stderr < 3.2  # Student's t of 15 degrees, widened for skewness
    found = pac_bayes_sigma(signs(w), 0.2, kind="isotropic")
    size, margins = float(w.square().mean()) ** 0.5, w.abs().numpy()
    exact = brentq(lambda s: norm.cdf(-margins / (s * size)).mean() - 0.2, 0.01, 10)
    assert abs(found.sigma.value - exact) < 4 * found.sigma.stderr < 0.2 * exact


def test_sigma_lies_where_the_accuracy_drops_by_that_much() -> None:
    one = signs(torch.linspace(-2, 2, 300, dtype=torch.float64))
    w = one.weights()
    s = pac_bayes_sigma(one, 0.15, kind="isotropic", draws=16, seed=3).sigma.value
    size = w.square().mean().sqrt()

    def drop(s: float) -> float:
        flips = [((w + s * size * noise(one, 3, i)).sign() != w.sign()).double().mean() for i in range(16)]
        return float(torch.stack(flips).mean())

    assert drop(0.98 * s) <= 0.15 < drop(1.02 * s)


def test_the_interval_of_sigma_covers_the_truth() -> None:
    target = signs(torch.ones(40, dtype=torch.float64))
    exact, hits, flat = -1 / float(norm.ppf(0.1)), 0, 0
    for seed in range(500):
        found = pac_bayes_sigma(target, draws=20, seed=seed)
        hits += found.sigma.ci95[0] <= exact <= found.sigma.ci95[1]
        flat += found.sharpness.ci95[0] <= exact**-2 <= found.sharpness.ci95[1]
    assert hits == flat
    assert 0.92 <= hits / 500 <= 0.985


def test_the_data_error_of_sigma_covers_the_truth() -> None:
    """Margins of 100 samples, all moved by one weight, against sigma on 20,000 of them under the same draws."""
    generator = torch.Generator().manual_seed(0)

    def sigma(samples: int) -> NoiseEstimate:
        margins = 0.5 + 2.5 * torch.rand(samples, 1, dtype=torch.float64, generator=generator)
        data = margins, torch.ones(samples, dtype=torch.int64)
        return pac_bayes_sigma(make_objective(Shifted(), nn.functional.cross_entropy, data), draws=8).sigma

    exact = sigma(20_000).value
    found = [sigma(100) for _ in range(120)]
    assert 0.9 <= sum(abs(f.value - exact) <= 1.98 * f.data_stderr for f in found) / 120 <= 0.99
    errors = torch.tensor([f.data_stderr for f in found])
    assert errors.mean() == pytest.approx(float(torch.tensor([f.value for f in found]).std()), rel=0.2)


class Shifted(nn.Module):
    """Logit m_i + w - 1, m_i the input: right at the weight 1 for m_i > 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        margins = x[:, 0] + self.w - 1
        return torch.stack([-margins, margins], 1)


def test_sigma_is_infinite_if_accuracy_never_drops_and_small_if_it_always_does() -> None:
    one = make_objective(
        Signs(torch.ones(1, dtype=torch.float64)),
        nn.functional.cross_entropy,
        (torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)),
    )
    found = pac_bayes_sigma(one, draws=20)  # the outputs do not depend on the weight
    assert found.sigma.value == math.inf
    assert found.sigma.ci95 == (math.inf, math.inf)
    assert found.sharpness.value == 0
    assert found.sharpness.ci95 == (0, 0)

    class Edge(nn.Module):
        """Right at exactly the weight 1."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            wrong = (self.w - 1).abs().expand(len(x))
            return torch.stack([torch.zeros_like(wrong), wrong], 1)

    target = make_objective(Edge(), nn.functional.cross_entropy, (torch.ones(2, 1).double(), torch.zeros(2).long()))
    found = pac_bayes_sigma(target, draws=4)
    assert found.sigma.value == 0
    assert found.sharpness.value == math.inf


def test_a_single_sample_has_no_data_error() -> None:
    found = pac_bayes_sigma(signs(torch.ones(1, dtype=torch.float64)), draws=64)
    assert 0 < found.sigma.value < math.inf
    assert math.isnan(found.sigma.data_stderr)
    assert math.isnan(found.sharpness.data_stderr)


@pytest.mark.parametrize(("margin", "samples"), [(1e-4, 1000), (1.05 * 1.2816 * 2**-6, 100)])
def test_sigma_below_the_grid_is_found(margin: float, samples: int) -> None:
    class Fine(Signs):
        def forward(self, x: Tensor) -> Tensor:
            margins = x @ (self.w - 1 + margin)
            return torch.stack([-margins, margins], 1)

    data = torch.eye(samples, dtype=torch.float64), torch.ones(samples, dtype=torch.int64)
    target = make_objective(Fine(torch.ones(samples).double()), nn.functional.cross_entropy, data, batch_size=500)
    exact, found = -margin / float(norm.ppf(0.1)), pac_bayes_sigma(target, draws=20).sigma
    assert 0.5 * exact < found.ci95[0] < found.value < found.ci95[1] < 2 * exact
    assert abs(found.value - exact) < 4 * found.stderr


def test_sigma_is_the_smallest_of_several_crossings() -> None:
    """Wrong where |w - 1| lies between 0.1 and 0.5, right beyond: the mean drop rises, falls, never to rise again."""

    class Ring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(500, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            off = (x @ (self.w - 1)).abs()
            wrong = ((off > 0.1) & (off < 0.5)).double()
            return torch.stack([1 - wrong, wrong], 1)

    data = torch.eye(500, dtype=torch.float64), torch.zeros(500, dtype=torch.int64)
    found = pac_bayes_sigma(make_objective(Ring(), nn.functional.cross_entropy, data), 0.3)
    exact = brentq(lambda s: 2 * (norm.cdf(0.5 / s) - norm.cdf(0.1 / s)) - 0.3, 0.01, 0.2)
    assert found.sigma.value == pytest.approx(exact, rel=0.03)


def test_targets_that_are_no_classes_have_no_sigma() -> None:
    a, w = positive_definite()
    found = pac_bayes_sigma(quadratic(a, w))
    assert math.isnan(found.sigma.value)
    assert math.isnan(found.sharpness.value)


# --- critical sharpness


def test_critical_sharpness_of_a_quadratic_is_the_closed_form() -> None:
    for seed in range(5):
        for c in (1e-3, 1.0, 30.0):
            a, w = positive_definite(seed=seed)
            target = quadratic(c * a, w)
            g = c * a @ w
            exact = float(g @ (c * a) @ g / (g @ g))
            found = critical_sharpness(target, g)
            low, high = found.bounds
            assert low <= exact <= high
            assert high / low == pytest.approx(2 ** (1 / 16))
            assert found.value == pytest.approx(exact, rel=0.022)
            assert found.step == pytest.approx(2 / found.value)
            assert found.passes <= 112
            assert exact <= float(torch.linalg.eigvalsh(c * a)[-1])


def test_critical_sharpness_of_a_spiking_network_is_where_its_loss_passes() -> None:
    target = trained_objective("atan:2")
    loss, gradient = target.value_and_gradient()
    found = critical_sharpness(target, gradient)
    assert found.passes <= 112

    def at(step: float) -> float:
        other = make_objective(target.model, target.loss, list(target.batches))
        with torch.no_grad():
            for p, v in zip(other.parameters.values(), other.split(target.weights() - step * gradient), strict=True):
                p.copy_(v)
        return other.value_and_gradient()[0]

    assert at(2 / found.bounds[1]) <= loss < at(2 / found.bounds[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("start", "end"), [(0.02, 0.03), (0.11, 0.15), (0.4, 0.5)])
def test_critical_sharpness_finds_a_rise_between_two_falls(start: float, end: float, dtype: torch.dtype) -> None:
    """The loss is above its value at w = 1 for steps between start and end, and again from 1 on (value 2)."""

    def loss(o: Tensor, _: Tensor) -> Tensor:
        ridge = (o < 1 - 2 * start) & (o > 1 - 2 * end)
        return (o.square() + 5 * ridge).mean()

    found = critical_sharpness(objective_on(torch.ones(1, dtype=dtype), loss), torch.full((1,), 2.0, dtype=dtype))
    assert 2 / found.bounds[1] <= start * (1 + 1e-6) <= 2 / found.bounds[0]
    assert start <= found.step * 1.022


@pytest.mark.parametrize("draws", [4, 8, 18])
def test_few_draws_give_a_standard_error_and_no_interval(draws: int) -> None:
    a, w = positive_definite()
    sharp = average_sharpness(quadratic(a, w), kind="filter", draws=draws)
    found = pac_bayes_sigma(signs(torch.linspace(-2, 2, 1000, dtype=torch.float64)), draws=draws)
    for estimate in (sharp, found.sigma, found.sharpness):
        assert math.isfinite(estimate.value)
        assert math.isfinite(estimate.stderr)
        assert all(map(math.isnan, estimate.ci95))


def test_critical_sharpness_without_a_crossing_or_a_gradient_says_so() -> None:
    w = torch.ones(3, dtype=torch.float64)
    never = critical_sharpness(objective_on(w, lambda o, y: o.sum(1).mean()), torch.ones(3))
    assert (never.value, never.step) == (0, math.inf)
    assert never.bounds[0] == 0 < never.bounds[1]
    always = critical_sharpness(objective_on(w, lambda o, y: o.sum(1).mean()), -torch.ones(3))
    assert (always.value, always.step, always.bounds[1]) == (math.inf, 0, math.inf)
    none = critical_sharpness(objective_on(w, lambda o, y: o.sum(1).mean()), torch.zeros(3))
    assert math.isnan(none.value)
    assert math.isnan(none.step)
    lost = critical_sharpness(objective_on(w, lambda o, y: o.log().sum(1).mean()), torch.ones(3))  # NaN beyond 1
    assert lost.value == pytest.approx(2, rel=0.022)


# --- input, output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0.0}, "positive number, not 0"),
        ({"radius": -1.0}, "positive number, not -1"),
        ({"radius": math.nan}, "positive number, not nan"),
        ({"radius": math.inf}, "positive number, not inf"),
        ({"draws": 0}, "pairs.*not 0"),
        ({"draws": 2}, "pairs.*not 2"),
        ({"draws": 7}, "pairs.*not 7"),
        ({"kind": "layer"}, "'layer': choose from isotropic, filter, elementwise"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    a, w = positive_definite()
    target = quadratic(a, w)
    with pytest.raises(ValueError, match=message):
        average_sharpness(target, **{"kind": "filter", **arguments})
    renamed = {"sigma" if name == "radius" else name: value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        smoothed_loss(target, **renamed)
    if "radius" not in arguments:
        with pytest.raises(ValueError, match=message):
            pac_bayes_sigma(target, **arguments)


def every_metric(target: Objective) -> list[Callable[[], object]]:
    return [
        lambda: average_sharpness(target, kind="elementwise"),
        lambda: smoothed_loss(target),
        lambda: pac_bayes_sigma(target),
        lambda: critical_sharpness(target, torch.ones(target.size)),
    ]


def test_bad_weights_and_losses_are_refused() -> None:
    a, w = positive_definite()
    target = quadratic(a, w)
    with torch.no_grad():
        next(iter(target.parameters.values()))[3] = math.nan
    for metric in every_metric(target):
        with pytest.raises(ValueError, match="weights have NaN"):
            metric()
    for metric in every_metric(objective_on(w, lambda o, y: o.sum() * math.nan)):
        with pytest.raises(ValueError, match="loss at the weights is nan"):
            metric()
    for metric in every_metric(quadratic(a, torch.zeros_like(w)))[:3]:
        with pytest.raises(ValueError, match="all weights are zero"):
            metric()
    for drop in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="drop of accuracy"):
            pac_bayes_sigma(quadratic(a, w), drop)
    for bad in (torch.ones(19), torch.ones(20, 1), torch.full((20,), math.nan)):
        with pytest.raises(ValueError, match="gradient must be 20 finite numbers"):
            critical_sharpness(quadratic(a, w), bad)


def test_progress_is_reported_for_every_draw() -> None:
    a, w = positive_definite()
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    average_sharpness(quadratic(a, w), kind="filter", draws=6, progress=progress)
    assert seen == [(i, 6) for i in range(1, 7)]
    for target in (signs(torch.ones(40, dtype=torch.float64)), signs(torch.full((40,), 1e-9, dtype=torch.float64))):
        seen.clear()
        pac_bayes_sigma(target, draws=4, progress=progress)
        assert [done for done, _ in seen[:-1]] == list(range(1, len(seen)))
        assert seen[-1] == (len(seen) - 1, len(seen) - 1)
        assert all(done <= total for done, total in seen)
        assert all(total >= len(seen) - 1 for _, total in seen)
    for c in (1e-3, 1.0, 1e3):
        seen.clear()
        passes = critical_sharpness(quadratic(a, w), c * a @ w, progress=progress).passes
        assert [done for done, _ in seen[:-1]] == list(range(2, passes + 1))
        assert seen[-1] == (passes, passes)
        assert all(total >= passes for _, total in seen)


@dataclass(frozen=True)
class Kept:
    schema: str
    average: NoiseEstimate
    pac_bayes: PacBayes
    critical: CriticalSharpness


def test_results_can_be_kept(tmp_path: Path) -> None:
    target = trained_objective("atan:2")
    kept = Kept(
        "ikun-hessian/kept/1",
        average_sharpness(target, kind="filter", draws=20),
        pac_bayes_sigma(target, draws=20),
        critical_sharpness(target, target.value_and_gradient()[1]),
    )
    results.save_result(kept, tmp_path / "kept.json")
    assert results.load_result(tmp_path / "kept.json", Kept, "ikun-hessian/kept/1") == kept
