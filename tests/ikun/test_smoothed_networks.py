"""Tests of the smoothed operator on networks of other libraries, recurrent networks, and other outputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor, nn

from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import dense, symmetry_error
from hessian_tools.perturbation import noise, noise_scales
from ikun.adapters import adapt
from ikun.averages import _delayed
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.nodes.passes import ScanSpec as NeuronSpec
from ikun.smoothed_operator import smoothed

pytestmark = pytest.mark.usefixtures("one_thread")
Array = NDArray[np.float64]
X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(6) % 3


def ours(**fields: Any) -> Network:
    torch.manual_seed(1)
    small = {"input_shape": (1, 8, 8), "channels": 3, "classes": 3, "timesteps": 3, "threshold": 0.6}
    net = Network(Spec(**{**small, **fields})).double().eval()
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.weight.data.mul_(2).add_(0.03)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.1, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(m.bias, 0, 0.5)
    return net


def relative(found: Tensor | Array, exact: Tensor | Array) -> float:
    return float(np.linalg.norm(np.asarray(found) - np.asarray(exact)) / np.linalg.norm(np.asarray(exact)))


# --- other libraries


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize(("kind", "reset"), [("if", "hard"), ("lif", "soft")])
def test_a_network_of_spikingjelly_has_the_operator_of_the_same_network_of_ours(
    kind: str, reset: str, mode: str
) -> None:
    functional, layer, neuron = (
        pytest.importorskip(f"spikingjelly.activation_based.{name}") for name in ("functional", "layer", "neuron")
    )
    net = ours(neuron=kind, tau=1.6, reset=reset)

    def spiking() -> nn.Module:
        settings = {"v_threshold": 0.6, "v_reset": 0.0 if reset == "hard" else None}
        found: nn.Module = neuron.IFNode(**settings) if kind == "if" else neuron.LIFNode(tau=1.6, **settings)
        return found

    parts = []
    for inputs in (1, 3):
        parts += [layer.Conv2d(inputs, 3, 3, padding=1, bias=False), layer.BatchNorm2d(3), spiking()]
        parts += [layer.MaxPool2d(2, 2)]
    parts += [layer.Flatten(), layer.Linear(12, 48, bias=False), spiking(), layer.Linear(48, 3, bias=False), spiking()]
    theirs = nn.Sequential(*parts).double()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), net.state_dict().values(), strict=True)))
    functional.set_step_mode(theirs, mode)
    adapted = adapt(theirs, X, steps=3)
    v = torch.randn(
        sum(p.numel() for p in net.parameters()), dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    expected = smoothed(make_objective(net, LOSSES["ce"], (X, Y)), scale=0.2, draws=4) @ v
    objective = make_objective(adapted.model, LOSSES["ce"], (X, Y), dtype=torch.float64, reset=adapted.reset)
    op = smoothed(objective, scale=0.2, draws=4)
    assert expected.norm() > 1
    assert relative(op @ v, expected) < 1e-12
    assert op.path == "traced"


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_neurons_that_are_reset_at_the_next_step_fire_as_in_snntorch(reset: str) -> None:
    snntorch = pytest.importorskip("snntorch")
    x = torch.rand(9, 50, generator=torch.Generator().manual_seed(3)).double()
    cell, spikes = snntorch.Leaky(beta=0.7, threshold=0.8, reset_mechanism=reset), []
    memory = cell.init_leaky()
    for current in x:
        spike, memory = cell(current, memory)
        spikes.append(spike)
    found = _delayed(x, NeuronSpec(decay=0.7, threshold=0.8, reset="soft", detach_reset=True), reset)
    assert torch.equal(found, torch.stack(spikes).to(found))
    assert 0.1 < found.mean() < 0.9


# --- recurrence


def recurrent(feedback: float, model: str = "rsnn") -> Objective:
    net = ours(model=model, hidden=(5,), norm="none", input_shape=(1, 1, 4), coding="poisson", timesteps=4)
    for name, p in net.named_parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(4)).double() / 2 + 0.2
        if name == "rec1.weight":
            p.data.mul_(feedback)
    x = (torch.rand(7, 4, 1, 1, 4, generator=torch.Generator().manual_seed(5)) < 0.6).double()
    params = "fc*" if not feedback else "*"
    return make_objective(net, LOSSES["mse"], (x, torch.arange(7) % 3), params=params)


def test_without_recurrent_weights_a_recurrent_network_is_feed_forward() -> None:
    one, two = (dense(smoothed(recurrent(0.0, model), scale=0.3, draws=6)) for model in ("rsnn", "mlp"))
    assert two.norm() > 0
    assert relative(one, two) < 1e-12


def test_a_traced_product_without_its_derivatives_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded with what a function holds, this network's product is zero; only the comparison with autograd tells."""
    monkeypatch.setattr("hessian_tools.engine.tape.holds_tensors", lambda *a: False)
    found = dense(smoothed(recurrent(0.0), scale=0.3, draws=6))
    assert relative(found, dense(smoothed(recurrent(0.0, "mlp"), scale=0.3, draws=6))) < 1e-12


