"""Tests of the smoothed operator.

Its parts are compared with closed forms. The whole is compared with the exact Hessian of the expected loss for one
layer, and for any depth with the formulas of docs/calibration.md, written in NumPy on the same noise.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from draws import normal
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor, nn

from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import dense, scaled, symmetry_error
from hessian_tools.perturbation import noise, noise_scales
from ikun import averages as module
from ikun.averages import moments_of, responses, shifts
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.nodes import passes as neuron_passes
from ikun.nodes.recording import PLAIN, Averaging, Recording
from ikun.smoothed_operator import _output_form, smoothed, unsupported

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[np.float64]


def mlp(
    loss: str = "mse", inputs: int = 5, samples: int = 4, shift: float = 0.3, params: str = "*", **fields: Any
) -> Objective:
    """A small network with potentials near the threshold in every layer."""
    spec = Spec(**{"model": "mlp", "norm": "none", "classes": 3, "input_shape": (1, 1, inputs), **fields})
    net = Network(spec).double()
    for i, p in enumerate(net.parameters()):
        p.data = normal(*p.shape, seed=i) / p.shape[1] ** 0.5 + shift
    x = torch.rand(samples, 1, 1, inputs, generator=torch.Generator().manual_seed(9)).double()
    return make_objective(net, LOSSES[loss], (x, torch.arange(samples) % spec.classes), params=params)


def relative(found: Tensor | Array, exact: Tensor | Array) -> float:
    return float(np.linalg.norm(np.asarray(found) - np.asarray(exact)) / np.linalg.norm(np.asarray(exact)))


# --- shifts of the current


@pytest.mark.parametrize("draws", [2, 5, 16])
def test_shifts_integrate_steps_exactly_and_stagger_their_cells(draws: int) -> None:
    edges = []
    for index in range(draws):
        u, one, two = np.array(list(shifts(draws, index))).T
        np.testing.assert_allclose(np.diff(u), 2 * module.REACH / module.CELLS)
        inner = (u[1:] + u[:-1]) / 2
        assert inner[0] <= -module.REACH + np.diff(u)[0]
        assert inner[-1] >= module.REACH - np.diff(u)[0]
        edges.append(inner)
        for edge in inner:  # step(u - edge): E step(u + a - edge) = Phi(a - edge)
            assert one[u > edge].sum() == pytest.approx(norm.pdf(edge), abs=1e-15)
            assert two[u > edge].sum() == pytest.approx(edge * norm.pdf(edge), abs=1e-15)
        assert one.sum() == pytest.approx(0, abs=1e-15)  # a constant
        assert two.sum() == pytest.approx(0, abs=1e-15)
    np.testing.assert_allclose(np.diff(np.sort(np.concatenate(edges))), 2 * module.REACH / module.CELLS / draws)


def spike_trains(steps: int, x: Tensor) -> Tensor:
    """The spikes [T, M] of IF neurons, threshold 1, hard reset, for currents [T or 1, M]."""
    spec = neuron_passes.ScanSpec(steps=steps, static=len(x) < steps)
    found: Tensor = neuron_passes.spikes(x, None, None, neuron_passes.encode_spec(spec))[0]
    return found


def near(found: Tensor, exact: float, slack: float) -> None:
    """The mean over independent columns of [1, M], to four standard errors and what the cells cost."""
    error = 4 * float(found.std()) / found.numel() ** 0.5
    assert abs(float(found.mean()) - exact) < error + slack


@pytest.mark.parametrize("distance", [-2.0, -1.0, 0.0, 0.5, 1.5])
def test_responses_of_a_single_step_are_the_normal_density(distance: float) -> None:
    sd = 0.3
    currents = list(1 + distance * sd + sd * normal(16, 1, 4000))
    first, second, width = responses(lambda c: (c >= 1).double(), currents)
    near(first, norm.pdf(distance) / sd, 0.02 / sd)
    near(second, -distance * norm.pdf(distance) / sd**2, 0.02 / sd**2)
    near(width, module.SHARE * sd, 0.02 * sd)


def counted(values: Array, mean: Any, sd: Any) -> tuple[Any, Any, Any]:
    """E g and its derivatives by the mean, for g = values[k - 1] where a constant normal current makes an IF neuron
    (threshold 1, hard reset) fire at every k-th step, values[-1] where it does not fire in T steps."""
    steps = len(values) - 1
    cells = [(1 / k, 1 / (k - 1) if k > 1 else math.inf) for k in range(1, steps + 1)] + [(-math.inf, 1 / steps)]
    totals: list[Any] = [0.0, 0.0, 0.0]
    for value, ends in zip(values, cells, strict=True):
        for side, end in zip((-1, 1), ends, strict=True):
            z = np.clip((end - mean) / sd, -40, 40)
            for i, part in enumerate((norm.cdf(z), -norm.pdf(z) / sd, -z * norm.pdf(z) / sd**2)):
                totals[i] = totals[i] + side * value * part
    return totals[0], totals[1], totals[2]


def counts(steps: int) -> Array:
    return np.array([steps // k for k in range(1, steps + 1)] + [0], dtype=float)


@pytest.mark.parametrize("mean", [0.2, 0.45, 0.8, 1.1])
def test_responses_of_spike_trains_to_a_constant_current_are_exact(mean: float) -> None:
    """Each step's: an IF neuron with current c fires at the multiples of the least k with k c >= 1."""
    steps, sd = 4, 0.25
    first, second, _ = responses(partial(spike_trains, steps), list(mean + sd * normal(64, 1, 300)))
    for t in range(1, steps + 1):
        fires = np.array([float(t % k == 0) for k in range(1, steps + 1)] + [0.0])
        _, one, two = counted(fires, mean, sd)
        near(first[t - 1], one, 0.02 / sd)
        near(second[t - 1], two, 0.03 / sd**2)


