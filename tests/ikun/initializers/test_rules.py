"""Tests of the initialization rules against their formulas and an independent simulation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from draws import images, seeded
from torch import Tensor, nn

from ikun.initializers.catalog import Initialized, initialize
from ikun.initializers.fluctuation import fluctuation_weights, kernel_moments
from ikun.initializers.rules import Solution, draw_delta_orthogonal
from ikun.layer_statistics import LayerStatistics, batch_norm_by_batch, observe
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.training.spec import TrainingSpec

Array = npt.NDArray[np.float64]


def trains(steps: int, rate: float, count: int = 64) -> Tensor:
    return torch.bernoulli(torch.full((count, steps, 1, 8, 8), rate), generator=seeded(9))


def network(**fields: Any) -> Network:
    return Network(Spec(**{"model": "mlp", "hidden": (150, 120), "norm": "none", **fields}))


def run(name: str, net: Network, x: Tensor, **options: Any) -> tuple[dict[str, Solution], list[LayerStatistics]]:
    """Initialize and return the solutions by layer and the statistics that observe() measures."""
    done = initialize(net, name, generator=seeded(1), x=x, **options)
    with batch_norm_by_batch(net):
        seen = observe(net, x, torch.zeros(len(x), dtype=torch.long), LOSSES["mse"])
    return {s.layer: s for s in done.solutions}, list(seen)


# ---------------------------------------------------------------- delta_orthogonal
def circular(weights: nn.Module, side: int) -> Array:
    """The convolution of a circularly padded input as a matrix, from its definition."""
    w = weights.weight.detach().double().numpy()
    groups, (outputs, inputs), kernel = weights.groups, w.shape[:2], w.shape[2:]
    places = list(itertools.product(range(side), repeat=len(kernel)))
    index = {place: i for i, place in enumerate(places)}
    matrix = np.zeros((outputs, len(places), inputs * groups, len(places)))
    for o, i, tap in np.ndindex(outputs, inputs, math.prod(kernel)):
        offset = np.array(np.unravel_index(tap, kernel)) - np.array(kernel) // 2
        source = i + inputs * (o // (outputs // groups))
        for place in places:
            there = tuple((np.array(place) + offset) % side)
            matrix[o, index[place], source, index[there]] += w[(o, i, *np.unravel_index(tap, kernel))]
    return matrix.reshape(outputs * len(places), -1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 5, 4),
        nn.Conv2d(3, 3, 3),
        nn.Conv2d(2, 6, (3, 2)),
        nn.Conv3d(2, 3, 3),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
    ],
)
def test_delta_orthogonal_kernels_keep_every_norm(layer: nn.Module) -> None:
    with torch.no_grad():
        draw_delta_orthogonal(layer, seeded())
    singular = np.linalg.svd(circular(layer, 4), compute_uv=False)
    np.testing.assert_allclose(singular, 1, atol=1e-6)
    nonzero = layer.weight.detach().flatten(2).abs().sum((0, 1)) > 0
    assert nonzero.sum() == 1


def test_delta_orthogonal_gain_undoes_the_derivative() -> None:
    net, x = Network(Spec(channels=24, norm="none")), images()
    solutions, seen = run("delta_orthogonal", net, x)
    for s, (_, weights, *_) in zip(seen, net.stages(), strict=True):
        gain = solutions[s.name].variance
        assert gain * s.derivative_square == pytest.approx(1, rel=0.02)
        w = weights.weight.detach().double()
        w = w[:, :, 1, 1] if w.dim() == 4 else w
        small = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
        np.testing.assert_allclose(small, gain * np.eye(len(small)), atol=1e-5 * gain)


def test_delta_orthogonal_needs_as_many_outputs_as_inputs() -> None:
    net = Network(Spec(input_shape=(3, 8, 8), channels=2))
    with pytest.raises(ValueError, match="as many output as input channels: layer conv1 has 2 output and 3 input"):
        initialize(net, "delta_orthogonal", generator=seeded(), x=images(8, (3, 8, 8)))


# ---------------------------------------------------------------- lsuv
def test_lsuv_outputs_have_unit_variance_and_orthogonal_rows() -> None:
    net, x = network(hidden=(60, 50, 40)), images()
    solutions, seen = run("lsuv", net, x)
    assert float((x.flatten(1) @ net.fc1.weight.detach().T).var()) == pytest.approx(1, abs=0.1)
    for s, (_, weights, *_) in zip(seen, net.stages(), strict=True):
        assert s.current_variance == pytest.approx(1, abs=0.1)
        assert solutions[s.name].converged
        w = weights.weight.detach().double()
        gain = solutions[s.name].variance
        np.testing.assert_allclose(w @ w.T, gain * np.eye(len(w)), atol=1e-5 * gain)


def test_lsuv_measures_before_the_norm() -> None:
    net, x = Network(Spec(channels=8)), images()
    run("lsuv", net, x)
    assert float(F.conv2d(x, net.conv1.weight.detach(), padding=1).var()) == pytest.approx(1, abs=0.1)


def test_lsuv_of_recurrent_weights_is_of_their_own_output() -> None:
    net, x = network(model="rsnn", hidden=(80,), neuron="lif", tau=1.5, timesteps=6), images()
    run("lsuv", net, x)
    seen: list[Tensor] = []
    net.rec1.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    net(x)
    assert float(torch.stack(seen).var()) == pytest.approx(1, abs=0.1)
    assert float((x.flatten(1) @ net.fc1.weight.detach().T).var()) == pytest.approx(1, abs=0.1)


def test_lsuv_refuses_an_input_that_does_nothing() -> None:
    with pytest.raises(ValueError, match="layer fc1: its output does not vary"):
        initialize(network(), "lsuv", generator=seeded(), x=torch.zeros(4, 1, 8, 8))


# ---------------------------------------------------------------- fluctuation
@pytest.mark.parametrize(("tau", "steps"), [(None, 6), (2.0, 5), (5.0, 12)])
@pytest.mark.parametrize("mean", [0.0, 0.3])
def test_poisson_trains_give_the_promised_membrane(tau: float | None, steps: int, mean: float) -> None:
    """A membrane without threshold, simulated: its mean, and its standard deviation over trials of one neuron."""
    inputs, neurons, trials, rate, distance, xi = 150, 300, 300, 0.4, 1.2, 1.5
    decay, gain = (1.0, 1.0) if tau is None else (1 - 1 / tau, 1 / tau)
    first, second, _ = kernel_moments(decay, gain, steps)
    centre, variance = fluctuation_weights(inputs, rate, first, second, distance, mean, xi)
    rng = np.random.default_rng(3)
    w = centre + math.sqrt(variance) * rng.standard_normal((neurons, inputs))
    u, means, spreads = np.zeros((trials, neurons)), [], []
    for _ in range(steps):
        u = decay * u + gain * (rng.poisson(rate, (trials, inputs)) @ w.T)
        means.append(u.mean())
        spreads.append(u.var(0, ddof=1).mean())
    # the mean over neurons has the sampling error of the weights' mean
    error = 5 * math.sqrt(variance * inputs / neurons) * rate * first
    assert np.mean(means) == pytest.approx(mean, abs=error + 1e-9)
    assert math.sqrt(np.mean(spreads)) == pytest.approx((distance - mean) / xi, rel=0.02)


def test_kernel_moments_are_the_known_ones() -> None:
    first, second, constant = kernel_moments(1 - 1 / 3, 1 / 3, 4000)
    assert first == pytest.approx(1, rel=1e-3)
    assert second == pytest.approx(1 / (2 * 3 - 1), rel=1e-3)
    assert constant == pytest.approx(1, rel=2e-3)
    assert kernel_moments(1.0, 1.0, 4) == pytest.approx((2.5, 2.5, (1 + 4 + 9 + 16) / 4))
    assert kernel_moments(0.5, 0.5, 2) == pytest.approx(((0.5 + 0.75) / 2, (0.25 + 0.3125) / 2, (0.25 + 0.5625) / 2))


def test_a_mean_that_alone_fluctuates_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match="fluctuates by more than 1/3 of its distance"):
        fluctuation_weights(10, 0.1, 1.0, 1 / 3, 1.0, 0.9, 3.0)


def test_fluctuation_of_spike_trains_and_a_recurrent_share() -> None:
    steps, rate = 5, 0.1
    neuron = {"neuron": "lif", "tau": 2.5, "threshold": 0.8, "v_reset": -0.2, "timesteps": steps, "coding": "poisson"}
    net = network(model="rsnn", hidden=(150,), **neuron)
    solutions, seen = run("fluctuation", net, trains(steps, rate))
    by_hand = [sum((0.4 * 0.6**k) ** 2 for k in range(t)) for t in range(1, steps + 1)]
    for s, share in zip(seen, (0.9, 0.1, 1.0), strict=True):
        silent = seen[0].input_square if s.name == "fc1" else solutions[s.name].input_square
        expected = share * 1.0 / (s.fan_in * silent * np.mean(by_hand))
        assert solutions[s.name].variance == pytest.approx(expected, rel=1e-6)
        assert s.weight_variance == pytest.approx(expected, rel=5 * math.sqrt(2 / (s.fan_in * s.fan_out)))
    assert solutions["fc1"].input_square == pytest.approx(rate, rel=0.05)
    alone = network(hidden=(150,), **neuron)
    with torch.no_grad():
        alone.fc1.weight.copy_(net.fc1.weight)
    fired = observe(alone, trains(steps, rate), torch.zeros(64).long(), LOSSES["mse"])[0].firing_rate
    # the recurrent rate is measured with recurrence silent; at the first step there was no spike yet
    assert solutions["rec1"].input_square == pytest.approx(fired * (steps - 1) / steps, rel=0.35)


def test_fluctuation_of_a_repeated_image_is_its_spread() -> None:
    net, x = network(hidden=(4000,), neuron="lif", tau=3.0, timesteps=6), images()
    run("fluctuation", net, x)
    current, h, squares = x.flatten(1) @ net.fc1.weight.detach().T, torch.zeros(()), []
    for _ in range(6):
        h = (1 - 1 / 3) * h + current / 3
        squares.append(float(h.square().mean()))
    assert math.sqrt(np.mean(squares)) == pytest.approx(1, rel=0.05)


def test_fluctuation_names_a_dead_layer() -> None:
    with pytest.raises(ValueError, match="the fluctuation rule has no solution for layer fc1: its input is zero"):
        initialize(network(), "fluctuation", generator=seeded(), x=torch.zeros(4, 1, 8, 8))


# ---------------------------------------------------------------- firing
@pytest.mark.parametrize("neuron", ["if", "lif"])
def test_firing_is_one_over_fan_and_rate_as_measured(neuron: str) -> None:
    net, x = network(model="rsnn", hidden=(150, 120), neuron=neuron), images()
    solutions, seen = run("firing", net, x)
    gain = 1.0 if neuron == "if" else 0.5
    for s in seen:
        variance = solutions[s.name].variance
        assert variance == pytest.approx(1 / (gain**2 * s.fan_in * s.input_square), rel=0.02)
        assert s.weight_variance == pytest.approx(variance, rel=5 * math.sqrt(2 / (s.fan_in * s.fan_out)))


def test_firing_carries_spikes_through_depth() -> None:
    """The paper's claim, T = 1: the membrane keeps unit variance, so every layer fires with P(N(0, 1) > 1) = .159."""
    net, x = network(hidden=(300,) * 12, timesteps=1), images(128)
    _, seen = run("firing", net, x)
    rates = [s.firing_rate for s in seen[:-1]]
    assert np.mean(rates) == pytest.approx(0.159, abs=0.02)
    assert rates[-1] == pytest.approx(0.159, abs=0.05)
    assert all(s.current_variance == pytest.approx(1, rel=0.3) for s in seen[1:-1])
    _, faint = run("lecun", network(hidden=(300,) * 12, timesteps=1), x)
    assert faint[6].firing_rate == 0


