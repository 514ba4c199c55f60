"""Tests of the smoothed loss's own Hessian: closed forms, integrals on a grid, and networks without derivatives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from draws import normal
from objectives import objective_on, quadratic, spiking_objective
from scipy import stats
from torch import Tensor, nn

from hessian_tools.analysis.true_hessian import sampling
from hessian_tools.analysis.true_hessian.analysis import true_hessian
from hessian_tools.analysis.true_hessian.parts import true_forms, true_operator, true_projection, true_trace
from hessian_tools.analysis.true_hessian.settings import TrueHessianSettings, draw_plan
from hessian_tools.io.json import ResultError, save_result
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import Dense, dense
from hessian_tools.operators.curvature import ggn
from hessian_tools.perturbation import noise_scales
from hessian_tools.results.true_hessian import DrawMean, load_true_hessian, shown
from hessian_tools.resume import Phases

pytestmark = pytest.mark.usefixtures("one_thread")


def near(mean: DrawMean, exact: float, errors: float = 4.0) -> bool:
    return abs(mean.value - exact) < errors * mean.stderr + 1e-9 * (1 + abs(exact))


def case(size: int = 8) -> tuple[Objective, np.ndarray, np.ndarray]:
    """A quadratic loss with a known matrix A, and the matrix in units of the noise, |w_i|."""
    values = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.0, -1.5], dtype=torch.float64)[-size:]
    turn, _ = torch.linalg.qr(normal(size, size, seed=1))
    a = (turn * values) @ turn.T
    w = normal(size, seed=2).sign() * (1 + normal(size, seed=3).abs())
    unit = w.abs().numpy()
    return quadratic(a, w), a.numpy(), unit[:, None] * a.numpy() * unit


# --- closed forms


def test_a_quadratic_loss_has_its_own_hessian_at_every_scale() -> None:
    objective, a, scaled = case()
    for noise in (0.01, 0.3):
        trace = true_trace(objective, noise, observations=200)
        assert near(trace, float(np.trace(scaled)))
        v = torch.from_numpy(np.linalg.eigh(a)[1])[:, ::3]
        for form, value in zip(true_forms(objective, v, noise), np.linalg.eigvalsh(a)[::3], strict=True):
            assert near(form, float(value))
        basis = normal(8, 3, seed=5)
        matrix, errors = true_projection(objective, basis, noise, observations=400)
        exact = basis.numpy().T @ a @ basis.numpy()
        assert np.all(np.abs(matrix.numpy() - exact) < 4.5 * errors.numpy())
        assert np.all(errors.numpy() < 0.3 * np.abs(exact).max())
        found = dense(true_operator(objective, noise, pairs=3000)).numpy()
        assert np.abs(found - scaled).max() < 0.15 * np.abs(scaled).max()


def test_the_analysis_of_a_quadratic_loss() -> None:
    objective, _, scaled = case()
    exact = np.linalg.eigvalsh(scaled)[::-1]
    settings = TrueHessianSettings(noise=0.1, draws=6000, top=2, smallest=1)
    seen: list[tuple[int, int]] = []
    result = true_hessian(objective, settings, progress=lambda stage, done, total, worst: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(result.passes.values()) <= 6000
    assert all(done <= total for done, total in seen)
    top, low = result.eigenvalues, result.smallest_eigenvalues
    assert (len(top), len(low)) == (2, 1)
    for pair, value in zip((*top, *low), (*exact[:2], exact[-1]), strict=True):
        assert pair.form.value == pytest.approx(value, rel=0.1)
        assert pair.form.ci95[0] < pair.form.value < pair.form.ci95[1]
        assert sum(pair.layers.values()) == pytest.approx(1)
        assert pair.given == 0
    assert near(result.trace, float(exact.sum()))
    assert result.search is not None
    assert result.search.agreement[0] > 0.9
    assert len(result.search.agreement) == 3
    assert result.search.draws == result.passes["search"] // 2
    assert result.search.largest == pytest.approx(exact[0], rel=0.15)
    assert result.warnings == ()
    # the same with another seed gives other draws; with the same seed the same numbers
    again = true_hessian(objective, settings)
    assert dataclasses.replace(again, seconds=result.seconds) == result
    other = true_hessian(objective, dataclasses.replace(settings, seed=1))
    assert other.trace.value != result.trace.value


def test_a_quartic_loss_has_the_smoothed_hessian() -> None:
    """E sum_i (w_i + s w_i z_i)^4 has the second derivatives 12 (w_i^2 + s^2 w_i^2)."""
    w, s = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.5
    objective = objective_on(w, lambda o, y: (y * (o**4).sum(1)).mean())
    exact = (12 * (w.square() + (s * w).square())).tolist()
    forms = true_forms(objective, torch.eye(3, dtype=torch.float64), s, observations=400)
    assert all(near(form, value) for form, value in zip(forms, exact, strict=True))
    assert exact[0] == pytest.approx(15)  # and not 12, the value without noise
    assert near(
        true_trace(objective, s, observations=500), sum(h * float(x) ** 2 for h, x in zip(exact, w, strict=True))
    )


def test_a_step_has_the_curvature_of_the_normal_distribution() -> None:
    """The loss 1[a'w > b] has L_s = Phi(u) with u = (a'w - b) / (s |D a|), which no gradient sees."""
    w = torch.tensor([0.5, -1.0, 2.0, 1.0], dtype=torch.float64)
    a = torch.tensor([1.0, 0.5, -0.2, 0.3], dtype=torch.float64)
    b, s = -0.4, 0.4
    objective = objective_on(w, lambda o, y: (y * (o @ a > b)).mean())
    q = (w.abs() * a).numpy()
    length = float(np.linalg.norm(q))
    u = (float(a @ w) - b) / (s * length)
    exact = -u * stats.norm.pdf(u) / s**2  # along D a, in units of the noise: the only eigenvalue that is not zero
    settings = TrueHessianSettings(noise=s, draws=6000, top=1, smallest=1)
    result = true_hessian(objective, settings)
    assert near(result.trace, exact)
    (pair,) = result.smallest_eigenvalues if exact < 0 else result.eigenvalues
    assert pair.form.value == pytest.approx(exact, rel=0.15)
    direction = torch.from_numpy(q / length) * w.abs()  # in the units of the weights
    (form,) = true_forms(objective, direction, s, observations=200)
    assert near(form, exact)
    assert near(result.smoothed_loss, float(stats.norm.cdf(u)))


class Recurrent(nn.Module):
    """A recurrent spiking network with three weights that autograd cannot differentiate, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.9, -0.6]]))
        self.back = nn.Parameter(torch.tensor([0.4]))

    def forward(self, x: Tensor) -> Tensor:
        v = spike = torch.zeros(len(x))
        total = torch.zeros(len(x))
        for t in range(x.shape[1]):
            v = 0.7 * v * (1 - spike) + x[:, t] @ self.w[0].detach() + self.back.detach()[0] * spike
            spike = torch.heaviside(v - 0.5, torch.zeros(()))
            total = total + spike
        return torch.stack([total, x.shape[1] - total], 1)