def test_responses_to_a_shift_of_changing_currents_are_exact() -> None:
    """By the score function of the normal law, on a large sample: d/da E s(c + a) = E s(c) 1'C^-1 (c - mean)."""
    steps, size = 3, 400_000
    cov = 0.04 * (np.eye(steps) + 2)
    mean = np.array([0.3, 0.7, 0.5])
    rng = np.random.default_rng(0)
    c = rng.multivariate_normal(mean, cov, size)
    v, rate = np.zeros(size), np.zeros(size)
    for t in range(steps):
        h = v + c[:, t]
        rate += (h >= 1) / steps
        v = np.where(h >= 1, 0, h)
    one = np.ones(steps) @ np.linalg.inv(cov)
    score = (c - mean) @ one
    exact = (rate * score).mean(), (rate * (score**2 - one.sum())).mean()
    z = torch.linalg.cholesky(torch.tensor(cov)) @ normal(64, steps, 400)
    first, second, _ = responses(
        lambda x: spike_trains(steps, x).mean(0, keepdim=True), list(torch.tensor(mean)[:, None] + z)
    )
    near(first, exact[0], 0.05 * exact[0])
    near(second, exact[1], 0.05 * exact[0] / 0.3)


def test_a_neuron_whose_spikes_never_change_has_no_response() -> None:
    for fire in (torch.ones_like, torch.zeros_like):
        for one in responses(fire, list(5 + 1e-6 * normal(16, 1, 3)))[:2]:
            assert one.abs().max() < 1e-6


# --- the outputs


def form(objective: Objective, outputs: Tensor, y: Tensor, *moments: Tensor) -> tuple[Array, Array]:
    """M as blocks [N, K, K], and its diagonal."""
    apply, diagonal = _output_form(objective, outputs, y, *moments)
    columns = [apply(unit.expand_as(outputs)) for unit in torch.eye(outputs.shape[1]).double()]
    return torch.stack(columns, 2).numpy(), diagonal.numpy()


@pytest.mark.parametrize("steps", [1, 3])
def test_output_form_of_squared_error_is_exact(steps: int) -> None:
    """From exact moments, at any point of expansion: d^2/da^2 of mean (rate - y)^2 for independent outputs."""
    objective = mlp(hidden=(4,), timesteps=steps)
    mean, sd = 0.4 + 0.8 * np.random.default_rng(0).random((4, 3)), 0.3
    y = np.eye(3)[np.arange(4) % 3]
    point = np.random.default_rng(1).random((4, 3))
    rate, grid = counts(steps) / steps, range(12)
    exact, first, second, square = (np.zeros((4, 3)) for _ in range(4))
    for i in grid:
        n, k = divmod(i, 3)
        exact[n, k] = counted((rate - y[n, k]) ** 2, mean[n, k], sd)[2] / 12
        _, first[n, k], second[n, k] = counted(rate, mean[n, k], sd)
        square[n, k] = counted((rate - point[n, k]) ** 2, mean[n, k], sd)[2]
    blocks, diagonal = form(
        objective, torch.tensor(point), torch.arange(4) % 3, *map(torch.tensor, (first, second, square))
    )
    np.testing.assert_allclose(diagonal, exact, rtol=1e-12)
    np.testing.assert_allclose(blocks, exact[:, :, None] * np.eye(3), rtol=1e-12, atol=1e-14)
    if steps == 1:  # p''(1 - 2 y)
        z = (1 - mean) / sd
        np.testing.assert_allclose(diagonal, (1 - 2 * y) * z * norm.pdf(z) / sd**2 / 12, rtol=1e-12)