def test_analytic_firing_takes_a_standard_normal_membrane() -> None:
    net, x = network(threshold=0.7), images()
    solutions, seen = run("firing", net, x, law="analytic")
    rates = [float(x.double().square().mean()), *[0.5 * math.erfc(0.7 / math.sqrt(2))] * 2]
    for s, rate in zip(seen, rates, strict=True):
        assert solutions[s.name].variance == pytest.approx(1 / (s.fan_in * rate), rel=1e-12)
        assert s.weight_variance == pytest.approx(1 / (s.fan_in * rate), rel=5 * math.sqrt(2 / (s.fan_in * s.fan_out)))


# ---------------------------------------------------------------- gradient_stable
def potentials(net: Network, x: Tensor) -> Array:
    """h[t] of the first recurrent layer with soft reset, in loops."""
    spec = net.spec
    w, v = (m.weight.detach().double().numpy() for m in (net.fc1, net.rec1))
    current, found = x.flatten(1).double().numpy() @ w.T, []
    h, s = np.zeros_like(current), np.zeros_like(current)
    for _ in range(spec.timesteps):
        h = (1 - 1 / spec.tau) * (h - spec.threshold * s) + (current + s @ v.T) / spec.tau
        s = (h >= spec.threshold).astype(np.float64)
        found.append(h)
    return np.stack(found)


