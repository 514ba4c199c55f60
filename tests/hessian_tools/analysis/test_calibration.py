"""Tests of the calibration on smooth models and on quadratic and quartic losses, where the answer is known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draws import normal
from objectives import objective_on, quadratic, spiking_objective
from scipy import stats
from torch import Tensor, nn

from hessian_tools.analysis import calibration as module
from hessian_tools.analysis.agreement import agreement, correlation_within_kinds
from hessian_tools.analysis.calibration import (
    MAIN,
    CalibrationSettings,
    _absolute_forms,
    _steps,
    calibrate,
    curvatures,
    directions,
)
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import Dense, dense
from hessian_tools.operators.curvature import ggn, hessian
from hessian_tools.perturbation import noise, noise_scales
from hessian_tools.results.calibration import Calibration
from hessian_tools.resume import Phases
from ikun.losses import LOSSES
from ikun.smoothed_operator import smoothed

pytestmark = pytest.mark.usefixtures("one_thread")


def quiet(name: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def smooth(loss: Any = nn.functional.cross_entropy) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    return make_objective(model, loss, (normal(20, 4), torch.arange(20) % 3), batch_size=8)


def spiking(**fields: Any) -> Objective:
    small = {"input_shape": (1, 2, 4), "hidden": (6, 5), "norm": "none", "timesteps": 3}
    objective = spiking_objective(0, gain=1.0, labels="cyclic", batch_size=None, **{**small, **fields})
    for p in objective.parameters.values():
        if p.dim() > 1:
            p.data.mul_(2).add_(0.1)
    return objective


def plain(found: Calibration) -> str:
    return json.dumps(asdict(found))  # NaN is equal to itself there


SMALL = CalibrationSettings(scales=(0.1, 0.3), draws=4, eigenvectors=2, random=2)


# --- the identity


def test_a_smooth_network_is_calibrated_by_its_hessian() -> None:
    objective, s = smooth(), 1e-4
    found = calibrate(objective, CalibrationSettings(scales=(s,), draws=8, eigenvectors=4, random=4), progress=quiet)
    (scale,) = found.scales
    assert scale.scale == s
    forms, c = np.array(found.predictions["hessian"]), np.array(scale.curvature)
    np.testing.assert_allclose(c, forms, rtol=1e-3, atol=1e-4 * np.abs(forms).max())
    best = scale.agreement["hessian"]
    assert best.correlation > 0.999
    assert best.ci95[0] > 0.99
    assert best.ratio == pytest.approx(1, abs=1e-3)
    assert best.slope == pytest.approx(1, abs=1e-3)
    assert best.within == np.mean(forms > 0)
    # the trace: noise and smooth loss alone, against the dense matrix
    unit, matrix = noise_scales(objective).numpy(), dense(hessian(objective)).numpy()
    exact = [noise(objective, 0, j).numpy() * unit for j in range(8)]
    assert scale.trace == pytest.approx(np.mean([z @ matrix @ z for z in exact]), rel=1e-3)
    assert abs(scale.trace - unit**2 @ np.diag(matrix)) < 4 * scale.trace_stderr
    assert found.traces["hessian"] == pytest.approx(unit**2 @ np.diag(matrix), rel=0.4)
    assert scale.loss == pytest.approx(objective.value_and_gradient()[0], rel=1e-6)
    # a network without operator smoothed goes without it
    assert "smoothed" not in scale.agreement
    assert scale.predictions == scale.traces == {}
    assert not any("smoothed" in kind for kind in found.kinds)


def test_a_relaxed_network_is_calibrated_by_its_hessian() -> None:
    objective = spiking(relaxed=True, surrogate="sigmoid:4")
    found = calibrate(objective, replace(SMALL, scales=(1e-4,)))
    forms = np.array(found.predictions["hessian"])
    np.testing.assert_allclose(found.scales[0].curvature, forms, rtol=0.01, atol=1e-3 * np.abs(forms).max())
    assert "smoothed" not in found.scales[0].agreement


def test_a_spiking_network_takes_all_operators_part() -> None:
    objective = spiking()
    other = spiking(surrogate="triangle:1")
    family = {"narrow": spiking(surrogate="gaussian:0.2"), "wide": spiking(surrogate="gaussian:0.8")}
    found = calibrate(objective, SMALL, variants={"triangle": other}, family=family, smoothed=smoothed, progress=quiet)
    main = {"hessian", "ggn", "fisher", "|hessian|", "hessian, triangle", "ggn, triangle"}
    assert set(found.predictions) == main | {"ggn, narrow", "ggn, wide"}
    assert [s.scale for s in found.scales] == [0.1, 0.3]
    v, kinds = found_directions(objective)
    for scale in found.scales:
        assert set(scale.agreement) == main | {"smoothed", "ggn, fitted"}
        assert scale.fitted in family
        assert set(scale.predictions) == set(scale.traces) == {"smoothed"}
        np.testing.assert_allclose(np.mean(scale.halves, 0), scale.curvature, rtol=1e-9, atol=1e-12)
        assert scale.halves[0] != scale.halves[1]
        other = smoothed(objective, scale=scale.scale, seed=SMALL.seed + 2)
        np.testing.assert_allclose(scale.redrawn, (v * (dense(other) @ v)).sum(0), rtol=1e-9, atol=1e-12)
        assert len(scale.curvature) == len(scale.stderr) == len(scale.step) == len(found.kinds)
        assert np.isfinite(scale.curvature).all()
        assert scale.movement > 0
    assert list(found.kinds) == kinds
    exact = dense(hessian(other))
    np.testing.assert_allclose(found.predictions["hessian, triangle"], (v * (exact @ v)).sum(0), rtol=1e-9, atol=1e-12)


def test_fitted_is_the_width_whose_ratio_is_nearest_to_one() -> None:
    cross_entropy = nn.functional.cross_entropy
    family = {
        str(c): smooth(lambda o, y, c=c: c * cross_entropy(o, y))  # type: ignore[misc]
        for c in (0.01, 0.3, 1.1, 2.5, 90.0)
    }
    found = calibrate(smooth(), replace(SMALL, scales=(1e-3,)), family=family)
    ratios = {
        name: np.array(found.scales[0].curvature) / np.array(found.predictions[f"ggn, {name}"]) for name in family
    }
    medians = {name: math.exp(np.median(np.log(r[r > 0]))) for name, r in ratios.items()}
    best = min(medians, key=lambda name: abs(math.log(medians[name])))
    assert found.scales[0].fitted == best
    assert found.scales[0].agreement["ggn, fitted"].ratio == pytest.approx(medians[best])
    assert len({abs(math.log(m)) for m in medians.values()}) == 5


# --- directions and predictions


def found_directions(objective: Objective) -> tuple[Tensor, list[str]]:

    operators = {name: make(objective, 0) for name, make in MAIN.items()}
    matched = smoothed(objective, scale=sorted(SMALL.scales)[1], seed=SMALL.seed + 1)
    return directions(objective, operators, matched, objective.value_and_gradient()[1], SMALL, quiet)


def test_directions_are_unit_vectors_of_their_kind() -> None:
    objective = spiking()
    v, kinds = found_directions(objective)
    assert v.shape == (objective.size, len(kinds))
    torch.testing.assert_close(v.norm(dim=0), torch.ones(len(kinds)).double())
    columns = {kind: v[:, [k == kind for k in kinds]] for kind in kinds}
    counts = {kind: block.shape[1] for kind, block in columns.items()}
    assert counts == {
        "hessian, top": 2,
        "hessian, most negative": 2,
        "ggn, top": 2,
        "fisher, top": 1,
        "smoothed, top": 2,
        "gradient": 1,
        "random": 2,
        "random, filter-normalized": 2,
        "mixture": 2,
        "random, one layer": 3,
    }
    values, exact = torch.linalg.eigh(dense(hessian(objective)))
    assert float((columns["hessian, top"][:, 0] @ exact[:, -1]).abs()) > 0.99
    assert float((columns["hessian, most negative"].T @ exact[:, :2]).norm()) == pytest.approx(2**0.5, abs=0.02)
    assert values[0] < 0
    for block in objective.split(columns["random, one layer"].T)[:1]:
        assert sorted((block.flatten(1).norm(dim=1) > 0).tolist()) == [False, False, True]
    gradient = objective.value_and_gradient()[1]
    torch.testing.assert_close(columns["gradient"][:, 0], gradient / gradient.norm())


def test_filter_normalized_directions_hardly_move_small_filters() -> None:
    objective = smooth()
    objective.parameters["2.weight"].data[1:] *= 1e-3
    operators = {name: make(objective, 0) for name, make in MAIN.items()}
    v, kinds = directions(objective, operators, None, objective.value_and_gradient()[1], SMALL, quiet)
    assert not any("smoothed" in kind for kind in kinds)
    shares = {kind: objective.split(v[:, [k == kind for k in kinds]].T)[2].square().sum((0, 2)) for kind in kinds}
    assert (shares["random, filter-normalized"][1:] < 1e-4 * shares["random, filter-normalized"][0]).all()
    assert (shares["random"][1:] > 0.01 * shares["random"][0]).all()


def test_forms_of_the_absolute_value_are_those_of_the_dense_matrix() -> None:
    a = normal(10, 10)
    a = a + a.T
    values, vectors = torch.linalg.eigh(a)
    v = normal(10, 4, seed=1)
    v = v / v.norm(dim=0)
    exact = (values.abs()[:, None] * (vectors.T @ v).square()).sum(0)
    np.testing.assert_allclose(_absolute_forms(Dense(a), v, lambda i: None), exact, rtol=1e-9)


# --- the truth


def indefinite() -> tuple[Objective, Tensor]:
    a = normal(9, 9)
    a = a @ a.T - 3 * torch.eye(9).double()
    return quadratic(a, normal(9, seed=1), torch.ones(2).double()), a


@pytest.mark.parametrize(("scale", "step"), [(0.01, 1.0), (0.3, 0.2), (2.0, 1.0)])
def test_curvatures_of_a_quadratic_are_exact(scale: float, step: float) -> None:
    objective, a = indefinite()
    v = normal(9, 5, seed=2)
    v = v / v.norm(dim=0)
    found = curvatures(objective, v, scale, CalibrationSettings(draws=6, step=step), quiet)
    np.testing.assert_allclose(found["curvature"], ((a @ v) * v).sum(0), rtol=1e-6)
    assert max(found["stderr"]) < 1e-6 * float(a.norm())
    unit = objective.weights().abs()
    shifts = [unit * noise(objective, 0, j) for j in range(6)]
    forms = np.array([float(z @ a @ z) for z in shifts])
    assert found["trace"] == pytest.approx(forms.mean(), rel=1e-8)
    pairs = forms[::2]
    assert found["trace_stderr"] == pytest.approx(pairs.std(ddof=1) / 3**0.5, rel=1e-6)
    w = objective.weights()
    assert found["loss"] == pytest.approx(np.mean([float(0.5 * (w + scale * z) @ a @ (w + scale * z)) for z in shifts]))
    movement = math.sqrt(np.mean([float((scale * z).square().mean()) for z in shifts]))
    assert found["movement"] == pytest.approx(movement)
    reached = np.array(found["step"]) / 3  # a unit vector moves nine outputs by a root mean square of 1/3
    assert (np.abs(np.log(reached / (step * movement))) < 0.1).all()


def test_stderr_covers_the_exact_curvature_and_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """L = sum a w^4 / 4: the second difference under noise is a (3 (w^2 + s^2 D^2) v^2 + e^2 v^4 / 2), D = |w|."""
    a, w, s = 1 + normal(24).tanh().abs(), 1 - normal(24, seed=1).tanh() / 4, 0.3
    objective = objective_on(w, lambda o, y: (a * o**4).sum(1).mean() / 4, torch.zeros(2).double())
    v = normal(24, 1, seed=2).sign() / 24**0.5
    monkeypatch.setattr(module, "noise", cache(noise))  # drawn once for all points
    spread = w.square() * (1 + s**2)
    trace = float((3 * a * w.square() * spread).sum())
    hits = np.zeros(2)
    quantile = stats.t.ppf(0.975, 5)  # of 6 pairs
    for seed in range(500):
        found = curvatures(objective, v, s, CalibrationSettings(draws=12, seed=seed), quiet)
        (c,), (error,), (e,) = found["curvature"], found["stderr"], found["step"]
        exact = float((a * (3 * spread * v[:, 0].square() + e**2 * v[:, 0] ** 4 / 2)).sum())
        hits += abs(c - exact) < quantile * error, abs(found["trace"] - trace) < quantile * found["trace_stderr"]
    assert 0.92 <= hits[0] / 500 <= 0.98
    assert 0.92 <= hits[1] / 500 <= 0.98


class Powers(nn.Module):
    """Outputs that answer to their weight linearly, by its square, its root, weakly, strongly, and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6).double())

    def forward(self, x: Tensor) -> Tensor:
        w = self.w
        rows = [w[0], w[1].square(), w[2].abs().sqrt(), 0.01 * w[3], 100 * w[4], 0 * w[5]]
        return torch.stack(rows).expand(len(x), -1)