def test_output_form_of_cross_entropy() -> None:
    """A second-order expansion in the counts, of logits that lie between 0 and 1: 3% from their enumeration."""
    steps, classes = 4, 3
    objective = mlp("ce", hidden=(4,), timesteps=steps, classes=classes)
    rng = np.random.default_rng(0)
    mean, sd, y = 0.3 + 0.7 * rng.random((4, classes)), 0.3, np.arange(4) % classes
    rate = counts(steps) / steps
    exact = np.zeros((4, classes, classes))
    masks = np.eye(steps + 1)  # P(cell) and its derivatives, cell by cell
    at = [[[counted(mask, mean[n, k], sd) for mask in masks] for k in range(classes)] for n in range(4)]
    for n in range(4):
        for cells in itertools.product(range(steps + 1), repeat=classes):
            r = rate[list(cells)]
            loss = np.log(np.exp(r).sum()) - r[y[n]]
            for i, j in itertools.product(range(classes), repeat=2):
                order = [0] * classes
                order[i] += 1
                order[j] += 1
                exact[n, i, j] += loss / 4 * math.prod(at[n][k][cells[k]][order[k]] for k in range(classes))
    moments = [
        np.array([[counted(rate, mean[n, k], sd)[i] for k in range(classes)] for n in range(4)]) for i in range(3)
    ]
    square = [[counted((rate - moments[0][n, k]) ** 2, mean[n, k], sd)[2] for k in range(classes)] for n in range(4)]
    blocks, _ = form(
        objective, torch.tensor(moments[0]), torch.tensor(y), *map(torch.tensor, (*moments[1:], np.array(square)))
    )
    assert relative(blocks, exact) < 0.03


def test_moments_are_those_of_the_rate_and_its_square() -> None:
    steps, mean, sd, at = 3, 0.55, 0.25, 0.4
    currents = list(mean + sd * normal(64, 1, 600))
    first, second, square = moments_of(
        lambda c: spike_trains(steps, c).mean(0, True), currents, torch.full((1, 600), at).double()
    )
    rate = counts(steps) / steps
    near(first, counted(rate, mean, sd)[1], 0.02)
    near(second, counted(rate, mean, sd)[2], 0.2)
    near(square, counted((rate - at) ** 2, mean, sd)[2], 0.2)


# --- one layer: the exact Hessian of E L over the noise in the weights


@pytest.mark.parametrize("steps", [1, 3])
def test_one_layer_comes_near_the_exact_hessian_as_draws_grow(steps: int) -> None:
    objective, s = mlp(hidden=(), timesteps=steps, classes=2, samples=12, inputs=6), 0.3
    w = objective.model.fc1.weight.detach().numpy()  # type: ignore[union-attr]
    x = objective.batches[0][0].flatten(1).numpy()
    y = np.eye(2)[np.arange(12) % 2]
    blocks = np.zeros((2, 6, 2, 6))
    for n, k in itertools.product(range(12), range(2)):
        sd = s * np.sqrt((w[k] ** 2).mean()) * np.linalg.norm(x[n])
        curvature = counted((counts(steps) / steps - y[n, k]) ** 2, w[k] @ x[n], sd)[2]
        blocks[k, :, k] += curvature * np.outer(x[n], x[n]) / 24
    exact = blocks.reshape(12, 12)
    errors = [relative(dense(smoothed(objective, scale=s, draws=draws)), exact) for draws in (16, 500)]
    assert errors[1] < 0.1
    assert errors[1] < errors[0]


# --- the whole operator, written out in NumPy on the same draws


def fires(spec: Spec, x: Array) -> tuple[Array, Array]:
    """Currents [T, ...] -> (spikes, h - threshold)."""
    decay, gain = (1.0, 1.0) if spec.neuron == "if" else (1 - 1 / spec.tau, 1 / spec.tau)
    v, s, z = np.full(x.shape[1:], spec.v_reset), np.zeros_like(x), np.zeros_like(x)
    for t in range(len(x)):
        h = decay * v + gain * x[t] + (1 - decay) * spec.v_reset
        z[t] = h - spec.threshold
        s[t] = z[t] >= 0
        v = np.where(s[t] > 0, spec.v_reset, h) if spec.reset == "hard" else h - spec.threshold * s[t]
    return s, z


def kernel(function: Callable[[Array], Array], currents: Array, points: int = 401) -> tuple[Array, Array]:
    """Derivatives of the mean of a function of currents [J, T, ...] by a constant: a Gaussian of half the standard
    deviation, the draws shrunk to leave the variance as it is."""
    mean = currents.mean(0)
    width = 0.5 * np.maximum(currents.std(0, ddof=1).mean(0), 1e-3)
    first = second = 0.0
    for u in np.linspace(-6, 6, points):
        value = np.mean([function(mean + math.sqrt(0.75) * (c - mean) + u * width) for c in currents], 0)
        weight = 12 / (points - 1) * math.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
        first = first + weight * u * value / width
        second = second + weight * (u * u - 1) * value / width**2
    return np.asarray(first), np.asarray(second)


