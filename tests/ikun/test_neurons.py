"""Tests of the neurons against a loop over time in NumPy, closed forms and finite differences."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from ikun.neurons import NEURONS, RESETS, Dynamics, Neuron, membrane, scan
from ikun.surrogates import Surrogate

Array = npt.NDArray[np.float64]
ATAN = Dynamics(Surrogate("atan", 2.0))
T, SHAPE = 6, (3, 5)


def drive(scale: float = 1.5, steps: int = T) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(steps, *SHAPE, dtype=torch.float64, generator=g) * scale + 0.4


def potentials() -> Tensor:
    return torch.randn(*SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.3


def loop(x: Array, v: Array, decay: float, gain: float, d: Dynamics) -> tuple[Array, Array, Array]:
    """(h, spikes, v[T]) one neuron and one step at a time."""
    h, s, v = np.zeros_like(x), np.zeros_like(x), v.copy()
    for t in range(len(x)):
        for i in np.ndindex(v.shape):
            h[t][i] = decay * v[i] + gain * x[t][i] + (1 - decay) * d.v_reset
            if h[t][i] >= d.threshold:
                s[t][i] = 1
                v[i] = d.v_reset if d.reset == "hard" else h[t][i] - d.threshold
            else:
                v[i] = h[t][i]
    return h, s, v


def rates(kind: str, tau: float) -> tuple[float, float]:
    return (1.0, 1.0) if kind == "if" else (1 - 1 / tau, 1 / tau)


@pytest.mark.parametrize("v_reset", [0.0, -0.3, 0.2])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", NEURONS)
def test_neuron_is_the_loop(kind: str, reset: str, v_reset: float) -> None:
    d = replace(ATAN, reset=reset, v_reset=v_reset, threshold=0.7)
    neuron = Neuron(kind, d, tau=1.7).double()
    x = drive()
    h, s, _ = loop(x.numpy(), np.full(SHAPE, v_reset), *rates(kind, 1.7), d)
    found = neuron(x)
    assert 0.1 < s.mean() < 0.9
    np.testing.assert_array_equal(found.detach(), s)
    tolerance = 1e-6 if kind == "plif" else 1e-13  # PLIF's logit starts as a float32 number
    np.testing.assert_allclose(neuron.membrane(x), h, atol=tolerance)
    assert torch.equal(neuron(x), found)  # no state is kept


def test_plif_starts_at_its_tau_and_learns_it() -> None:
    for tau in (1.1, 2.0, 20.0):
        neuron = Neuron("plif", ATAN, tau)
        decay, gain = neuron.rates()
        assert [decay.item(), gain.item()] == pytest.approx([1 - 1 / tau, 1 / tau], rel=1e-6)
    assert [n for n, _ in neuron.named_parameters()] == ["logit"]
    assert not list(Neuron("lif", ATAN).parameters())
    neuron(drive().float()).sum().backward()
    assert neuron.logit.grad is not None
    assert float(neuron.logit.grad) != 0


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize(("decay", "gain"), [(1.0, 1.0), (0.5, 0.5), (0.8, 1.3)])
def test_scan_takes_a_start_and_returns_the_end(decay: float, gain: float, reset: str) -> None:
    d = replace(ATAN, reset=reset, v_reset=-0.1)
    x, v0 = drive(), potentials()
    h, s, v = loop(x.numpy(), v0.numpy(), decay, gain, d)
    spikes, end = scan(x, v0, decay, gain, d)
    np.testing.assert_array_equal(spikes, s)
    np.testing.assert_allclose(end, v, atol=1e-13)
    np.testing.assert_allclose(membrane(x, v0, decay, gain, d), h, atol=1e-13)
    first, middle = scan(x[:2], v0, decay, gain, d)
    second, last = scan(x[2:], middle, decay, gain, d)
    assert torch.equal(torch.cat([first, second]), spikes)
    assert torch.equal(last, end)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("detach", [False, True])
def test_chained_chunks_have_the_derivatives_of_one_run(reset: str, detach: bool) -> None:
    """First and second derivatives in x, v0, decay and gain, through v[T] of the first chunk."""
    d = replace(ATAN, reset=reset, detach_reset=detach)
    weights = drive(1.0)
    found = []
    for cuts in ((0, T), (0, 2, 3, T)):
        leaves = [drive(), potentials(), torch.tensor(0.7).double(), torch.tensor(0.9).double()]
        x, v, decay, gain = (leaf.requires_grad_() for leaf in leaves)
        out, state = [], v
        for a, b in itertools.pairwise(cuts):
            s, state = scan(x[a:b], state, decay, gain, d)
            out.append(s)
        value = (torch.cat(out) * weights).sum() + state.square().sum()
        g = torch.autograd.grad(value, leaves, create_graph=True)
        h = torch.autograd.grad(sum((q * q).sum() for q in g), leaves)  # type: ignore[arg-type]
        found.append([*g, *h])
    for a, b in zip(*found, strict=True):
        assert float(a.detach().abs().max()) > 0
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reset", RESETS)
def test_detached_reset_changes_the_derivative_and_not_the_value(reset: str) -> None:
    x = drive().requires_grad_()
    values, gradients = [], []
    for detach in (False, True):
        s, v = scan(x, potentials(), 0.9, 1.0, replace(ATAN, reset=reset, detach_reset=detach))
        values.append(torch.cat([s.detach().flatten(), v.detach().flatten()]))
        gradients.append(torch.autograd.grad(s.sum(), x)[0])
    assert torch.equal(*values)
    assert float((gradients[0] - gradients[1]).abs().max()) > 1e-3
    assert torch.equal(gradients[0][-1], gradients[1][-1])  # nothing follows the last step


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("detach", [False, True])
def test_gradient_is_the_adjoint_scan_of_the_notes(reset: str, detach: bool) -> None:
    """The adjoint of a scan, written out in NumPy: q = gs + gv (v_reset - h), gh = q f' + gv (1 - s)."""
    d = replace(ATAN, reset=reset, detach_reset=detach, v_reset=-0.2)
    x, decay, gain = drive().requires_grad_(), 0.8, 1.1
    gs = drive(1.0).numpy()
    s, v = scan(x, potentials(), decay, gain, d)
    (found,) = torch.autograd.grad((s * torch.from_numpy(gs)).sum() + v.sum(), x)
    h, fired, _ = loop(x.detach().numpy(), potentials().numpy(), decay, gain, d)
    gv, exact = np.ones(SHAPE), np.zeros((T, *SHAPE))
    for t in reversed(range(T)):
        f1 = 1 / (1 + (math.pi * (h[t] - d.threshold)) ** 2)
        back = 0.0 if detach else (d.v_reset - h[t] if reset == "hard" else -d.threshold)
        gh = (gs[t] + gv * back) * f1 + gv * (1 - fired[t] if reset == "hard" else 1.0)
        exact[t], gv = gain * gh, decay * gh
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reset", RESETS)
def test_an_input_of_stride_zero_is_its_copy(reset: str) -> None:
    d = replace(ATAN, reset=reset)
    found = []
    for copy in (False, True):
        image = drive(steps=1)[0].requires_grad_()
        x = image.expand(T, *SHAPE)
        assert x.stride(0) == 0
        s, v = scan(x.clone() if copy else x, potentials(), 0.9, 1.0, d)
        (g,) = torch.autograd.grad((s.sum(0).sin() + v).sum(), image, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), image)
        found.append((s.detach(), v.detach(), g.detach(), h))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("decay", "gain"), [(1.0, 1.0), (0.6, 0.4)])