@pytest.mark.parametrize("wanted", [0.01, 0.1, 1.0])
def test_steps_move_the_outputs_as_far_as_wanted(wanted: float) -> None:
    objective = make_objective(
        Powers(), lambda o, y: o.square().mean(), (torch.zeros(3, 1).double(), torch.zeros(3).double())
    )

    def moved(k: int, e: float) -> float:
        if k == 5:
            return 0.0
        return [e, e**2, e**0.5, 0.01 * e, 100 * e][k] / 6**0.5

    def point(item: tuple[int, int, float]) -> Tensor:
        return item[2] * torch.eye(6).double()[item[1]]

    steps = _steps(objective, torch.eye(6).double(), point, [torch.zeros(3, 6).double()] * 2, wanted, 1.0)
    for k in range(5):
        assert abs(math.log(moved(k, steps[k]) / wanted)) < 0.1, (k, steps[k])
    assert math.isfinite(steps[5])


def test_a_direction_that_moves_nothing_is_flat() -> None:
    net = spiking()
    net.parameters["fc1.weight"].data[0] = -5  # a neuron that never fires: its outgoing weights do nothing
    v = torch.zeros(net.size, 1).double()
    v[6 * 8] = 1
    found = curvatures(net, v, 0.3, CalibrationSettings(draws=4), quiet)
    assert found["curvature"] == [0.0]
    assert found["stderr"] == [0.0]