def recurrent() -> Objective:
    x = normal(12, 5, 2, seed=4).float()
    y = (x.sum((1, 2)) > 0).long()
    return make_objective(Recurrent(), nn.functional.cross_entropy, (x, y), check=False)


def on_a_grid(objective: Objective, s: float, cells: int = 60) -> np.ndarray:
    """D H_s D without sampling: the normal distribution integrated over the cells of a grid."""
    edges = np.linspace(-4.5, 4.5, cells + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    # exact integrals of 1, z and z^2 - 1 times the density over every cell
    density = stats.norm.pdf(edges)
    zero, first = np.diff(stats.norm.cdf(edges)), -np.diff(density)
    second = -np.diff(edges * density)
    grid = np.stack(np.meshgrid(middle, middle, middle, indexing="ij"), -1).reshape(-1, 3)
    x, y = objective.batches[0]
    unit = noise_scales(objective).double().numpy()
    w = objective.weights().double().numpy() + s * unit * grid
    v = spike = np.zeros((len(w), len(x)))
    total = np.zeros_like(v)
    for t in range(x.shape[1]):
        v = 0.7 * v * (1 - spike) + w[:, :2] @ x[:, t].double().numpy().T + w[:, 2:] * spike
        spike = (v >= 0.5).astype(float)
        total += spike
    logits = np.stack([total, x.shape[1] - total], -1)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logs, y.numpy()[None, :, None], -1)[..., 0].mean(1).reshape(cells, cells, cells)
    moments = (zero, first, second)
    found = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            order = [int(k == i) + int(k == j) for k in range(3)]
            parts = [moments[o] for o in order]
            found[i, j] = np.einsum("abc,a,b,c->", losses, *parts) / s**2
    return found