def oracle(objective: Objective, scale: float, draws: int) -> tuple[Array, Array]:
    """Tangents of the output neurons' mean currents [P, N, K] and of the hidden counts [P, N, F], in NumPy."""
    x = objective.batches[0][0].transpose(0, 1).flatten(2).numpy()  # [T, N, F]
    w, r, out = (p.detach().numpy() for p in objective.parameters.values())
    units = objective.split(scale * noise_scales(objective))

    def hidden(w: Array, r: Array) -> tuple[Array, Array]:
        s, v, spikes, zs = np.zeros((len(x[0]), 5)), 0.0, [], []
        for current in x:
            h = v + current @ w.T + s @ r.T
            s = (h >= 0.6).astype(float)
            v = h * (1 - s)
            spikes.append(s)
            zs.append(h - 0.6)
        return np.array(spikes), np.array(zs)

    seen = []
    for j in range(draws):
        z = objective.split(noise(objective, 0, j))
        seen.append(hidden(*(p + (u * e).numpy() for p, u, e in zip((w, r), units[:2], z[:2], strict=True))))
    own, own_z = hidden(w, r)
    zs = np.array([z for _, z in seen])
    density = norm.pdf(0, zs.mean(0), np.maximum(zs.std(0, ddof=1), 0.6e-3))
    size = objective.size
    s, v, tangents = np.zeros((size, len(x[0]), 5)), np.zeros((size, len(x[0]), 5)), []
    before = np.zeros_like(own[0])
    for t in range(len(x)):
        current = s @ r.T
        for a in range(5):
            current[a * 4 : a * 4 + 4, :, a] += x[t].T
            current[20 + a * 5 : 25 + a * 5, :, a] += before.T
        h = v + current
        s = density[t] * h
        v = (own_z[t] < 0) * h - 0.6 * s
        before = own[t]
        tangents.append(s)
    tangent = np.array(tangents)  # [T, P, N, 5]
    a = tangent.mean(0) @ out.T
    for k in range(3):
        a[45 + k * 5 : 50 + k * 5, :, k] += own.mean(0).T
    return a, tangent.sum(0)


def test_the_operator_of_a_recurrent_network_is_its_formula() -> None:
    """The rows of the readout, where J is known, give M sample by sample; then all rows are J' M J."""
    objective = recurrent(1.0)
    a, count = oracle(objective, 0.3, 6)
    found = dense(smoothed(objective, scale=0.3, draws=6)).numpy()
    # A sum over samples and outputs of m[n, k] (a a' + (sqrt(2) - 1) sum over f (w[k, f] / T)^2 c c'), linear in m
    out = list(objective.parameters.values())[-1].detach().numpy()
    columns = []
    for n in range(a.shape[1]):
        for k in range(3):
            own = np.einsum("pf,f,qf->pq", count[:, n], (out[k] / 4) ** 2, count[:, n])
            columns.append((np.outer(a[:, n, k], a[:, n, k]) + (math.sqrt(2) - 1) * own).ravel())
    design = np.array(columns).T
    m = np.linalg.lstsq(design, found.ravel(), rcond=None)[0]
    assert len(m) == 21
    assert np.linalg.norm(found[:45]) > 0.1 * np.linalg.norm(found)
    assert np.linalg.norm(design @ m - found.ravel()) < 1e-10 * np.linalg.norm(found)


# --- outputs that are not mean rates


def test_a_linear_readout_has_the_second_derivative_of_the_loss_at_its_outputs() -> None:
    layer, neuron = (pytest.importorskip(f"spikingjelly.activation_based.{name}") for name in ("layer", "neuron"))
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(5, 8), neuron.IFNode(), layer.Linear(8, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    x = torch.rand(9, 5, generator=torch.Generator().manual_seed(0))
    adapted = adapt(net, x, steps=4)
    objective = make_objective(
        adapted.model, LOSSES["mse"], (x, torch.arange(9) % 3), dtype=torch.float64, reset=adapted.reset
    )
    op = smoothed(objective, scale=0.3, draws=8)
    assert symmetry_error(op, torch.Generator().manual_seed(0)) < 1e-12
    matrix = dense(op)
    values = torch.linalg.eigvalsh(matrix)
    assert values[-1] > 0
    assert values[0] > -1e-12 * values[-1]  # a convex loss
    bias = objective.split(torch.arange(objective.size).double())[-1].long()
    torch.testing.assert_close(matrix[bias][:, bias], 2 / 3 * torch.eye(3).double())  # mean over N and K of o^2