def test_a_network_that_never_spikes_has_no_truth() -> None:
    net = spiking()
    for p in net.parameters.values():
        p.data.fill_(-1)
    with pytest.raises(ValueError, match="does not move the outputs"):
        curvatures(net, normal(net.size, 1), 0.01, SMALL, quiet)
    broken = replace(smooth(), loss=lambda o, y: o.mean() * math.nan)
    with pytest.raises(ValueError, match="the loss is nan"):
        calibrate(broken, SMALL)


# --- agreement


def test_agreement_of_known_numbers_is_right() -> None:
    predicted = np.array([1.0, 2.0, 4.0, 8.0, 1.0, -1.0])
    truth = np.array([1.3, 1.0, 4.0, 16.0, -1.0, 2.0])
    found = agreement(predicted, truth)
    logs = np.log([1.3, 0.5, 1, 2])
    assert found.ratio == pytest.approx(1.3**0.5)
    np.testing.assert_allclose(found.quartiles, np.exp(np.percentile(logs, [25, 75])))
    assert found.within == pytest.approx(2 / 6)
    assert found.correlation == pytest.approx(stats.spearmanr(predicted, truth).statistic)
    power = np.array([1.0, 3.0, 9.0, 20.0])
    assert agreement(power, 5 * power**1.5).slope == pytest.approx(1.5)
    assert agreement(power, 5 * power).ratio == pytest.approx(5)
    assert agreement(power, 5 * power).correlation == pytest.approx(1)
    assert agreement(power, -power).correlation == pytest.approx(-1)
    assert math.isnan(agreement(power, -power).ratio)
    assert agreement(power, -power).within == 0