def test_a_recurrent_network_without_derivatives_agrees_with_integrals_on_a_grid() -> None:
    objective, s = recurrent(), 0.3
    exact = on_a_grid(objective, s)
    fine = on_a_grid(objective, s, 90)
    assert np.abs(exact - fine).max() < 0.05 * np.abs(fine).max()
    found = dense(true_operator(objective, s, pairs=4000)).double().numpy()
    assert np.abs(found - fine).max() < 0.15 * np.abs(fine).max()
    result = true_hessian(objective, TrueHessianSettings(noise=s, draws=5000, top=1, smallest=1))
    values = np.linalg.eigvalsh(fine)
    slack = 0.03 * np.abs(values).max()
    assert abs(result.trace.value - values.sum()) < 4 * result.trace.stderr + slack
    assert abs(result.eigenvalues[0].form.value - values[-1]) < 4 * result.eigenvalues[0].form.stderr + 2 * slack
    assert result.eigenvalues[0].form.value - 4 * result.eigenvalues[0].form.stderr < values[-1] + slack
    low = result.smallest_eigenvalues[0].form
    assert low.value + 4 * low.stderr > values[0] - slack


# --- other operators


def test_given_operators_are_measured_and_control_the_search() -> None:
    objective, a, scaled = case()
    wrong = Dense(torch.from_numpy(a) * 0.2 + 0.02 * torch.eye(8, dtype=torch.float64))  # its size is far off
    settings = TrueHessianSettings(noise=0.1, draws=4000, top=2, smallest=1)
    plain = true_hessian(objective, settings)
    result = true_hessian(objective, settings, operators={"fifth": wrong})
    assert [(d.operator, d.rank) for d in result.directions] == [("fifth", 1), ("fifth", 2), ("fifth", 8)]
    unit = np.abs(objective.weights().numpy())
    fifth = 0.2 * scaled + 0.02 * np.diag(unit**2)
    values, vectors = np.linalg.eigh(fifth)
    for d, k in zip(result.directions, (-1, -2, 0), strict=True):
        assert d.predicted == pytest.approx(values[k], rel=1e-5)
        assert near(d.form, float(vectors[:, k] @ scaled @ vectors[:, k]))
    assert result.search is not None
    assert plain.search is not None
    assert result.search.spread < 0.5 * plain.search.spread
    assert result.eigenvalues[0].given > 0.9
    assert result.eigenvalues[0].form.value == pytest.approx(np.linalg.eigvalsh(scaled)[-1], rel=0.1)


def test_many_weights_leave_the_span_of_given_directions() -> None:
    objective = spiking_objective(0, hidden=(40,), input_shape=(1, 5, 5), norm="none", timesteps=2, batch_size=None)
    settings = TrueHessianSettings(noise=0.2, draws=400, top=3, smallest=2, group=1000)
    alone = true_hessian(objective, settings)
    assert alone.eigenvalues == ()
    assert alone.search is None
    assert set(alone.passes) == {"trace"}
    assert any("too many for 400 draws" in text and "ggn" in text for text in alone.warnings)
    with_ggn = true_hessian(objective, settings, operators={"ggn": ggn(objective)})
    assert with_ggn.search is None
    assert [d.rank for d in with_ggn.directions] == [1, 2, 3]
    assert 0 < len(with_ggn.eigenvalues) + len(with_ggn.smallest_eigenvalues) < 5
    assert with_ggn.eigenvalues[0].given == pytest.approx(1)
    assert any("not searched" in text for text in with_ggn.warnings)