@pytest.mark.parametrize("detached", [True, False])
def test_gradient_stable_keeps_a_gradient_that_goes_back_a_step(detached: bool) -> None:
    neuron = {"neuron": "lif", "tau": 2.0, "threshold": 0.8, "reset": "soft", "detach_reset": detached, "timesteps": 8}
    net = network(model="rsnn", hidden=(300,), **neuron)
    solutions, seen = run("gradient_stable", net, images(128))
    slope = 1 / (1 + (math.pi * (potentials(net, images(128)) - 0.8)) ** 2)
    assert (slope**2).mean() == pytest.approx(seen[0].derivative_square, rel=1e-4)
    v = net.rec1.weight.detach().double().numpy()
    g = np.random.default_rng(0).standard_normal(slope.shape)  # dL/dh at the later step
    decay = gain = 0.5
    through = gain * slope * (g @ v)
    if detached:
        back = decay * g + through
        assert (back**2).mean() == pytest.approx(1, rel=0.03)
    paths = [(decay * g) ** 2, through**2, (0.0 if detached else decay * 0.8 * slope * g) ** 2]
    assert sum(float(np.mean(p)) for p in paths) == pytest.approx(1, rel=0.03)
    assert (v**2).mean() == pytest.approx(variance := solutions["rec1"].variance, rel=0.02)
    m = seen[0].derivative_square
    assert 0.25 * 300 * variance * m + 0.25 + (0 if detached else 0.16 * m) == pytest.approx(1, abs=0.006)
    glorot = math.sqrt(6 / (64 + 300))
    assert float(net.fc1.weight.detach().abs().max()) == pytest.approx(glorot, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, "for recurrent layers, and this network has none"),
        ({"model": "rsnn"}, r"layer rec1: decay\^2 .* is 1.\d+, not below 1; choose lif"),
        ({"model": "rsnn", "neuron": "lif", "tau": 400.0}, r"layer rec1: decay\^2 .* is 1.\d+, not below 1"),
        ({"model": "rsnn", "neuron": "lif", "surrogate": "rect:0.001"}, "layer rec1: the surrogate derivative is zero"),
    ],
)
def test_gradient_stable_refuses_what_it_cannot_solve(fields: dict[str, Any], part: str) -> None:
    net = network(**{"hidden": (30,), **fields})
    with pytest.raises(ValueError, match=part) as caught:
        initialize(net, "gradient_stable", generator=seeded(), x=images(4) * 0.1)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- tdbn
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_tdbn_norms_start_at_alpha_thresholds_over_kaiming_weights(alpha: float) -> None:
    net, like = (Network(Spec(channels=4, threshold=0.6)) for _ in range(2))
    assert initialize(net, "tdbn", generator=seeded(3), alpha=alpha) == Initialized((), 0)
    initialize(like, "kaiming", generator=seeded(3))
    for (name, w, *_), (_, other, *_) in zip(net.stages(), like.stages(), strict=True):
        assert torch.equal(w.weight, other.weight), name
    for norm in (net.norm1, net.norm2):
        np.testing.assert_allclose(norm.weight.detach(), 0.6 * alpha, rtol=1e-6)
        assert norm.bias.eq(0).all()