def test_spearman_handles_ties_and_constants() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, 15).astype(float), rng.integers(0, 5, 15).astype(float)
        assert agreement(a, b, resamples=0).correlation == pytest.approx(stats.spearmanr(a, b).statistic)
    flat = agreement(np.zeros(5), np.arange(5.0))
    assert math.isnan(flat.correlation)
    assert all(math.isnan(end) for end in flat.ci95)


def test_correlation_within_kinds_ignores_differences_between_kinds() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 30))
    assert correlation_within_kinds(a, b, ["one"] * 30) == pytest.approx(stats.spearmanr(a, b).statistic)
    kinds = [name for name in "xyz" for _ in range(10)]
    large = np.repeat([0, 10, 20], 10)  # the kinds differ more than their members
    apart = stats.spearmanr(a + large, b + large).statistic
    inner = np.mean([stats.spearmanr(a[i : i + 10], b[i : i + 10]).statistic for i in (0, 10, 20)])
    assert correlation_within_kinds(a + large, b + large, kinds) == pytest.approx(inner)
    assert apart > 0.8 > abs(inner)
    assert correlation_within_kinds(a, 2 * a + 1, kinds) == pytest.approx(1)
    assert math.isnan(correlation_within_kinds(large, large, kinds))


def test_agreement_depends_only_on_ranks_ratios_and_seed() -> None:
    rng = np.random.default_rng(1)
    a = np.exp(rng.normal(size=30))
    b = a * np.exp(0.5 * rng.normal(size=30))
    one = agreement(a, b, seed=3)
    assert agreement(a, b, seed=3) == one != agreement(a, b, seed=4)
    for c in (1e-12, 1e12):
        other = agreement(c * a, c * b, seed=3)
        assert (other.correlation, other.ci95, other.within) == (one.correlation, one.ci95, one.within)
        np.testing.assert_allclose((other.ratio, other.slope, *other.quartiles), (one.ratio, one.slope, *one.quartiles))
    assert one.ci95[0] < one.correlation < one.ci95[1]