# --- errors and intervals


@pytest.mark.parametrize("kind", ["quadratic", "heavy"])
def test_intervals_of_directions_and_traces_cover(kind: str) -> None:
    w, s = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64), 0.4
    g = torch.tensor([1.5, 1.0, -0.5], dtype=torch.float64)
    q = (w.abs() * g).numpy()
    if kind == "quadratic":
        objective = quadratic(torch.outer(g, g), w)
        exact = float(q @ q)
    else:  # exp(g'w) is lognormal under the noise
        objective = objective_on(w, lambda o, y: (y * (o @ g).exp()).mean())
        exact = float(q @ q) * math.exp(float(g @ w) + s**2 * float(q @ q) / 2)
    v = torch.from_numpy(q / np.linalg.norm(q)) * w.abs()
    hits = np.zeros(2)
    runs = 80
    for seed in range(runs):
        (form,) = true_forms(objective, v, s, observations=12, seed=seed)
        trace = true_trace(objective, s, observations=20, seed=seed)
        hits += [low <= exact <= high for low, high in (form.ci95, trace.ci95)]
    assert np.all(hits / runs > (0.9 if kind == "quadratic" else 0.8)), hits / runs


def test_a_change_that_no_draw_sees_has_no_interval() -> None:
    w = torch.tensor([1.0, 1.0], dtype=torch.float64)
    objective = objective_on(w, lambda o, y: (y * (o[:, 0] > 3)).mean())
    result = true_hessian(objective, TrueHessianSettings(noise=0.1, draws=400, top=1, smallest=0))
    assert result.trace.value == 0 == result.trace.stderr
    assert math.isnan(result.trace.ci95[0])
    assert any("No draw changed the trace" in text for text in result.warnings)
    assert shown(result.trace) == "not seen"


def test_groups_of_samples_with_draws_of_their_own_have_the_same_mean() -> None:
    objective = spiking_objective(0, hidden=(5,), input_shape=(1, 2, 3), norm="none", timesteps=2, batch_size=None)
    found = [true_trace(objective, 0.3, observations=100, group=group) for group in (1000, 8)]
    assert abs(found[0].value - found[1].value) < 4 * math.hypot(found[0].stderr, found[1].stderr)
    samplers = [sampling.make_sampler(objective, 0.3, group=group) for group in (1000, 8)]
    assert len(samplers[1].weights) > len(samplers[0].weights) == 1
    differences = [sampling.search_differences(sampler, 200) for sampler in samplers]
    means = [c @ sampler.weights for c, sampler in zip(differences, samplers, strict=True)]
    assert abs(float(means[0].mean() - means[1].mean())) < 4 * float(means[0].std()) / 14
    noise = [float(c.var(0) @ sampler.weights.square()) for c, sampler in zip(differences, samplers, strict=True)]
    assert noise[1] < 0.85 * noise[0]  # 2 groups


# --- refusals, files


