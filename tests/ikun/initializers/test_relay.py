"""Tests of the rule whose hidden layers repeat spikes: the spikes themselves, and the gain of the gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from draws import images, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ikun.initializers.catalog import initialize
from ikun.initializers.two_sided import TOLERANCE
from ikun.networks import Network, Spec


def mlp(depth: int, **values: object) -> Network:
    torch.manual_seed(0)
    return Network(Spec(model="mlp", hidden=(24,) * depth, norm="none", **values)).double()  # type: ignore[arg-type]


def spikes_by_hand(net: Network, x: Tensor, decay: float, gain: float) -> list[np.ndarray]:
    """Spikes [T, N, units] of every layer by h = rest + decay (v - rest) + gain I, with a hard reset."""
    spec = net.spec
    layer_input = [x.flatten(1).numpy()] * spec.timesteps
    found = []
    for w in (p.detach().numpy() for p in net.parameters() if p.dim() == 2):
        v, spikes = np.full((len(x), len(w)), spec.v_reset), []
        for one in layer_input:
            h = spec.v_reset + decay * (v - spec.v_reset) + gain * (one @ w.T)
            spikes.append((h >= spec.threshold).astype(float))
            v = np.where(spikes[-1] > 0, spec.v_reset, h)
        found.append(np.stack(spikes))
        layer_input = spikes
    return found


@settings(max_examples=15)
@given(
    st.integers(0, 1000),
    st.integers(2, 8),
    st.sampled_from([(1.0, 0.0), (0.7, 0.0), (1.5, -0.3), (1.0, 0.2)]),
    st.sampled_from([("if", 1.0, 1.0), ("lif", 0.5, 0.5)]),
    st.sampled_from(["atan:2", "sigmoid:4", "triangle:1"]),
)
def test_every_hidden_layer_repeats_the_spikes_of_the_first(
    seed: int, depth: int, levels: tuple[float, float], neuron: tuple[str, float, float], surrogate: str
) -> None:
    threshold, rest = levels
    net = mlp(depth, neuron=neuron[0], threshold=threshold, v_reset=rest, surrogate=surrogate)
    x = images().double()
    initialize(net, "relay", generator=seeded(seed), x=x)
    first, *others, _ = spikes_by_hand(net, x, neuron[1], neuron[2])
    assert first.any()
    for spikes in others:
        assert np.array_equal(spikes, first)


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize(("tau", "threshold"), [(3.0, 0.7), (5.0, 0.3), (2.3, 1.1), (3.7, 0.7)])
def test_spikes_are_repeated_in_single_precision_and_with_a_soft_reset(
    reset: str, tau: float, threshold: float
) -> None:
    net = mlp(5, neuron="lif", tau=tau, threshold=threshold, reset=reset, timesteps=8).float()
    initialize(net, "relay", generator=seeded(), x=images())
    seen: list[Tensor] = []
    for *_, neuron in net.stages():
        neuron.register_forward_hook(lambda m, a, spikes: seen.append(spikes.detach()))
    net(images())
    assert seen[0].any()
    assert all(torch.equal(spikes, seen[0]) for spikes in seen[1:-1])


def by_hand(net: Network, x: Tensor, at_output: np.ndarray) -> list[float]:
    """Squared norms of the gradients by the currents of every layer: hard reset to 0, threshold 1, no leak, atan:2."""
    steps, layer_input = net.spec.timesteps, [x.flatten(1).numpy()] * net.spec.timesteps
    weights, states = [p.detach().numpy() for p in net.parameters() if p.dim() == 2], []
    for w in weights:
        v, h, s = np.zeros((len(x), len(w))), [], []
        for one in layer_input:
            h.append(v + one @ w.T)
            s.append((h[-1] >= 1).astype(float))
            v = h[-1] * (1 - s[-1])
        states.append((h, s))
        layer_input = s
    gradient = [at_output] * steps
    found = [float(np.square(gradient).sum())]
    for w, (h, s) in zip(weights[:0:-1], states[-2::-1], strict=True):
        to_spikes, carried, gradient = [one @ w for one in gradient], np.zeros_like(h[0]), [at_output] * steps
        for t in reversed(range(steps)):
            slope = 1 / (1 + (np.pi * (h[t] - 1)) ** 2)
            carried = (to_spikes[t] - carried * h[t]) * slope + carried * (1 - s[t])
            gradient[t] = carried
        found.append(float(np.square(gradient).sum()))
    return found[::-1]


@pytest.mark.parametrize("depth", [3, 8])
def test_the_gradient_has_the_same_norm_before_and_after_the_repeating_layers(depth: int) -> None:
    net, x = mlp(depth), images().double()
    done = initialize(net, "relay", generator=seeded(4), x=x)
    assert all(s.converged for s in done.solutions)
    norms = []
    for seed in range(20):  # over gradients that the rule did not see
        at_output = torch.randn(len(x), 10, generator=seeded(seed), dtype=torch.float64).numpy()
        before, *_, after, _ = by_hand(net, x, at_output)
        norms.append(math.log(before / after))
    assert abs(np.mean(norms)) < 3 * TOLERANCE
    first, second = (p for name, p in net.named_parameters() if name in ("fc2.weight", "fc3.weight"))
    assert torch.equal(first, second)
    assert torch.equal(first, first[0, 0] * torch.eye(24, dtype=torch.float64))
    assert float(first[0, 0].detach()) >= 1


def test_a_gradient_that_shrinks_keeps_the_smallest_weights() -> None:
    net = mlp(4, surrogate="atan:0.5")
    done = initialize(net, "relay", generator=seeded(), x=images().double())
    assert [s.converged for s in done.solutions] == [True, False, False, False, True]
    assert float(net.get_submodule("fc2").weight[0, 0].detach()) == pytest.approx(1, rel=1e-3)


def test_convolutions_of_one_width_have_a_centre_and_nothing_else() -> None:
    net = Network(Spec(model="csnn", channels=6, depth=4, norm="none"))
    initialize(net, "relay", generator=seeded(), x=images())
    kernel = net.get_submodule("conv3").weight.detach()
    assert torch.equal(kernel[:, :, 1, 1], kernel[0, 0, 1, 1] * torch.eye(6))
    assert float(kernel.abs().sum()) == pytest.approx(6 * float(kernel[0, 0, 1, 1]))


def test_what_has_no_solution_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^the relay rule has no solution for the recurrent layer rec1: choose"):
        initialize(Network(Spec(model="rsnn", hidden=(8, 8), norm="none")), "relay", generator=seeded(), x=images(8))
    with pytest.raises(ValueError, match=r"^the relay rule needs a hidden layer without a norm and with as many"):
        initialize(Network(Spec(model="mlp", hidden=(9, 8), norm="none")), "relay", generator=seeded(), x=images(8))
