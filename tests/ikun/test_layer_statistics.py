"""Tests of the layer statistics against forward and backward passes written in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from ikun.layer_statistics import LayerStatistics, batch_norm_by_batch, derivative_square, fans, observe
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

Array = npt.NDArray[np.float64]
STEPS, TAU, THETA, RESET = 3, 1.6, 0.7, -0.1


def network(**fields: Any) -> Network:
    spec = {
        "model": "mlp", "input_shape": (1, 2, 3), "hidden": (8, 5), "classes": 3, "norm": "none", "neuron": "lif",
        "tau": TAU, "threshold": THETA, "v_reset": RESET, "timesteps": STEPS,
    }  # fmt: skip
    torch.manual_seed(0)
    net = Network(Spec(**{**spec, **fields})).double()
    with torch.no_grad():
        for _, weights, *_ in net.stages():
            weights.weight.normal_(0.25, 1.2)
    return net


def batch(net: Network, count: int = 7) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.rand(count, *net.spec.input_shape, dtype=torch.float64, generator=g), torch.arange(count) % 3


def by_hand(net: Network, x: Array, y: Array) -> list[dict[str, float]]:
    """The same statistics of a hard-reset LIF MLP, recurrent or not, with atan:2 and the mean-square loss, in loops."""
    names = {name: w.weight.detach().numpy() for name, w, *_ in net.stages()}
    weights = [w for name, w in names.items() if name.startswith("fc")]
    backs = [names.get(f"rec{i}") for i in range(1, len(weights) + 1)]
    decay, gain = 1 - 1 / TAU, 1 / TAU
    layer_in = np.repeat(x.reshape(1, len(x), -1), STEPS, 0)
    inputs, currents, potentials, spikes = [], [], [], []
    for w, back in zip(weights, backs, strict=True):
        current = layer_in @ w.T
        v, h, s = np.full(current.shape[1:], RESET), np.zeros_like(current), np.zeros_like(current)
        for t in range(STEPS):
            if back is not None and t:
                current[t] += s[t - 1] @ back.T
            h[t] = decay * v + gain * current[t] + (1 - decay) * RESET
            s[t] = h[t] >= THETA
            v = np.where(s[t] == 1, RESET, h[t])
        inputs.append(layer_in)
        currents.append(current)
        potentials.append(h)
        spikes.append(s)
        layer_in = s
    slopes = [1 / (1 + (math.pi * (h - THETA)) ** 2) for h in potentials]
    rates = spikes[-1].mean(0)
    g = np.repeat((2 * (rates - np.eye(3)[y]) / rates.size / STEPS)[None], STEPS, 0)
    gradients: list[Array] = []
    for w, back, h, s, f1 in zip(*(q[::-1] for q in (weights, backs, potentials, spikes, slopes)), strict=True):
        gv, gx = np.zeros(h.shape[1:]), np.zeros_like(h)
        for t in reversed(range(STEPS)):
            gs = g[t] if back is None or t == STEPS - 1 else g[t] + gx[t + 1] @ back
            gh = (gs + gv * (RESET - h[t])) * f1[t] + gv * (1 - s[t])
            gx[t], gv = gain * gh, decay * gh
        gradients.insert(0, gx)
        g = gx @ w
    found = []
    for i, w in enumerate(weights):
        rate = spikes[i].mean((0, 1))
        found.append(
            {
                "fan_in": w.shape[1],
                "fan_out": w.shape[0],
                "weight_variance": w.var(ddof=1),
                "input_square": (inputs[i] ** 2).mean(),
                "derivative_square": (slopes[i] ** 2).mean(),
                "firing_rate": rate.mean(),
                "dead": (rate == 0).mean(),
                "saturated": (rate == 1).mean(),
                "current_variance": currents[i].var(ddof=1),
                "gradient_square": (gradients[i] ** 2).mean(),
                "forward_gain": currents[i].var(ddof=1) / currents[i - 1].var(ddof=1) if i else math.nan,
                "backward_gain": (gradients[i - 1] ** 2).mean() / (gradients[i] ** 2).mean() if i else math.nan,
                "derivative_square_by_step": (slopes[i] ** 2).mean((1, 2)),
            }
        )
        if (back := backs[i]) is not None:
            before = np.concatenate([np.zeros_like(spikes[i][:1]), spikes[i][:-1]])
            own = {"fan_in": len(back), "fan_out": len(back), "weight_variance": back.var(ddof=1)}
            found.append({**found[-1], **own, "input_square": (before**2).mean()})
    return found


def test_every_field_is_the_direct_computation() -> None:
    net = network()
    with torch.no_grad():  # one dead and one saturated neuron
        net.fc1.weight[0] = -1.0
        net.fc1.weight[1] = 5.0
    x, y = batch(net)
    x += 0.2
    found, exact = observe(net, x, y, LOSSES["mse"]), by_hand(net, x.numpy(), y.numpy())
    assert [(s.name, s.neuron) for s in found] == [("fc1", "spike1"), ("fc2", "spike2"), ("fc3", "spike3")]
    for s, values in zip(found, exact, strict=True):
        # the stride-0 input is repeated over time; ddof = 1 counts T times as many values
        for name, value in values.items():
            assert getattr(s, name) == pytest.approx(value, rel=1e-10, abs=0, nan_ok=True), (s.name, name)
        assert len(s.derivative_square_by_step) == STEPS
        assert np.mean(s.derivative_square_by_step) == pytest.approx(s.derivative_square)
    assert found[0].dead >= 1 / 8
    assert found[0].saturated >= 1 / 8
    assert all(s.gradient_square > 0 for s in found)


def test_recurrent_layers_share_their_neurons() -> None:
    net = network(model="rsnn")
    x, y = batch(net)
    found, exact = observe(net, x, y, LOSSES["mse"]), by_hand(net, x.numpy(), y.numpy())
    neurons = ["spike1", "spike1", "spike2", "spike2", "spike3"]
    assert [(s.name, s.neuron) for s in found] == list(zip(["fc1", "rec1", "fc2", "rec2", "fc3"], neurons, strict=True))
    for s, values in zip(found, exact, strict=True):
        for name, value in values.items():
            assert getattr(s, name) == pytest.approx(value, rel=1e-10, abs=0, nan_ok=True), (s.name, name)
    assert found[1].input_square != found[2].input_square > 0  # without and with the last spike


def test_residual_layers_see_the_sum_of_spikes() -> None:
    net = network(model="resnet", input_shape=(1, 5, 5), channels=4, depth=2)
    x, y = batch(net)
    found = observe(net, x, y, LOSSES["mse"])
    inputs: list[Tensor] = []
    currents: list[Tensor] = []

    def layer(i: int, before: Tensor) -> Tensor:
        inputs.append(before)
        out = net.get_submodule(f"conv{i}")(before.flatten(0, 1)).unflatten(0, (-1, 7))
        currents.append(out.expand(STEPS, *out.shape[1:]))
        currents[-1].retain_grad()
        return net.get_submodule(f"spike{i}")(currents[-1])

    s = net.pool1(layer(1, x[None]))
    for i in (2, 4):
        s = s + layer(i + 1, layer(i, s))
    inputs.append(s.flatten(2))
    currents.append(net.fc1(inputs[-1]))
    currents[-1].retain_grad()
    rates = net.spike6(currents[-1]).mean(0)
    torch.testing.assert_close(rates, net(x))
    LOSSES["mse"](rates, y).backward()
    assert inputs[3].max() == 2  # an input of spikes no longer
    assert [o.name for o in found] == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc1"]
    for i, o in enumerate(found):
        grad = currents[i].grad
        assert grad is not None
        assert o.input_square == pytest.approx(float(inputs[i].detach().square().mean()), rel=1e-10)
        assert o.current_variance == pytest.approx(float(currents[i].detach().var()), rel=1e-10)
        assert o.gradient_square == pytest.approx(float(grad.square().mean()), rel=1e-10)
        if i:
            assert o.backward_gain == pytest.approx(found[i - 1].gradient_square / o.gradient_square)
            assert o.forward_gain == pytest.approx(o.current_variance / found[i - 1].current_variance)


def test_dead_means_never_and_saturated_means_always() -> None:
    """Four neurons over 20 samples: one always fires, one all but once, one only once, one never."""
    net = network(input_shape=(1, 1, 4), hidden=(), classes=4, neuron="if", v_reset=0.0, timesteps=2)
    with torch.no_grad():
        net.fc1.weight.copy_(torch.eye(4))
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).double().repeat(20, 1)
    x[3, 1], x[5, 2] = 0.4, 0.4  # below the threshold, .7, at the first step, above it at the second
    (s,) = observe(net, x.reshape(20, 1, 1, 4), torch.zeros(20).long(), LOSSES["mse"])
    assert (s.dead, s.saturated) == (0.25, 0.25)
    assert s.firing_rate == pytest.approx((40 + 39 + 1) / 160)


def test_observing_changes_nothing() -> None:
    net = network(norm="bn").eval()
    x, y = batch(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        first = observe(net, x, y, LOSSES["mse"])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    second = observe(net, x, y, LOSSES["mse"])
    assert [s.gradient_square for s in first] == [s.gradient_square for s in second]
    assert not net.training


def test_hooks_are_removed_after_an_error() -> None:
    net = network()
    with pytest.raises(ValueError, match="input must be"):
        observe(net, torch.rand(2, 6), torch.zeros(2).long(), LOSSES["mse"])
    assert not any(m._forward_hooks for m in net.modules())


def test_currents_are_taken_behind_the_norm() -> None:
    net = network(norm="bn").train()
    x, y = batch(net)
    with batch_norm_by_batch(net):
        found = observe(net, x, y, LOSSES["mse"])
    count = 7 * STEPS
    assert found[1].current_variance == pytest.approx(1, rel=2 / (count - 1))
    assert found[1].forward_gain == pytest.approx(1, rel=0.1)


def test_convolutions_count_their_kernel() -> None:
    assert fans(torch.zeros(5, 3, 3, 3)) == (27, 45)
    assert fans(torch.zeros(5, 3, 1, 7)) == (21, 35)
    assert fans(torch.zeros(5, 3)) == (3, 5)
    net = network(model="csnn", input_shape=(2, 4, 4), channels=3)
    x, y = batch(net)
    found = observe(net, x, y, LOSSES["ce"])
    assert [(s.name, s.fan_in, s.fan_out) for s in found] == [
        ("conv1", 18, 27), ("conv2", 27, 27), ("fc1", 3, 48), ("fc2", 48, 3),
    ]  # fmt: skip
    assert found[0].input_square == pytest.approx(float(x.square().mean()))


def test_derivative_square_is_taken_at_the_membrane_before_the_reset() -> None:
    neuron = network().spike1
    current = torch.full((1, 1, 1), TAU * 2.0, dtype=torch.float64)  # h = v_reset decay + 2 + v_reset gain
    h = RESET * (1 - 1 / TAU) + 2 + RESET / TAU
    assert derivative_square(neuron, current) == pytest.approx((1 + (math.pi * (h - THETA)) ** 2) ** -2)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_rule_variance_is_the_theorem(alpha: float) -> None:
    s = LayerStatistics("fc1", "spike1", 50, 10, 0.1, 0.2, 0.3, 0, 0, 0, 1, 1)
    assert s.rule_variance(alpha) == pytest.approx(alpha / (50 * 0.2 * 0.3))
    assert LayerStatistics("fc1", "spike1", 50, 10, 0.1, 0.0, 0.3, 0, 1, 0, 1, 1).rule_variance() == math.inf


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_by_batch_leaves_the_running_statistics(training: bool) -> None:
    net = network(norm="bn").train(training)
    net.norm1.eval()
    x, _ = batch(net)
    with torch.no_grad():
        for norm in (net.norm1, net.norm2):
            norm.running_mean.fill_(3.0)
            norm.running_var.fill_(7.0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    momentum = net.norm1.momentum
    seen: list[Tensor] = []
    handle = net.norm1.register_forward_hook(lambda _, arguments, output: seen.append(output.detach()))
    with batch_norm_by_batch(net):
        net(x)
    handle.remove()
    assert seen[0].mean(0).abs().max() < 1e-12
    np.testing.assert_allclose(seen[0].var(0, unbiased=False), 1, rtol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    with pytest.raises(RuntimeError, match="stop"), batch_norm_by_batch(net):
        raise RuntimeError("stop")
    assert [m.training for m in net.modules()] == modes
    assert net.norm1.momentum == momentum
    net.train()(x)  # and afterwards they move again
    assert not torch.equal(net.norm1.running_mean, before["norm1.running_mean"])