def test_without_a_threshold_it_is_a_linear_leaky_integrator(decay: float, gain: float) -> None:
    d = replace(ATAN, threshold=1e300, v_reset=0.25)
    x, v0 = drive().requires_grad_(), potentials().requires_grad_()
    s, v = scan(x, v0, decay, gain, d)
    assert not s.any()
    powers = decay ** np.arange(T - 1, -1, -1)
    closed = decay**T * v0.detach().numpy() + gain * np.tensordot(powers, x.detach().numpy(), 1)
    closed += (1 - decay**T) * d.v_reset
    np.testing.assert_allclose(v.detach(), closed, rtol=1e-12)
    gx, gv = torch.autograd.grad(v.sum(), (x, v0))
    np.testing.assert_allclose(gx, np.broadcast_to(gain * powers[:, None, None], gx.shape), rtol=1e-12)
    np.testing.assert_allclose(gv, decay**T, rtol=1e-12)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("name", ["atan:2", "sigmoid:4", "gaussian:0.5"])
def test_relaxed_derivatives_are_finite_differences(name: str, reset: str) -> None:
    """Gradient and a Hessian product in x, v0, decay and gain together."""
    d = Dynamics(Surrogate.parse(name), 0.8, -0.1, reset, relaxed=True)
    weights = drive(1.0)

    def value(*leaves: Tensor) -> Tensor:
        s, v = scan(*leaves, d)  # type: ignore[call-arg, arg-type]
        return (s * weights).sum() + v.square().sum()

    leaves = [drive(), potentials(), torch.tensor(0.7).double(), torch.tensor(0.9).double()]
    g = torch.Generator().manual_seed(5)
    along = [torch.randn(leaf.shape, dtype=torch.float64, generator=g) for leaf in leaves]

    def gradient(at: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        ready = [leaf if leaf.requires_grad else leaf.clone().requires_grad_() for leaf in at]
        return torch.autograd.grad(value(*ready), ready, create_graph=create_graph)

    step = 1e-5
    for i, leaf in enumerate(leaves):  # every input by itself
        moved = [[q + sign * step * along[i] if j == i else q for j, q in enumerate(leaves)] for sign in (1, -1)]
        difference = float(value(*moved[0]) - value(*moved[1])) / (2 * step)
        assert float((gradient(leaves)[i] * along[i]).sum()) == pytest.approx(difference, rel=1e-7, abs=1e-7), (
            leaf.shape
        )
    ready = [leaf.clone().requires_grad_() for leaf in leaves]
    first = gradient(ready, create_graph=True)
    products = torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, along, strict=True)), ready)  # type: ignore[arg-type]
    up, down = (gradient([q + sign * step * a for q, a in zip(leaves, along, strict=True)]) for sign in (1, -1))
    for product, a, b in zip(products, up, down, strict=True):
        torch.testing.assert_close(product, (a - b) / (2 * step), rtol=1e-6, atol=1e-6)


def test_description_names_the_neuron() -> None:
    assert "lif, soft reset, atan:2" in repr(Neuron("lif", replace(ATAN, reset="soft")))