def of_outputs(
    objective: Objective, spikes: list[Array], currents: list[Array], points: int = 401
) -> tuple[Array, Array]:
    """Two derivatives of the mean loss by a constant current of the output neurons: [N, K] and [N, K, K]."""
    spec: Spec = objective.model.spec  # type: ignore[assignment]
    labels = objective.batches[0][1]
    outputs, last = np.mean([s.mean(0) for s in spikes], 0), np.array(currents)
    first, second = kernel(lambda c: fires(spec, c)[0].mean(0), last, points)
    square = kernel(lambda c: (fires(spec, c)[0].mean(0) - outputs) ** 2, last, points)[1]
    n, classes = outputs.shape
    y = np.eye(classes)[labels.numpy()]
    if inspect.unwrap(objective.loss) is LOSSES["mse"]:
        slope, hessian = 2 * (outputs - y) / y.size, np.tile(2 * np.eye(classes) / y.size, (n, 1, 1))
    else:
        p = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        slope, hessian = (p - y) / n, (p[:, :, None] * np.eye(classes) - p[:, :, None] * p[:, None]) / n
    m = hessian * first[:, :, None] * first[:, None]
    for k in range(classes):
        m[:, k, k] = slope[:, k] * second[:, k] + 0.5 * hessian[:, k, k] * square[:, k]
    return slope * first, m


def oracle(objective: Objective, scale: float, draws: int) -> Array:
    """docs/calibration.md for an MLP without norm and pooling; rates and currents [T, N, F], tangents [P, T, N, F]."""
    spec: Spec = objective.model.spec  # type: ignore[assignment]
    steps, x = spec.timesteps, objective.batches[0][0]
    weights = [p.detach().numpy() for p in objective.parameters.values()]
    inputs = np.repeat(x.flatten(1).numpy()[None], steps, 0)
    units = [np.sqrt((w**2).mean(1, keepdims=True)) for w in weights]

    def run(matrices: list[Array]) -> tuple[list[Array], list[Array], list[Array]]:
        s, spikes, currents, potentials = inputs, [inputs], [], []
        for w in matrices:
            currents.append(s @ w.T)
            s, z = fires(spec, currents[-1])
            spikes.append(s)
            potentials.append(z)
        return spikes, currents, potentials

    seen: list[tuple[list[Array], list[Array], list[Array]]] = []
    for j in range(draws):
        parts = [z.numpy() for z in objective.split(noise(objective, 0, j))]
        seen.append(run([w + scale * u * z for w, u, z in zip(weights, units, parts, strict=True)]))
    own_spikes, _, own_z = run(weights)

    # tangents of the spikes, layer by layer, for every unit vector of the weights
    size, tangent = objective.size, np.zeros((objective.size, *inputs.shape))
    start = 0
    for i, w in enumerate(weights):
        current = tangent @ w.T
        for a, b in itertools.product(range(w.shape[0]), range(w.shape[1])):
            current[start + a * w.shape[1] + b, :, :, a] += own_spikes[i][:, :, b]
        start += w.size
        if i == len(weights) - 1:
            break
        tangent = np.zeros_like(current)
        if i == 0:  # a constant current
            tangent = current * kernel(lambda c: fires(spec, c)[0], np.array([found[1][0] for found in seen]))[0]
            continue
        z = np.array([found[2][i] for found in seen])
        density = norm.pdf(0, z.mean(0), np.maximum(z.std(0, ddof=1), 1e-3))
        decay, gain = (1.0, 1.0) if spec.neuron == "if" else (1 - 1 / spec.tau, 1 / spec.tau)
        v = np.zeros_like(current[:, 0])
        for t in range(steps):
            h = decay * v + gain * current[:, t]
            tangent[:, t] = density[t] * h
            if spec.reset == "soft":
                v = h - spec.threshold * tangent[:, t]
            else:
                v = (own_z[i][t] < 0) * h - (spec.threshold - spec.v_reset) * tangent[:, t]
    a = current.mean(1)  # [P, N, K]

    _, m = of_outputs(objective, [found[0][-1] for found in seen], [found[1][-1] for found in seen])
    total = np.einsum("pnk,nkj,qnj->pq", a, m, a)
    if len(weights) > 1:
        spike = tangent.sum(1)  # the change of the last hidden neurons' counts [P, N, F]
        weight = np.einsum("nkk,kf->nf", m, (weights[-1] / steps) ** 2)
        total += (math.sqrt(2) - 1) * np.einsum("pnf,nf,qnf->pq", spike, weight, spike)
    assert total.shape == (size, size)
    return total


