"""Tests of sharpness-aware minimization: a step against NumPy, the relaxed twin, BatchNorm, dropout, resumption."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from ikun.checkpoint import load_checkpoint
from ikun.data.spec import DataSpec
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.training import update as module
from ikun.training.loop import train
from ikun.training.spec import TrainingSpec
from ikun.training.update import relaxed_twin, update

Array = npt.NDArray[np.float64]
NET = Spec(channels=2, timesteps=2, neuron="plif", dropout=0.2)
DATA = DataSpec("digits", 96, 5)
RUN = TrainingSpec(alpha=0.1, epochs=3, batch_size=32, lr=5e-3)


def logistic(w: Array, b: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Gradients of the mean cross-entropy of softmax(x W^T + b), in closed form."""
    z = x @ w.T + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return p.T @ x / len(y), p.mean(0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_is_that_of_the_papers(adaptive: bool) -> None:
    """Logistic regression with SGD, in float64, against closed forms of the gradients."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))
    w, b = (p.detach().numpy().copy() for p in (net.weight, net.bias))
    rho, rate = 0.3, 0.7
    gw, gb = logistic(w, b, x.numpy(), y.numpy())
    tw, tb = (np.abs(w) + 0.01, np.ones_like(b)) if adaptive else (np.ones_like(w), np.ones_like(b))
    norm = np.sqrt(((tw * gw) ** 2).sum() + ((tb * gb) ** 2).sum())
    hw, hb = logistic(w + rho * tw**2 * gw / norm, b + rho * tb**2 * gb / norm, x.numpy(), y.numpy())
    out, loss, length = update(
        net, LOSSES["ce"], torch.optim.SGD(net.parameters(), rate), x, y, radius=rho, adaptive=adaptive
    )
    np.testing.assert_allclose(net.weight.detach().numpy(), w - rate * hw, rtol=1e-12)
    np.testing.assert_allclose(net.bias.detach().numpy(), b - rate * hb, rtol=1e-12)
    np.testing.assert_allclose(out.numpy(), x.numpy() @ w.T + b)  # outputs, loss and norm are those before the step
    assert float(loss) == pytest.approx(float(LOSSES["ce"](out, y)), rel=1e-12)
    assert length == pytest.approx(np.sqrt((gw**2).sum() + (gb**2).sum()), rel=1e-12)


@pytest.mark.parametrize("relaxed", [False, True])
def test_a_step_of_a_spiking_network_is_that_of_a_copy(relaxed: bool) -> None:
    """Plain torch on a network of its own (built as relaxed or not), against the twin that shares its weights."""
    torch.manual_seed(1)
    spec = Spec(model="mlp", hidden=(12,), timesteps=3, norm="bn")
    net = Network(spec).double().train()
    x, y = torch.rand(16, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (16,))
    oracle = Network(dataclasses.replace(spec, relaxed=relaxed)).double().train()
    oracle.load_state_dict(net.state_dict())
    parameters = list(oracle.parameters())
    first = torch.autograd.grad(LOSSES["mse"](oracle(x, plain=True), y), parameters)
    statistics = {k: v.clone() for k, v in oracle.named_buffers()}  # of the pass at w only
    length = torch.cat([g.flatten() for g in first]).norm()
    moved = copy.deepcopy(oracle)
    with torch.no_grad():
        for p, g in zip(moved.parameters(), first, strict=True):
            p.add_(0.5 * g / length)
    second = torch.autograd.grad(LOSSES["mse"](moved(x, plain=True), y), list(moved.parameters()))
    forward = relaxed_twin(net) if relaxed else net
    update(forward, LOSSES["mse"], torch.optim.SGD(net.parameters(), 0.1), x, y, radius=0.5)
    for p, old, g in zip(net.parameters(), parameters, second, strict=True):
        torch.testing.assert_close(p.detach(), old.detach() - 0.1 * g, rtol=1e-9, atol=1e-12)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, statistics[name])


def test_adaptive_steps_ignore_a_rescaling_of_two_layers() -> None:
    """Without the small eta: T g is invariant, and so is the loss at the perturbed weights (ASAM, section 3)."""
    weights = [torch.tensor([2.0, -3.0], dtype=torch.float64), torch.tensor([0.5, 4.0], dtype=torch.float64)]

    def loss(w: list[Tensor]) -> Tensor:
        return ((w[0] * w[1]).sum() - 3).square()

    values = []
    for factor in (1.0, 1000.0):
        scaled = [(weights[0] * factor).requires_grad_(), (weights[1] / factor).requires_grad_()]
        loss(scaled).backward()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "ASAM_ETA", 0.0)
            steps = module.ascent(("a.weight", "b.weight"), scaled, 0.1, True)
        values.append(float(loss([w.detach() + e for w, e in zip(scaled, steps, strict=True)])))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_zero_gradient_moves_nothing() -> None:
    w = torch.ones(3, requires_grad=True)
    assert all(bool((e == 0).all()) for e in module.ascent(("w",), (w,), 0.1, False))


def test_both_passes_draw_the_same_dropout_mask() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 2, bias=False))
    seen: list[Tensor] = []
    net[0].register_forward_hook(lambda _m, _x, out: seen.append(out.clone()))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    update(net, LOSSES["mse"], optimizer, torch.ones(4, 50), torch.zeros(4, dtype=torch.long), radius=0.1, seed=3)
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert bool((seen[0] == 0).any())


SETTINGS: dict[str, dict[str, Any]] = {
    "sam": {"sam": 0.05},
    "asam": {"sam": 0.5, "asam": True},
    "relaxed": {"sam": 0.05, "sam_forward": "relaxed", "relaxed_accuracy": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_interrupted_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    spec = dataclasses.replace(RUN, **SETTINGS[name])
    whole = train(NET, DATA, spec, tmp_path / "whole.pt")
    out = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(NET, DATA, spec, out, progress=interrupt(5))
    again = train(NET, DATA, spec, out, resume=True)
    assert all(torch.equal(v, whole.state[k]) for k, v in again.state.items())
    assert again.history == whole.history
    found = load_checkpoint(out)
    assert {k: found.training[k] for k in SETTINGS[name]} == SETTINGS[name]
    assert not found.network.relaxed
    assert ("relaxed_test_accuracy" in found.history[-1]) == (name == "relaxed")
    plain = train(NET, DATA, RUN, tmp_path / "plain.pt")
    assert not all(torch.equal(v, whole.state[k]) for k, v in plain.state.items())


def interrupt(at: int) -> Callable[[int, int, str], None]:
    def stop(done: int, total: int, note: str) -> None:
        if done == at:
            raise KeyboardInterrupt

    return stop


def test_the_relaxed_accuracy_is_that_of_the_relaxed_network(tmp_path: Path) -> None:
    spec = dataclasses.replace(RUN, epochs=1, relaxed_accuracy=True)
    found = train(NET, DATA, spec, tmp_path / "run.pt")
    test = DATA.load("test")
    with torch.no_grad():
        outputs = found.build(relaxed=True)(test.images)
        hard = found.build()(test.images)
    line = found.history[-1]
    for out, key in ((outputs, "relaxed_test_accuracy"), (hard, "test_accuracy")):
        assert line[key] == pytest.approx(float((out.argmax(1) == test.labels).double().mean()))
    assert line["relaxed_test_loss"] == pytest.approx(float(LOSSES["mse"](outputs, test.labels)), rel=1e-5)


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asam needs a radius"):
        TrainingSpec(asam=True)
    with pytest.raises(ValueError, match="radius, must be from 0"):
        TrainingSpec(sam=-0.1)
    with pytest.raises(ValueError, match="sam_forward must be one of spiking, relaxed"):
        TrainingSpec(sam_forward="soft")
    spec = dataclasses.replace(RUN, sam=0.1, sam_forward="relaxed")
    with pytest.raises(ValueError, match=r"fast_sigmoid:25 has area 0.08.*no relaxed network"):
        train(dataclasses.replace(NET, surrogate="fast_sigmoid:25"), DATA, spec, tmp_path / "run.pt")