def test_tdbn_leaves_a_network_with_that_norm_as_it_is() -> None:
    net = Network(Spec(model="resnet", channels=2, norm="tdbn", threshold=0.6))
    before = {k: v.clone() for k, v in net.state_dict().items() if "norm" in k}
    initialize(net, "tdbn", generator=seeded())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_tdbn_needs_a_norm() -> None:
    net = network()
    before = net.fc1.weight.clone()
    with pytest.raises(ValueError, match="this network has no norm"):
        initialize(net, "tdbn", generator=seeded())
    assert torch.equal(net.fc1.weight, before)


# ---------------------------------------------------------------- the analytic law of ikun elsewhere
@pytest.mark.parametrize(("name", "alpha"), [("ikun", 1.0), ("ikun", 0.05), ("firing", 1.0)])
@pytest.mark.parametrize(("norm", "threshold"), [("none", 1.0), ("bn", 1.0), ("tdbn", 0.7)])
def test_analytic_law_of_recurrent_layers_is_that_of_both_currents(
    name: str, alpha: float, norm: str, threshold: float
) -> None:
    """The current drawn: Gaussian weights of the solutions' variances, independent spikes of the model's rate."""
    net = network(model="rsnn", hidden=(400, 30), norm=norm, threshold=threshold)
    x, rng = images(), np.random.default_rng(0)
    solutions = {
        s.layer: s for s in initialize(net, name, generator=seeded(), x=x, alpha=alpha, law="analytic").solutions
    }
    first, back, second = (solutions[n] for n in ("fc1", "rec1", "fc2"))
    assert back.input_square == second.input_square
    spikes = (rng.random((4000, 400)) < back.input_square).astype(float)
    current = (spikes * rng.normal(0, math.sqrt(back.variance), (4000, 400))).sum(1)  # a neuron a row
    if norm == "none":
        pixels = x.flatten(1).double().numpy()[rng.integers(0, 64, 4000)]
        current += (pixels * rng.normal(0, math.sqrt(first.variance), (4000, 64))).sum(1)
    else:
        current += rng.normal(0, 1.0 if norm == "bn" else threshold, 4000)
    assert (current >= threshold).mean() == pytest.approx(second.input_square, abs=4 * 0.5 / math.sqrt(4000))
    if name == "ikun":
        moment = np.mean((1 + (math.pi * (current - threshold)) ** 2) ** -2.0)
        assert first.derivative_square == back.derivative_square == pytest.approx(moment, rel=0.12)
        for s, fan in ((first, 64), (back, 400)):
            assert s.variance == pytest.approx(alpha / (fan * s.input_square * s.derivative_square))
    else:
        assert [s.variance for s in (first, back)] == pytest.approx(
            [1 / (64 * first.input_square), 1 / (400 * back.input_square)]
        )