def test_what_cannot_be_measured_is_refused() -> None:
    objective, *_ = case()
    with pytest.raises(ValueError, match="a direction is zero"):
        true_forms(objective, torch.zeros(8, dtype=torch.float64), 0.1)
    with pytest.raises(ValueError, match="7 entries, but there are 8 weights"):
        true_forms(objective, torch.ones(7, dtype=torch.float64), 0.1)
    with pytest.raises(ValueError, match="linearly dependent"):
        true_projection(objective, torch.ones(8, 2, dtype=torch.float64), 0.1)
    zeros = objective_on(torch.zeros(3, dtype=torch.float64), lambda o, y: o.square().mean())
    with pytest.raises(ValueError, match="all weights are zero"):
        true_trace(zeros, 0.1)
    some = objective_on(torch.tensor([1.0, 0.0]), lambda o, y: o.square().sum(1).mean())
    with pytest.raises(ValueError, match="moves a weight whose filter is zero"):
        true_forms(some, torch.ones(2), 0.1)
    assert near(true_forms(some, torch.tensor([1.0, 0.0]), 0.1)[0], 2.0)
    fixed = true_hessian(some, TrueHessianSettings(draws=400, top=1, smallest=0))
    assert fixed.fixed == 1
    assert near(fixed.eigenvalues[0].form, 2.0)
    assert any("1 weights are zero" in text for text in fixed.warnings)
    with pytest.raises(ValueError, match="not finite at these weights"):
        true_trace(objective_on(torch.ones(2), lambda o, y: (o.sum(1) - 3).sqrt().mean()), 0.1)
    with pytest.raises(FloatingPointError, match="not finite under weight noise of scale"):
        true_trace(objective_on(torch.ones(2), lambda o, y: (o.sum(1) - 1.9).sqrt().mean()), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 100}, "draws must be at least 400 for operator true, not 100"),
        ({"noise": -1.0}, "noise must be a positive number"),
        ({"top": 0}, "top must be at least 1"),
        ({"group": 0}, "group must be at least 1"),
    ],
)
def test_settings_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrueHessianSettings(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("draws", [400, 1000, 4000, 20_001])
@pytest.mark.parametrize(("size", "given"), [(5, 0), (5, 4), (300, 0), (10**6, 0), (10**6, 12)])
def test_a_plan_spends_the_draws(draws: int, size: int, given: int) -> None:
    for top, smallest in ((10, 5), (1, 0)):
        found = draw_plan(TrueHessianSettings(draws=draws, top=top, smallest=smallest), size, given, 3)
        assert 0.75 * draws < sum(found.passes.values()) <= draws
        assert found.trace >= 12
        wanted = sum(found.directions)
        assert wanted <= min(size, top + smallest)
        if wanted:
            assert found.lines >= 10
            assert found.directions[0] >= 1


def test_an_interrupted_analysis_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    objective, a, _ = case()
    settings = TrueHessianSettings(draws=800, top=1, smallest=1)
    operators = {"own": Dense(torch.from_numpy(a))}
    whole = true_hessian(objective, settings, operators=operators)
    count = 0

    def stop_after(limit: int) -> Callable[..., None]:
        def show(stage: str, done: int, total: int, worst: float) -> None:
            nonlocal count
            count += 1
            if count == limit:
                raise KeyboardInterrupt

        return show

    for limit in (3, 40, 60):
        count = 0
        with pytest.raises(KeyboardInterrupt):
            true_hessian(
                objective, settings, operators=operators, progress=stop_after(limit), phases=Phases(tmp_path / "state")
            )
    resumed = true_hessian(objective, settings, operators=operators, phases=Phases(tmp_path / "state"))
    assert dataclasses.replace(resumed, seconds=whole.seconds) == whole
    # and it is saved and loaded
    save_result(resumed, tmp_path / "x.true.json")
    assert load_true_hessian(tmp_path / "x.true.json") == resumed
    assert "or more, trace" in repr(resumed)
    (tmp_path / "y.json").write_text("{}")
    with pytest.raises(ResultError, match="not a true-hessian of this version"):
        load_true_hessian(tmp_path / "y.json")


def test_the_draws_do_not_depend_on_the_memory() -> None:
    objective, *_ = case()
    sampler = sampling.make_sampler(objective, 0.1)
    c = sampling.search_differences(sampler, 20)
    v = normal(8, seed=1)
    kept, made = (sampling.stein_hessian(sampler, c, memory=memory) @ v for memory in (1e9, 0.0))
    assert torch.equal(kept, made)