WHOLE = {
    "T = 1": {"hidden": (6,), "timesteps": 1, "shift": 0.5},
    "deep": {"hidden": (3, 4), "timesteps": 3, "shift": 0.25},
    "soft, cross-entropy": {"hidden": (3, 4), "timesteps": 3, "reset": "soft", "loss": "ce"},
    "lif": {"hidden": (4, 3), "timesteps": 4, "neuron": "lif", "tau": 1.5, "threshold": 0.4, "v_reset": -0.1},
    "no hidden layer": {"hidden": (), "timesteps": 3, "shift": 0.1},
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_operator_agrees_with_its_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELLS", 400)  # steps within a cell cost 1% then
    monkeypatch.setattr(module, "REACH", 5.0)
    objective = mlp(**WHOLE[name])
    exact = oracle(objective, 0.3, 4)
    assert (np.abs(np.linalg.eigvalsh(exact)) > 1e-3 * np.abs(exact).max()).sum() > 3
    assert relative(dense(smoothed(objective, scale=0.3, draws=4)), exact) < 0.02


FINE = 2001  # points of the quadrature: second derivatives of steps converge more slowly


def along(objective: Objective, direction: Tensor, scale: float, draws: int) -> float:
    """v'Av of the second order: currents, potentials and spikes of the mean network, followed along v to second order.

    For an MLP or a recurrent network without norm and pooling; images or coded inputs.
    """
    spec: Spec = objective.model.spec  # type: ignore[assignment]
    steps, x = spec.timesteps, objective.batches[0][0].numpy()
    static = x.ndim == 4
    inputs = np.repeat(x.reshape(1, len(x), -1), steps, 0) if static else x.swapaxes(0, 1).reshape(steps, len(x), -1)
    decay, gain = (1.0, 1.0) if spec.neuron == "if" else (1 - 1 / spec.tau, 1 / spec.tau)

    def layers(flat: Tensor) -> list[tuple[Array, Array | None]]:
        """Input weights and recurrent weights of every layer."""
        named = {n: p.numpy() for n, p in zip(objective.parameters, objective.split(flat), strict=True)}
        return [(w, named.get(n.replace("fc", "rec"))) for n, w in named.items() if n.startswith("fc")]

    def run(flat: Tensor) -> list[tuple[Array, Array, Array]]:
        """Spikes, currents and h - threshold of every layer."""
        s, found = inputs, []
        for w, r in layers(flat):
            current, v, before = s @ w.T, spec.v_reset, np.zeros((len(x), len(w)))
            z = np.zeros_like(current)
            for t in range(steps):
                current[t] += 0 if r is None else before @ r.T
                h = decay * v + gain * current[t] + (1 - decay) * spec.v_reset
                z[t], before = h - spec.threshold, (h >= spec.threshold) * 1.0
                v = h - spec.threshold * before if spec.reset == "soft" else np.where(before > 0, spec.v_reset, h)
            s = (z >= 0) * 1.0
            found.append((s, current, z))
        return found

    weights, unit = objective.weights(), scale * noise_scales(objective)
    seen = [run(weights + unit * noise(objective, 0, j)) for j in range(draws)]
    s0, s1, s2 = inputs, np.zeros_like(inputs), np.zeros_like(inputs)
    both = list(zip(layers(weights), layers(direction), run(weights), strict=True))
    for i, ((w, r), (dw, dr), (own, _, own_z)) in enumerate(both):
        a1, a2 = s1 @ w.T + s0 @ dw.T, s2 @ w.T + 2 * s1 @ dw.T
        if i == len(both) - 1:
            break
        s0 = own
        if i == 0 and static and r is None:
            one, two = kernel(lambda c: fires(spec, c)[0], np.array([found[0][1] for found in seen]), FINE)
            s1, s2 = one * a1, one * a2 + two * a1**2
            continue
        z = np.array([found[i][2] for found in seen])
        mean, spread = z.mean(0), np.maximum(z.std(0, ddof=1), 1e-3 * spec.threshold)
        density = norm.pdf(mean / spread) / spread
        bend = -mean / spread**2 * density
        s1, s2, v1, v2 = np.zeros_like(own), np.zeros_like(own), 0.0, 0.0
        for t in range(steps):
            if r is not None and dr is not None and t:
                a1[t] += s1[t - 1] @ r.T + own[t - 1] @ dr.T
                a2[t] += s2[t - 1] @ r.T + 2 * s1[t - 1] @ dr.T
            h1, h2 = decay * v1 + gain * a1[t], decay * v2 + gain * a2[t]
            s1[t], s2[t] = density[t] * h1, density[t] * h2 + bend[t] * h1**2
            if spec.reset == "soft":
                v1, v2 = h1 - spec.threshold * s1[t], h2 - spec.threshold * s2[t]
            else:
                height, silent = spec.threshold - spec.v_reset, own_z[t] < 0
                v1, v2 = silent * h1 - height * s1[t], silent * h2 - density[t] * h1**2 - height * s2[t]
    slope, m = of_outputs(objective, [found[-1][0] for found in seen], [found[-1][1] for found in seen], FINE)
    a = a1.mean(0)
    return float(np.einsum("nk,nkj,nj", a, m, a) + (slope * a2.mean(0)).sum())


@pytest.mark.parametrize("name", WHOLE)
def test_the_second_order_agrees_with_its_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELLS", 1600)
    monkeypatch.setattr(module, "REACH", 5.0)
    objective = mlp(**WHOLE[name])
    v = vectors(objective)
    found = (v * (smoothed(objective, scale=0.3, draws=4, order=2) @ v)).sum(0)
    exact = [along(objective, column, 0.3, 4) for column in v.unbind(1)]
    assert relative(found, np.array(exact)) < 0.01


def test_the_second_order_of_a_recurrent_network_agrees_with_its_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELLS", 1600)
    monkeypatch.setattr(module, "REACH", 5.0)
    fields = {"model": "rsnn", "hidden": (4,), "timesteps": 3, "coding": "poisson", "norm": "none", "classes": 3}
    net = Network(Spec(**fields, input_shape=(1, 1, 5))).double()  # type: ignore[arg-type]
    for i, p in enumerate(net.parameters()):
        p.data = normal(*p.shape, seed=i) / p.shape[1] ** 0.5 + 0.3
    x = (torch.rand(5, 3, 1, 1, 5, generator=torch.Generator().manual_seed(9)) < 0.6).double()
    objective = make_objective(net, LOSSES["mse"], (x, torch.arange(5) % 3))
    v = vectors(objective)
    found = (v * (smoothed(objective, scale=0.3, draws=4, order=2) @ v)).sum(0)
    exact = [along(objective, column, 0.3, 4) for column in v.unbind(1)]
    assert relative(found, np.array(exact)) < 0.01


# Norms of products, of the hand-written operator for feed-forward networks that this one replaced
BEFORE = {
    "csnn": ({}, 6.849234513396486),
    "lif, cross-entropy": ({"neuron": "lif", "loss": "ce"}, 5.931554169012462),
    "plif": ({"neuron": "plif"}, 39.96684887232177),
    "soft reset, no norm": ({"reset": "soft", "norm": "none"}, 13.033261751987355),
    "one step": ({"timesteps": 1}, 88.58976188912402),
    "sixteen steps": ({"timesteps": 16, "model": "mlp"}, 4.079332374555384),
    "poisson": ({"coding": "poisson"}, 13.552118143555102),
    "no hidden layer": ({"hidden": (), "model": "mlp"}, 70.27237612613605),
    "hidden weights": ({"params": "conv2.weight,norm2.*"}, 11.253462683634579),
    "readout": ({"params": "fc2.weight"}, 30.821680461469096),
    "resnet": ({"model": "resnet", "input_shape": (1, 8, 8)}, 5.140149462097363),
}


@pytest.mark.parametrize("name", BEFORE)
def test_products_of_feed_forward_networks_are_those_of_the_hand_written_operator(name: str) -> None:
    fields, expected = BEFORE[name]
    objective = csnn(**fields)
    product = smoothed(objective, scale=0.2, draws=4) @ vectors(objective)
    assert float(product.norm()) == pytest.approx(expected, rel=1e-10)


# --- symmetries


def network(**fields: Any) -> tuple[Network, tuple[Tensor, Tensor]]:
    """A CSNN, or with model="mlp" an MLP, with random norms, on six images of 5 x 6 pixels."""
    torch.manual_seed(1)
    small = {"input_shape": (1, 5, 6), "channels": 3, "hidden": (6, 5), "classes": 3, "timesteps": 3, "threshold": 0.6}
    net = Network(Spec(**{**small, **fields})).double()
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.weight.data.mul_(2).add_(0.03)
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.eps = 0.0
            nn.init.uniform_(m.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(m.running_var, 0.1, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, 0, 0.5)
    x = torch.rand(6, *net.spec.input_shape)
    if net.spec.coding == "poisson":
        x = torch.bernoulli(x[:, None].expand(6, net.spec.timesteps, *net.spec.input_shape))
    return net, (x.double(), torch.arange(6) % 3)


def csnn(loss: str = "mse", params: str = "*", **fields: Any) -> Objective:
    net, data = network(**fields)
    return make_objective(net, LOSSES[loss], data, params=params)


def vectors(objective: Objective, count: int = 2) -> Tensor:
    return normal(objective.size, count, seed=3)


KINDS: dict[str, dict[str, Any]] = {
    "csnn": {},
    "lif, cross-entropy": {"neuron": "lif", "loss": "ce"},
    "plif": {"neuron": "plif"},
    "soft reset, no norm": {"reset": "soft", "norm": "none"},
    "one step": {"timesteps": 1},
    "sixteen steps": {"timesteps": 16, "model": "mlp"},
    "poisson": {"coding": "poisson"},
    "poisson mlp": {"coding": "poisson", "model": "mlp", "loss": "ce"},
    "no hidden layer": {"hidden": (), "model": "mlp"},
    "hidden weights": {"params": "conv2.weight,norm2.*"},
    "readout": {"params": "fc2.weight"},
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_the_operator_is_symmetric_linear_and_finite(name: str, order: int) -> None:
    op = smoothed(csnn(**KINDS[name]), scale=0.2, draws=4, order=order)
    assert symmetry_error(op, torch.Generator().manual_seed(0)) < 1e-13
    u, v = vectors(op.objective).unbind(1)
    assert (op @ u).norm() > 0.1
    torch.testing.assert_close(op @ (2 * u - 3 * v), 2 * (op @ u) - 3 * (op @ v), rtol=1e-11, atol=1e-13)


def test_the_operator_depends_on_the_seed_and_not_on_the_batches() -> None:
    objective = csnn()
    v = vectors(objective)
    one = smoothed(objective, draws=4, seed=5) @ v
    assert torch.equal(smoothed(objective, draws=4, seed=5) @ v, one)
    assert torch.equal(smoothed(objective, 0, draws=4, seed=5) @ v, one)  # linearized again for every product
    assert relative(smoothed(objective, draws=4, seed=6) @ v, one) > 0.01
    for size in (1, 4):
        torch.testing.assert_close(
            smoothed(objective.rebatched(size), draws=4, seed=5) @ v, one, rtol=1e-11, atol=1e-13
        )
    torch.set_num_threads(2)
    torch.testing.assert_close(smoothed(objective.rebatched(2), draws=4, seed=5) @ v, one, rtol=1e-11, atol=1e-13)


def test_the_operator_does_not_depend_on_surrogate_detachment_or_tie_rule() -> None:
    v = vectors(csnn())
    one = smoothed(csnn(), draws=4) @ v
    for fields in ({"surrogate": "triangle:0.4"}, {"surrogate": "atan:5"}, {"detach_reset": True}, {"ties": "last"}):
        assert torch.equal(smoothed(csnn(**fields), draws=4) @ v, one)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_operator_scales_with_the_loss(factor: float) -> None:
    objective = csnn("ce")
    v, loss = vectors(objective), objective.loss
    scaled_loss = replace(objective, loss=lambda o, y: factor * loss(o, y))
    torch.testing.assert_close(
        smoothed(scaled_loss, draws=4) @ v / factor, smoothed(objective, draws=4) @ v, rtol=1e-12, atol=1e-15
    )


def test_filters_rescaled_before_a_norm_leave_it_as_it_was_in_units_of_their_size() -> None:
    net, data = network()
    objective = make_objective(net, LOSSES["mse"], data)
    factors = torch.tensor([0.125, 4.0, 64.0]).double()
    net.conv1.weight.data.mul_(factors[:, None, None, None])  # type: ignore[union-attr, operator, arg-type]
    net.norm1.running_mean.mul_(factors)  # type: ignore[union-attr, operator]
    net.norm1.running_var.mul_(factors.square())  # type: ignore[union-attr, operator]
    other = make_objective(net, LOSSES["mse"], data)
    v = vectors(objective)
    one, two = (scaled(smoothed(o, draws=4), noise_scales(o)) @ v for o in (objective, other))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_hidden_neurons_in_another_order_have_the_same_spectrum() -> None:
    """Up to the draws, which fall on other weights then."""
    net, data = network(model="mlp", norm="none")
    objective = make_objective(net, LOSSES["mse"], data)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    net.fc1.weight.data = net.fc1.weight.data[order]  # type: ignore[union-attr]
    net.fc2.weight.data = net.fc2.weight.data[:, order]  # type: ignore[union-attr]
    other = make_objective(net, LOSSES["mse"], data)
    one, two = (torch.linalg.eigvalsh(dense(smoothed(o, scale=0.3, draws=150))) for o in (objective, other))
    assert float((one - two).norm() / one.norm()) < 0.15
    assert float((one[-1] - two[-1]).abs() / one[-1]) < 0.15


def test_readout_alone_is_one_layer_on_the_hidden_spikes() -> None:
    """No noise below it: the closed form of one layer with T = 1."""
    objective, s = mlp(hidden=(7,), timesteps=1, params="fc2*"), 0.3
    assert objective.size == 21
    weights = {name: p.detach().numpy() for name, p in objective.model.named_parameters()}
    x = objective.batches[0][0].flatten(1).numpy()
    spikes, w = (x @ weights["fc1.weight"].T >= 1).astype(float), weights["fc2.weight"]
    blocks, y = np.zeros((3, 7, 3, 7)), np.eye(3)[np.arange(4) % 3]
    for n, k in itertools.product(range(4), range(3)):
        sd = s * np.sqrt((w[k] ** 2).mean()) * np.linalg.norm(spikes[n])
        z = (1 - w[k] @ spikes[n]) / sd
        blocks[k, :, k] += (1 - 2 * y[n, k]) * z * norm.pdf(z) / sd**2 * np.outer(spikes[n], spikes[n]) / 12
    assert relative(dense(smoothed(objective, scale=s, draws=400)), blocks.reshape(21, 21)) < 0.25


def test_the_decay_of_the_output_neurons_is_held_fixed() -> None:
    objective = csnn(neuron="plif")
    last = list(objective.parameters).index("spike4.logit")
    rows = objective.split(dense(smoothed(objective, draws=4)))
    assert not rows[last].any()
    assert all(rows[i].any() for i, name in enumerate(objective.parameters) if name != "spike4.logit")


@pytest.mark.parametrize("windows", [PLAIN, ((3, 2), (2, 1), (1, 0), (1, 1))])
def test_pooled_spikes_answer_to_an_entry_where_the_others_are_silent(windows: Any) -> None:
    """E max of independent spikes with probabilities p: its derivative by one is the product of the others' 1 - p."""
    shape, rng = (2, 2, 5, 4), np.random.default_rng(0)  # the last row is in no window of 2 x 2
    p, pool = torch.tensor(rng.random(shape)), partial(F.max_pool2d)
    recorded = Recording()
    for _ in range(3000):
        recorded.pooled(pool, (torch.tensor(rng.random(shape)) < p).double(), windows)
    share = torch.stack(recorded.alone).mean(0)
    averaging = Averaging(lambda _: (p, p), lambda _: share)
    y, dx = (torch.tensor(rng.random(shape)) < p).double().requires_grad_(), torch.tensor(rng.normal(size=shape))
    pooled = averaging.pooled(pool, y, windows)
    assert torch.equal(pooled, F.max_pool2d(y, *windows))
    g = torch.tensor(rng.normal(size=pooled.shape))
    (found,) = torch.autograd.grad(pooled, y, g)
    (size, stride, padding, _), exact = windows, np.zeros(shape)
    for row, column in itertools.product(*(range(n) for n in pooled.shape[2:])):
        inside = [
            (r, c)
            for r in range(row * stride[0] - padding[0], row * stride[0] - padding[0] + size[0])
            for c in range(column * stride[1] - padding[1], column * stride[1] - padding[1] + size[1])
            if 0 <= r < shape[2] and 0 <= c < shape[3]
        ]
        for r, c in inside:
            silent = np.prod([1 - p[:, :, i, j].numpy() for i, j in inside if (i, j) != (r, c)], 0)
            exact[:, :, r, c] += silent * g[:, :, row, column].numpy()
    assert relative(found, exact) < 0.05
    assert float((found * dx).sum()) != 0


# --- refusals


def test_bad_noise_and_draws_are_refused() -> None:
    objective = mlp(hidden=(3,))
    for scale in (0.0, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="noise must be a positive number"):
            smoothed(objective, scale=scale)
    for draws in (1, 0, -2):
        with pytest.raises(ValueError, match="at least 2 draws"):
            smoothed(objective, draws=draws)
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        smoothed(objective, order=3)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def test_networks_without_a_smoothed_operator_are_refused() -> None:
    data = normal(4, 5), torch.arange(4) % 3
    for model in (
        nn.Linear(5, 3),
        nn.Sequential(nn.Linear(5, 3), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 3), Unknown()),
    ):
        objective = make_objective(model.double(), LOSSES["mse"], data)
        with pytest.raises(ValueError, match="needs a network with spiking neurons whose equations are known"):
            smoothed(objective)
        assert unsupported(objective)
    with pytest.raises(ValueError, match="needs parameters of layers before the output neurons"):
        smoothed(csnn(neuron="plif", params="spike4.logit"))
    with pytest.raises(ValueError, match="a relaxed network has none"):
        smoothed(csnn(relaxed=True))
    assert unsupported(csnn()) == ""


def test_a_network_in_other_units_of_potential_has_the_same_curvature() -> None:
    """Threshold and weights of a hidden layer times c: the same spikes, so D S D as it was."""
    products = []
    for c in (1.0, 1e-3):
        torch.manual_seed(3)
        network = Network(Spec(model="mlp", hidden=(12,), norm="none", threshold=c)).double()
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(3 * c)
        x = torch.rand(40, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        objective = make_objective(network, LOSSES["mse"], (x, torch.arange(40) % 10))
        unit = noise_scales(objective)
        v = torch.randn(objective.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        products.append(unit * (smoothed(objective, scale=0.2) @ (unit * v)))
    assert products[0].norm() > 0
    torch.testing.assert_close(products[1], products[0], rtol=1e-6, atol=1e-9)