@pytest.mark.parametrize("rho", [0.7, 0.99])
def test_interval_of_the_correlation_covers(rho: float) -> None:
    """Sixty directions, bivariate normal: Spearman's is 6/pi arcsin(rho/2) (Pearson 1907)."""
    rng, exact = np.random.default_rng(5), 6 / math.pi * math.asin(rho / 2)
    hits = 0
    for seed in range(500):
        x, y = rng.normal(size=(2, 60))
        low, high = agreement(np.exp(x), np.exp(rho * x + math.sqrt(1 - rho**2) * y), seed, 100).ci95
        hits += low <= exact <= high
    assert 0.92 <= hits / 500 <= 0.98


# --- settings and resumption


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": ()}, "noise scales"),
        ({"scales": (0.1, 0.0)}, "noise scales"),
        ({"scales": (math.inf,)}, "noise scales"),
        ({"scales": (math.nan,)}, "noise scales"),
        ({"draws": 2}, "antithetic pairs"),
        ({"draws": 7}, "antithetic pairs"),
        ({"eigenvectors": 0}, "eigenvectors"),
        ({"random": 0}, "random"),
        ({"step": 0.0}, "step"),
        ({"step": math.nan}, "step"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationSettings(**fields)


class Interrupting(Phases):
    """Ctrl-C in the middle of a phase, once."""

    def __init__(self, path: Path, stop: int) -> None:
        super().__init__(path, {"settings": "these"})
        self.stop, self.count = stop, 0

    def keep(self, name: str, compute: Any) -> dict[str, Any]:
        def interrupted() -> dict[str, Any]:
            value: dict[str, Any] = compute()
            if self.count == self.stop:
                raise KeyboardInterrupt
            return value

        found = super().keep(name, interrupted)
        self.count += 1
        return found


def test_interrupted_anywhere_it_ends_with_the_same_numbers(tmp_path: Path) -> None:
    objective = spiking()
    settings = replace(SMALL, eigenvectors=1, random=1)
    whole = plain(calibrate(objective, settings, smoothed=smoothed))
    one, state = Interrupting(tmp_path / "count", 99), tmp_path / "state"
    assert plain(calibrate(objective, settings, smoothed=smoothed, phases=one)) == whole
    assert one.count == 2 + 2 * len(settings.scales)
    for stop in range(one.count):  # each run resumes where the last one stopped and gets one phase further
        with pytest.raises(KeyboardInterrupt):
            calibrate(objective, settings, smoothed=smoothed, phases=Interrupting(state, stop))
    calls: list[str] = []
    resumed = calibrate(
        objective,
        settings,
        smoothed=smoothed,
        phases=Phases(state, {"settings": "these"}),
        progress=lambda name, done, total: calls.append(name),
    )
    assert plain(resumed) == whole
    assert set(calls) <= {f"noise {settings.scales[-1]:g}"}  # only the last phase was left


def test_threads_change_nothing() -> None:
    objective = spiking()
    settings = replace(SMALL, scales=(0.2,), eigenvectors=1, random=1)
    one = plain(calibrate(objective, settings, smoothed=smoothed))
    torch.set_num_threads(2)
    assert plain(calibrate(objective, settings, smoothed=smoothed)) == one


def test_ggn_of_a_linear_model_is_its_hessian() -> None:
    """Both agree with the truth there, Fisher does not."""
    model = nn.Linear(4, 3).double()
    objective = make_objective(model, LOSSES["mse"], (normal(20, 4), torch.arange(20) % 3))
    (scale,) = calibrate(objective, replace(SMALL, scales=(0.5,))).scales
    matrix = dense(ggn(objective))
    torch.testing.assert_close(matrix, dense(hessian(objective)))
    for name in ("hessian", "ggn", "|hessian|"):
        assert scale.agreement[name].ratio == pytest.approx(1, rel=1e-6)
    assert abs(math.log(scale.agreement["fisher"].ratio)) > 0.1