def test_analytic_law_behind_a_norm_has_its_weight_for_standard_deviation() -> None:
    found = []
    for norm, threshold, surrogate in (("bn", 1.0, "atan:2"), ("tdbn", 3.0, "atan:0.6666666666666666")):
        net = network(hidden=(40,), norm=norm, threshold=threshold, surrogate=surrogate)
        solutions, _ = run("ikun", net, images(), law="analytic")
        found.append(solutions["fc1"])
    # h, threshold and the width of f' all three times as large: f'^2 nine times smaller
    assert found[0].derivative_square == pytest.approx(9 * found[1].derivative_square, rel=1e-6)


@pytest.mark.parametrize("name", ["delta_orthogonal", "lsuv", "fluctuation", "firing", "gradient_stable"])
def test_rules_that_measure_need_a_batch(name: str) -> None:
    with pytest.raises(ValueError, match=f"the {name} initializer needs a batch of inputs"):
        initialize(network(model="rsnn"), name, generator=seeded())


@pytest.mark.parametrize("name", ["alpha", "gain"])
@pytest.mark.parametrize("value", [1e-300, 5e-324, 1e-13, 1e13, 1e300])
def test_factors_that_leave_no_weights_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be from 1e-12 to 1e\\+12"):
        TrainingSpec(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [1e-300, 5e-324, 1e300])
def test_a_variance_beyond_float32_is_refused(alpha: float) -> None:
    """From Python, without the settings of a training."""
    torch.manual_seed(0)
    net = Network(Spec(channels=2))
    with pytest.raises(ValueError, match=r"the variance of the weights of layer .* would be|has no solution for layer"):
        initialize(net, "ikun", generator=seeded(0), x=torch.rand(8, *net.spec.input_shape), alpha=alpha)
