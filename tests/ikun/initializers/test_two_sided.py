"""Tests of the two-sided rule: its gains against NumPy's forward and backward pass through time, and its claim."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from draws import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ikun.initializers.catalog import initialize, initialize_module
from ikun.initializers.probe import Probe, stages_of
from ikun.initializers.two_sided import TOLERANCE, Gains, measure_gains
from ikun.networks import Network, Spec

Array = npt.NDArray[np.float64]


def mlp(hidden: tuple[int, ...] = (24, 24, 24), **values: object) -> Network:
    torch.manual_seed(0)
    return Network(Spec(model="mlp", hidden=hidden, norm="none", **values)).double()  # type: ignore[arg-type]


def images(samples: int = 64) -> Tensor:
    return torch.rand(samples, 1, 8, 8, generator=seeded(1), dtype=torch.float64)


def gains_of(net: Network, x: Tensor, seed: int = 0) -> Gains:
    probe = Probe(net, stages_of(net), x)
    return measure_gains(probe, probe.groups(), seeded(seed))


def by_hand(
    weights: list[Array], x: Array, at_output: Array, steps: int, decay: float, gain: float, soft: bool
) -> Gains:
    """Currents and gradients of a fully connected network by the equations of its neurons, with threshold 1.

    h = decay v + gain I, s = 1 for h >= 1, and v = h (1 - s) or h - s. f'(z) = 1 / (1 + (pi z)^2).
    """
    layer_input: list[Array] = [x] * steps
    currents, potentials = [], []
    for w in weights:
        current = [one @ w.T for one in layer_input]
        v, h, s = np.zeros_like(current[0]), [], []
        for one in current:
            h.append(decay * v + gain * one)
            s.append((h[-1] >= 1).astype(float))
            v = h[-1] - s[-1] if soft else h[-1] * (1 - s[-1])
        currents.append(np.stack(current))
        potentials.append((h, s))
        layer_input = s
    gradient = [at_output] * steps
    found = [float(np.square(gradient).sum())]
    for w, (h, s) in zip(weights[:0:-1], potentials[-2::-1], strict=True):
        to_spikes, carried, gradient = [one @ w for one in gradient], np.zeros_like(h[0]), [np.zeros(0)] * steps
        for t in reversed(range(steps)):
            slope = 1 / (1 + (np.pi * (h[t] - 1)) ** 2)
            by_reset = -carried if soft else -carried * h[t]
            kept = carried if soft else carried * (1 - s[t])
            to_potential = (to_spikes[t] + by_reset) * slope + kept
            gradient[t], carried = gain * to_potential, decay * to_potential
        found.append(float(np.square(gradient).sum()))
    return Gains(tuple(float(c.var(ddof=1)) for c in currents), tuple(reversed(found)))


@pytest.mark.parametrize("neuron", ["if", "lif"])
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_gains_are_those_of_the_equations(neuron: str, reset: str) -> None:
    net = mlp(hidden=(20, 16, 12), neuron=neuron, reset=reset, timesteps=5)
    x = images(32)
    solved = initialize(net, "two_sided", generator=seeded(), x=x)
    weights = [w.detach().numpy() for w in net.parameters() if w.dim() == 2]
    at_output = torch.randn(32, 10, generator=seeded(3), dtype=torch.float64).numpy()
    decay, gain = (1.0, 1.0) if neuron == "if" else (0.5, 0.5)
    expected = by_hand(weights, x.flatten(1).numpy(), at_output, 5, decay, gain, reset == "soft")
    found = gains_of(net, x, seed=3)
    # the first current is the same at all steps, and stored once
    assert found.variances[0] == pytest.approx(expected.variances[0], rel=1e-3)
    assert found.variances[1:] == pytest.approx(expected.variances[1:], rel=1e-9)
    assert found.gradients == pytest.approx(expected.gradients, rel=1e-9)
    assert all(s.converged for s in solved.solutions)


@settings(max_examples=12)
@given(
    st.integers(0, 10_000),
    st.integers(2, 4),
    st.sampled_from(["atan:2", "sigmoid:4", "triangle:1"]),
    st.sampled_from([("if", 0.5), ("if", 1.0), ("lif", 0.5)]),
)
def test_forward_and_backward_gain_multiply_to_one(
    seed: int, depth: int, surrogate: str, neuron: tuple[str, float]
) -> None:
    """Over gradients that the rule did not see; its own tolerance is that of one gradient."""
    net = mlp(hidden=(48,) * depth, surrogate=surrogate, neuron=neuron[0], threshold=neuron[1])
    x = images()
    done = initialize(net, "two_sided", generator=seeded(seed), x=x)
    found = [gains_of(net, x, other) for other in range(10)]
    assert found[0].variances[0] == pytest.approx(neuron[1] ** 2, rel=1e-3)
    assert len(done.solutions) == depth + 1
    products = np.mean([np.log(g.forward) + np.log(g.backward) for g in found], 0)
    for solution, product in zip(done.solutions[1:], products, strict=True):
        assert abs(product) < 4 * TOLERANCE or not solution.converged


@given(st.integers(-6, 6))
@settings(max_examples=8)
def test_both_gains_of_the_last_layer_are_proportional_to_its_variance(power: int) -> None:
    net, x = mlp(), images()
    initialize(net, "two_sided", generator=seeded(), x=x)
    before = gains_of(net, x)
    with torch.no_grad():
        next(p for name, p in net.named_parameters() if name.startswith("fc4")).mul_(2.0**power)
    after = gains_of(net, x)
    assert after.forward[-1] == pytest.approx(before.forward[-1] * 4.0**power)
    assert after.backward[-1] == pytest.approx(before.backward[-1] * 4.0**power)
    assert after.forward[:-1] == before.forward[:-1]


@pytest.mark.parametrize("model", ["csnn", "resnet"])
def test_convolutions_and_residual_branches_have_a_solution(model: str) -> None:
    net = Network(Spec(model=model, channels=6, depth=3, norm="none"))
    done = initialize(net, "two_sided", generator=seeded(), x=images().float())
    assert sum(s.converged for s in done.solutions) >= len(done.solutions) - 1
    assert done.forward_passes == len(done.solutions) + done.solutions[0].passes + 1


def test_layers_before_a_norm_have_variance_one_over_fan_in() -> None:
    net = Network(Spec(model="mlp", hidden=(64, 64), norm="bn"))
    done = initialize(net, "two_sided", generator=seeded(), x=images().float())
    assert [s.variance * 64 for s in done.solutions[:2]] == pytest.approx([1, 1], rel=0.1)


def test_a_module_that_ends_without_neurons_is_scaled_too() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    x = images().float()
    model = {"neurons": nn.ReLU, "threshold": 1.0, "surrogate": "atan:2"}
    done = initialize_module(module, "two_sided", generator=seeded(), x=x, **model)  # type: ignore[arg-type]
    assert all(s.converged for s in done.solutions)
    assert float(module[1](x.flatten(1)).detach().var()) == pytest.approx(1, rel=1e-3)


def test_what_has_no_solution_is_one_line() -> None:
    recurrent = Network(Spec(model="rsnn", hidden=(8,), norm="none"))
    with pytest.raises(ValueError, match=r"^the two_sided rule has no solution for the recurrent layer rec1: choose"):
        initialize(recurrent, "two_sided", generator=seeded(), x=images(8).float())
    with pytest.raises(ValueError, match=r"^the gains of layer fc1 cannot be measured: its current does not vary$"):
        initialize(mlp(), "two_sided", generator=seeded(), x=torch.zeros(8, 1, 8, 8, dtype=torch.float64))
