"""Tests of the flatness analysis: closed forms on a quadratic, resumption, common draws, comparison and the screen."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from objectives import objective_on, positive_definite, quadratic, spiking_objective
from result_tools import untimed
from scipy.optimize import brentq
from torch import Tensor

from hessian_tools.analysis.context import AnalysisError
from hessian_tools.analysis.flatness.average_sharpness import draw_losses, pac_bayes_sigma
from hessian_tools.analysis.flatness.flatness import flatness
from hessian_tools.analysis.flatness.paired_differences import Difference, differences, incomparable, unlike
from hessian_tools.analysis.flatness.settings import FlatnessSettings
from hessian_tools.io import json as results
from hessian_tools.objective import Objective
from hessian_tools.perturbation import noise
from hessian_tools.results.flatness import FLATNESS_SCHEMA, FlatnessResult, Metric
from hessian_tools.results.spectrum import load_spectrum
from hessian_tools.resume import Phases
from ikun.smoothed_operator import smoothed
from ikun_hessian.reports.flatness import (
    flatness_cautions,
    flatness_comparison_lines,
    flatness_lines,
    labels,
    told_apart_lines,
)

pytestmark = pytest.mark.usefixtures("warnings_are_errors")

Array = npt.NDArray[np.float64]

MAIN = [
    *(f"{op} {part}" for op in ("ggn", "hessian") for part in ("lambda_max", "trace")),
    *(f"{op} {part} scaled" for op in ("ggn", "hessian") for part in ("lambda_max", "trace")),
    "adaptive average sharpness",
    "LPF, the smoothed loss",
]
OTHERS = [
    "ggn lambda_1/lambda_5",
    "ggn ||.||_F",
    "ggn effective dimension",
    "ggn log det",
    "hessian lambda_1/lambda_5",
    "hessian ||.||_F",
    "average sharpness",
    "filter-normalized sharpness",
    "PAC-Bayes sigma",
    "epsilon-sharpness (Keskar)",
    "SAM sharpness",
    "m-sharpness",
    "adaptive worst case",
    "Fisher-Rao norm",
    "relative flatness w",
    "critical sharpness",
]
FORWARD = (
    "adaptive average sharpness",
    "LPF, the smoothed loss",
    "average sharpness",
    "filter-normalized sharpness",
)
FEW = FlatnessSettings(draws=20, probes=4, memory=0.1)
PROVENANCE: dict[str, Any] = {
    "checkpoint": {"path": "/somewhere/ckpt.pt", "sha256": "0123456789abcdef"},
    "data": {"name": "digits", "split": "train", "sha256": "1", "loss": "mse"},
    "network": {
        "model": "mlp", "neuron": "if", "reset": "hard", "detach_reset": False, "surrogate": "atan:2", "timesteps": 4,
        "coding": "direct", "norm": "none", "ties": "first",
    },
    "training": {
        "init": "ikun", "alpha": 1.0, "optimizer": "adam", "lr": 0.01, "schedule": "none", "weight_decay": 0.0,
        "batch_size": 64, "epochs_run": 2, "seed": 0,
    },
}  # fmt: skip


Y = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.7, 0.3], dtype=torch.float64)


def problem(shape: tuple[int, int] = (3, 4)) -> tuple[Tensor, Tensor]:
    return positive_definite(shape, seed=2)


def on_six_samples(a: Tensor, w: Tensor, scale: float = 1.0) -> Objective:
    return quadratic(a, w, Y, scale)


spiking = functools.partial(
    spiking_objective, samples=8, inputs_seed=0, labels="predicted", hidden=(6,), input_shape=(1, 3, 3)
)


@pytest.fixture(scope="module")
def seen() -> FlatnessResult:
    return flatness(spiking(), FEW, provenance=PROVENANCE)


# --- closed forms

SETTINGS = FlatnessSettings(draws=400, probes=16, radius=0.2, sigma=0.05, rho=0.1, m=2, damping=0.3, memory=0.1)


@pytest.fixture(scope="module")
def measured() -> FlatnessResult:
    return flatness(on_six_samples(*problem()), SETTINGS)


def data_error(metric: Metric | Difference) -> float:
    """Return the standard error over the data, whether or not it is only a lower limit."""
    (error,) = (e for e in (metric.data_stderr, metric.data_stderr_least) if not math.isnan(e))
    return error


def near(metric: Metric, exact: float, slack: float = 1e-9) -> bool:
    return abs(metric.value - exact) <= 4 * metric.stderr + slack * abs(exact)


def test_both_tables_hold_these_metrics_in_this_order(measured: FlatnessResult) -> None:
    assert list(measured.main) == MAIN
    assert list(measured.others) == OTHERS
    found = {m.valid for m in measured.metrics.values()}
    assert found == {"surrogate", "spiking loss", "spiking loss, lower bound", "loss yes, direction surrogate"}
    assert all(m.products or m.gradients or m.forwards for m in measured.main.values())
    assert measured.schema == FLATNESS_SCHEMA
    assert measured.weight_norms == {"w": pytest.approx(float(problem()[1].norm()))}


@pytest.mark.parametrize("op", ["ggn", "hessian"])
def test_curvature_of_a_quadratic_is_the_closed_form(measured: FlatnessResult, op: str) -> None:
    a, w = problem()
    h, spread = float(Y.mean()) * a.numpy(), float(Y.std() / Y.mean()) / len(Y) ** 0.5
    rows = w.norm(dim=1, keepdim=True).expand_as(w).flatten().numpy()
    for kind, matrix in (("", h), (" scaled", rows[:, None] * h * rows)):
        values = np.linalg.eigvalsh(matrix)[::-1]
        top, trace = measured.main[f"{op} lambda_max{kind}"], measured.main[f"{op} trace{kind}"]
        assert top.value == pytest.approx(values[0], rel=1e-6)
        assert top.ci95[0] <= values[0] + 1e-12
        assert top.ci95[1] >= values[0] - 1e-12
        assert top.ci95[1] - top.ci95[0] < 1e-3 * values[0]
        assert near(trace, values.sum())
        assert trace.stderr < 0.2 * values.sum()
        for metric, value, within in ((top, values[0], 0.15), (trace, values.sum(), 0.25)):
            assert data_error(metric) == pytest.approx(spread * value, rel=within)
        assert (top.over, trace.over) == ("residual", "probes")
    values = np.linalg.eigvalsh(h)[::-1]
    ratio, frobenius = measured.others[f"{op} lambda_1/lambda_5"], measured.others[f"{op} ||.||_F"]
    assert ratio.value == pytest.approx(values[0] / values[4], rel=1e-6)
    assert ratio.ci95[0] - 1e-12 <= values[0] / values[4] <= ratio.ci95[1] + 1e-12
    assert near(frobenius, math.sqrt((values**2).sum()))
    if op == "ggn":
        assert near(measured.others["ggn effective dimension"], (values / (values + 0.3)).sum())
        assert near(measured.others["ggn log det"], np.log(values + 0.3).sum())
        assert measured.others["ggn log det"].parts["z"] == 0.3


def test_means_over_noise_of_a_quadratic_are_the_closed_form(measured: FlatnessResult) -> None:
    a, w = problem()
    h, flat = float(Y.mean()) * a, w.flatten()
    loss = float(flat @ h @ flat) / 2
    rows = w.norm(dim=1, keepdim=True).expand_as(w).flatten()
    scales = {
        "adaptive average sharpness": (flat.abs(), 0.2, 0.0),
        "average sharpness": (torch.full_like(flat, float(flat.square().mean().sqrt())), 0.2, 0.0),
        "filter-normalized sharpness": (rows / 2, 0.2, 0.0),  # four weights a filter
        "LPF, the smoothed loss": (rows, 0.05, loss),
    }
    for name, (d, radius, offset) in scales.items():
        metric = measured.metrics[name]
        exact = radius**2 / 2 * float(h.diagonal() @ d.square()) + offset
        assert near(metric, exact)
        assert metric.stderr < 0.2 * exact
        spread = float(Y.std() / Y.mean()) / len(Y) ** 0.5
        assert data_error(metric) == pytest.approx(spread * metric.value, rel=1e-6)
        assert math.isnan(metric.data_stderr)  # one sample carries 48% of the variance
        z = [noise(on_six_samples(a, w), 0, i) for i in range(400)]
        points = [flat + radius * d * each for each in z]
        losses = np.array([float(p @ h @ p) / 2 for p in points]) - (loss - offset)
        assert metric.pairs == pytest.approx(losses.reshape(-1, 2).mean(1).tolist())
        assert sorted(metric.groups) == pytest.approx(sorted((Y / Y.mean() * metric.value).tolist()))
        assert (metric.forwards, metric.over, len(metric.pairs)) == (401, "draws", 200)


def test_worst_cases_of_a_quadratic_are_the_closed_form(measured: FlatnessResult) -> None:
    a, w = problem()
    h, flat = float(Y.mean()) * a.numpy(), w.flatten().numpy()
    loss = flat @ h @ flat / 2

    def rise(d: Array) -> Array:
        points = flat + d
        return np.einsum("...i,ij,...j->...", points, h, points) / 2 - loss

    corners = np.array(list(itertools.product((-1, 1), repeat=12))) * 1e-3 * (np.abs(flat) + 1)
    keskar = measured.others["epsilon-sharpness (Keskar)"]
    assert keskar.value == pytest.approx(100 * rise(corners).max() / (1 + loss))  # convex: the largest is at a corner
    assert keskar.value == max(keskar.parts.values())
    g = h @ flat
    step = 0.1 * np.linalg.norm(flat) * g / np.linalg.norm(g)
    assert measured.others["SAM sharpness"].value == pytest.approx(float(rise(step)))
    assert measured.others["m-sharpness"].value == pytest.approx(float(rise(step)))  # all gradients are parallel
    assert data_error(measured.others["m-sharpness"]) > 0
    b, c, radius = np.abs(flat)[:, None] * h * np.abs(flat), np.abs(flat) * g, 0.1 * math.sqrt(12)
    values, vectors = np.linalg.eigh(b)

    def u(shift: float) -> Array:
        return np.asarray(vectors @ (vectors.T @ c / (shift - values)))

    shift = brentq(lambda x: np.linalg.norm(u(x)) - radius, values[-1] * (1 + 1e-9), 1e6)
    worst = measured.others["adaptive worst case"]
    exact = float(rise(np.abs(flat) * u(shift)))
    assert exact * 0.98 <= worst.value <= exact * (1 + 1e-9)
    assert worst.parts["search"] <= exact * (1 + 1e-9)
    assert (worst.gradients, worst.forwards) == (20, 213)
    assert math.isnan(worst.ci95[0])


def test_relative_metrics_and_critical_sharpness_of_a_quadratic_are_the_closed_form(measured: FlatnessResult) -> None:
    a, w = problem()
    h, flat = float(Y.mean()) * a.numpy(), w.flatten().numpy()
    form = float(flat @ a.numpy() @ flat)
    assert measured.others["Fisher-Rao norm"].value == pytest.approx(math.sqrt(float(Y.square().mean())) * form)
    blocks = h.reshape(3, 4, 3, 4).trace(axis1=1, axis2=3)
    kappa = float(((w @ w.T).numpy() * blocks).sum())
    assert near(measured.others["relative flatness w"], kappa)
    g = h @ flat
    critical = measured.others["critical sharpness"]
    assert critical.value == pytest.approx(g @ h @ g / (g @ g), rel=0.023)
    assert critical.ci95[0] <= g @ h @ g / (g @ g) <= critical.ci95[1]
    sigma = measured.others["PAC-Bayes sigma"]
    assert math.isnan(sigma.value)
    assert sigma.note == "the targets are not class labels"


def test_pac_bayes_sigma_equals_that_of_pac_bayes_sigma(seen: FlatnessResult) -> None:
    found, sigma = seen.others["PAC-Bayes sigma"], pac_bayes_sigma(spiking(), draws=20).sigma
    assert 0 < found.value < 16
    assert (found.value, found.ci95, data_error(found)) == (sigma.value, sigma.ci95, sigma.data_stderr)
    assert found.forwards > 8


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_loss_scales_curvature_and_sharpness(scale: float) -> None:
    few = dataclasses.replace(FEW, rho=0.1)
    one, other = (flatness(on_six_samples(*problem(), c), few).metrics for c in (1.0, scale))
    unscaled = {"ggn lambda_1/lambda_5", "hessian lambda_1/lambda_5", "ggn effective dimension"}
    for name in one:
        if name not in ("ggn log det", "PAC-Bayes sigma", "epsilon-sharpness (Keskar)"):
            factor = 1.0 if name in unscaled else scale
            assert other[name].value == pytest.approx(factor * one[name].value, rel=1e-4), name


@pytest.mark.parametrize(("heavy", "known"), [(0.0, True), (30.0, False)])
def test_a_data_error_that_few_samples_carry_is_only_a_lower_limit(heavy: float, known: bool) -> None:
    y = 1 + torch.rand(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y[7] += heavy
    found = flatness(quadratic(*problem(), y), dataclasses.replace(FEW, m=8))
    for name in ("m-sharpness", *FORWARD):
        metric = found.metrics[name]
        error = float(y.std() / y.mean()) / 16 * metric.value
        assert math.isfinite(metric.data_stderr) == known, name
        assert data_error(metric) == pytest.approx(error, rel=0.25 if name == "m-sharpness" else 1e-6)


# --- what may not change a number


STOPS = (
    "smoothed 0.2: symmetry",
    "smoothed 0.2 scaled: trace",
    "ggn: density",
    "hessian: eigenvalues",
    "hessian: error from the data",
    "LPF, the smoothed loss",
    "PAC-Bayes sigma",
    "adaptive worst case",
    "relative flatness fc2.weight",
    "critical sharpness",
)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    settings = dataclasses.replace(FEW, smoothed=(0.2,))
    target = spiking(hidden=(5, 4))
    expected = untimed(flatness(target, settings, smoothed=smoothed, provenance=PROVENANCE))
    calls: dict[str, int] = dict.fromkeys(STOPS, 0)

    def stop(name: str, done: int, total: int, worst: float) -> None:
        if name in calls:
            calls[name] += 1
            if calls[name] == 2:  # inside the phase, or as it ends
                raise KeyboardInterrupt

    found, interruptions = None, -1
    while found is None:
        interruptions += 1
        phases = Phases(tmp_path / "state", {"key": 1})
        with contextlib.suppress(KeyboardInterrupt):
            found = untimed(
                flatness(target, settings, smoothed=smoothed, provenance=PROVENANCE, phases=phases, progress=stop)
            )
    assert interruptions == len(STOPS)
    assert found == expected


def test_equal_weights_differ_by_exactly_nothing(seen: FlatnessResult) -> None:
    again = flatness(spiking(), FEW, provenance=PROVENANCE)
    assert untimed(again) == untimed(seen)
    found = differences(seen, again)
    assert set(found) == set(FORWARD)
    assert all((d.value, d.ci95, data_error(d)) == (0, (0, 0), 0) for d in found.values())


def test_the_surrogate_reaches_no_metric_of_the_spiking_loss(seen: FlatnessResult) -> None:
    one, other = seen.metrics, flatness(spiking(surrogate="atan:5"), FEW).metrics
    alone = [name for name, m in one.items() if m.valid == "spiking loss"]
    assert set(alone) == {*FORWARD, "PAC-Bayes sigma"}
    for name in alone:
        assert plain_metric(one[name]) == plain_metric(other[name])
    for name in ("epsilon-sharpness (Keskar)", "adaptive worst case"):
        assert one[name].parts["search"] == other[name].parts["search"]
    assert one["ggn lambda_max"].value != other["ggn lambda_max"].value


def plain_metric(metric: Metric) -> dict[str, Any]:
    cleaned: dict[str, Any] = results.clean(dataclasses.asdict(metric))
    return cleaned


def test_differences_use_the_same_draws() -> None:
    a, w = problem()
    first, other = flatness(on_six_samples(a, w), FEW), flatness(on_six_samples(a, w, 1.1), FEW)
    for name, d in differences(first, other).items():
        before, now = first.metrics[name], other.metrics[name]
        assert d.value == pytest.approx(now.value - before.value)
        assert d.ci95 == pytest.approx(tuple(0.1 * end for end in before.ci95))  # a tenth of the noise
        assert data_error(d) == pytest.approx(0.1 * data_error(before))
    smaller = flatness(on_six_samples(*problem((2, 4))), FEW)
    assert differences(first, smaller) == {}
    with pytest.raises(ValueError, match="results cannot be compared: the setting radius differs"):
        differences(first, dataclasses.replace(other, settings={**other.settings, "radius": 0.3}))


def test_a_difference_covers_the_truth() -> None:
    """95% intervals over 10 pairs of draws, in 500 replicates."""
    a, w = problem((2, 3))
    other = w * torch.linspace(0.8, 1.2, 6, dtype=torch.float64).reshape(2, 3)
    h = float(Y.mean()) * a.diagonal()
    exact = 0.1**2 / 2 * float(h @ (other.flatten().square() - w.flatten().square()))
    name, few = "adaptive average sharpness", dataclasses.replace(FEW, draws=20)
    measured = [flatness(on_six_samples(a, weights), few) for weights in (w, other)]
    losses = [
        draw_losses(on_six_samples(a, weights), 0.1, kind="elementwise", draws=10000)[0] for weights in (w, other)
    ]
    ats = [float(Y.mean() * (v.flatten() @ a @ v.flatten())) / 2 for v in (w, other)]
    pairs = [(rows.mean(1) - at).unflatten(0, (500, 10, 2)).mean(2) for rows, at in zip(losses, ats, strict=True)]
    covered = 0
    for rows in zip(*pairs, strict=True):
        metrics = [dataclasses.replace(r.main[name], pairs=row.tolist()) for r, row in zip(measured, rows, strict=True)]
        first, second = (dataclasses.replace(r, main={name: m}) for r, m in zip(measured, metrics, strict=True))
        low, high = differences(first, second)[name].ci95
        covered += low <= exact <= high
    assert 0.92 <= covered / 500 <= 0.985


# --- what cannot be had


def test_a_network_that_never_spikes_is_flat_and_says_so() -> None:
    dead = spiking(surrogate="triangle:1", threshold=1e6)
    found = flatness(dead, dataclasses.replace(FEW, smoothed=(0.1,)), smoothed=smoothed, provenance=PROVENANCE)
    for name in FORWARD:
        assert found.metrics[name].stderr == 0
    assert "no surrogate gradient reaches these weights" in found.main["ggn lambda_max"].note
    for name in ("SAM sharpness", "m-sharpness", "critical sharpness"):
        assert found.others[name].note == "the surrogate gradient is zero: there is no direction to step in"
    assert found.others["PAC-Bayes sigma"].note == "no noise up to 16 times u costs 10% accuracy"
    assert found.others["adaptive worst case"].value == 0
    assert any("The noise does not change the loss of any sample" in text for text in flatness_cautions(found))
    silent = dataclasses.replace(found, activity={"spike1": {"firing_rate": 0.0, "dead": 1.0}})
    assert any(text.startswith("The network never spikes") for text in flatness_cautions(silent))
    screen = flatness_lines(silent)
    assert max(map(len, screen)) <= 80
    assert "inf" not in "".join(screen)
    assert "nan" not in "".join(screen)


def test_operator_smoothed_of_another_network_says_why_not() -> None:
    found = flatness(on_six_samples(*problem()), dataclasses.replace(FEW, smoothed=(0.1, 0.2)), smoothed=smoothed)
    names = [f"smoothed {s} {part}" for s in (0.1, 0.2) for part in ("lambda_max", "trace")]
    assert [name for name in found.main if "scaled" not in name][:4] == names
    assert list(found.main)[:4] == [*names[:2], *(f"{name} scaled" for name in names[:2])]
    assert "spiking neurons" in found.main["smoothed 0.1 trace"].note
    assert math.isfinite(found.main["ggn trace"].value)


def test_values_that_are_not_finite_stop_the_analysis_or_are_noted() -> None:
    a, w = problem()
    broken = objective_on(w, lambda o, y: (y * o.flatten(1).sum(1)).mean() * math.nan, Y)
    with pytest.raises(AnalysisError, match="the analysis stops"):
        flatness(broken, FEW)
    wild = objective_on(
        w,
        lambda o, y: (y * torch.where((o - w).flatten(1).norm(dim=1) > 1e-3, math.nan, o.flatten(1) @ a[0])).mean(),
        Y,
    )
    found = flatness(wild, FEW)
    assert found.main["adaptive average sharpness"].note == "the loss is not finite under noise of 0.1: use less noise"
    assert "not finite" in found.others["adaptive worst case"].note
    assert math.isnan(found.others["adaptive worst case"].value)


def test_products_that_are_not_finite_leave_the_other_metrics() -> None:
    _, w = problem()

    def loss(o: Tensor, y: Tensor) -> Tensor:
        """Its gradient at w is finite, its second derivative is not."""
        return (y * (o.square() + (o - w).abs().pow(1.5)).flatten(1).sum(1)).mean()

    target = objective_on(w, loss, Y)
    found = flatness(target, FEW)
    assert found.main["hessian lambda_max"].note == "a product with the operator is not finite"
    assert found.others["hessian ||.||_F"].note == "a product with the operator is not finite"
    assert "not finite" in found.others["relative flatness w"].note
    assert math.isfinite(found.main["adaptive average sharpness"].value)
    assert list(found.metrics) == [*MAIN, *OTHERS]
    assert "hessian lambda_max" in "".join(flatness_lines(found))


def test_metrics_that_need_positive_curvature_say_so_on_an_indefinite_quadratic() -> None:
    a, w = problem()
    turned = a - 3 * torch.eye(len(a), dtype=a.dtype)
    found = flatness(on_six_samples(turned, w), FEW)
    assert "may not be positive definite" in found.others["ggn log det"].note
    low = flatness(on_six_samples(a - 100 * torch.eye(len(a), dtype=a.dtype), w), FEW)
    assert low.others["ggn lambda_1/lambda_5"].note == "there is no fifth eigenvalue above 0"
    assert low.others["ggn effective dimension"].note == "lambda_max is not positive"
    assert low.main["hessian lambda_max"].value < 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "radius must be a positive number, not 0"),
        ({"radius": math.nan}, "radius must be a positive number, not nan"),
        ({"sigma": -1.0}, "sigma must be"),
        ({"rho": math.inf}, "rho must be"),
        ({"epsilon": 0.0}, "epsilon must be"),
        ({"smoothed": (0.1, 0.0)}, "noise must be a positive number from 1e-12 to 1e"),
        ({"damping": -1.0}, "damping must be"),
        ({"draws": 5}, "draws must be even and at least 4"),
        ({"draws": 2}, "antithetic pairs"),
        ({"drop": 1.0}, "must lie between 0 and 1"),
        ({"m": 0}, "m must be at least 1"),
        ({"probes": 1}, "probes at least 2"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatnessSettings(**change)


# --- results and the screen


def test_a_saved_result_is_the_same_and_prints_the_same(seen: FlatnessResult, tmp_path: Path) -> None:
    results.save_result(seen, tmp_path / "x.flatness.json")
    loaded = results.load_result(tmp_path / "x.flatness.json", FlatnessResult, FLATNESS_SCHEMA)
    assert untimed(loaded) == untimed(seen)
    assert flatness_lines(loaded) == flatness_lines(seen)
    raw = json.loads((tmp_path / "x.flatness.json").read_text())
    assert raw["main"]["ggn lambda_max"]["value"] == seen.main["ggn lambda_max"].value
    with pytest.raises(results.ResultError, match="not a spectrum of this version"):
        load_spectrum(tmp_path / "x.flatness.json")


def test_the_screen_shows_values_errors_and_notes(seen: FlatnessResult) -> None:
    screen = flatness_lines(seen)
    assert max(map(len, screen)) <= 80
    first, rest = screen.index("FLATNESS: MAIN METRICS"), screen.index("FLATNESS: OTHER METRICS")
    assert next(i for i, line in enumerate(screen) if line.startswith("weights ")) < first < rest
    for name in MAIN:
        (row,) = [line for line in screen[first:rest] if line.startswith(f"{name:<27}")]
        assert f"{seen.main[name].value:.5g}" in row.split()
    for name, metric in seen.others.items():
        title = name.replace("relative flatness", "rel. flatness")[:20]
        (at,) = [i for i in range(rest, len(screen)) if screen[i].startswith(title)]
        assert screen[at + 1].startswith(f"    {metric.valid};")
    text = " ".join(" ".join(screen).split())
    assert "spiking loss, lower bound; ascent" in text
    assert "calibrated no (use --calibrate to measure" in text
    assert "each weight disturbed by 10% of itself" in text


@pytest.fixture(scope="module")
def beside(seen: FlatnessResult) -> FlatnessResult:
    """Other weights of the same network."""
    other = flatness(spiking(gain=2.5), FEW, provenance=PROVENANCE)
    return dataclasses.replace(
        other, checkpoint={"path": "b.pt", "sha256": "f"}, training={**seen.training, "init": "kaiming"}
    )


def test_the_screen_compares_several_results(seen: FlatnessResult, beside: FlatnessResult) -> None:
    found = [seen, beside]
    screen = flatness_comparison_lines(found)
    assert max(map(len, screen)) <= 80
    assert screen[1].split() == ["ikun", "kaiming"]
    for name in MAIN + OTHERS[:13]:
        assert any(line.startswith(name) for line in screen)
    assert "kaiming minus ikun:" in screen
    d = differences(*found)["adaptive average sharpness"]
    after = screen[screen.index("kaiming minus ikun:") :]
    assert any(line.startswith("adaptive average sharpness") and f"{d.value:.5g}" in line for line in after)
    text = " ".join(screen)
    assert "The losses differ" in text
    assert "differ in norm" in text
    starred = [line[:27].strip() for line in after if line[38:40] == " *"]
    told = " ".join(" ".join(told_apart_lines(found)).split())
    assert told.startswith("told apart kaiming minus ikun: ")
    assert all(f"{name} (" in told for name in starred)
    assert max(map(len, told_apart_lines(found))) <= 80
    assert "no metric tells them apart" in " ".join(" ".join(told_apart_lines([seen, seen])).split())
    five = flatness_comparison_lines([*found, *found, seen])
    assert max(map(len, five)) <= 80
    assert sum(line.startswith("train loss") for line in five) == 2


@pytest.mark.parametrize(
    ("ci95", "error", "least", "sure"),
    [
        ((0.5, 1.5), 0.4, math.nan, True),
        ((0.5, 1.5), 0.6, math.nan, False),  # less than twice the error over the data
        ((-0.1, 2.1), 0.1, math.nan, False),
        ((0.5, 1.5), math.nan, 0.1, False),
    ],
)
def test_metrics_tell_networks_apart_by_draws_and_data(
    ci95: tuple[float, float], error: float, least: float, sure: bool,
    seen: FlatnessResult, beside: FlatnessResult, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    d = dataclasses.replace(
        differences(seen, beside)["adaptive average sharpness"],
        value=1.0, ci95=ci95, data_stderr=error, data_stderr_least=least,
    )  # fmt: skip
    monkeypatch.setattr("ikun_hessian.reports.flatness.differences", lambda *a: {"sharpness": d})
    told = " ".join(" ".join(told_apart_lines([seen, beside])).split())
    assert ("kaiming minus ikun: sharpness (1)" in told) == sure
    assert ("no metric tells them apart" in told) != sure


def test_results_measured_differently_are_not_compared(seen: FlatnessResult, beside: FlatnessResult) -> None:
    for part, key, meaning in (
        ("data", "sha256", "samples"),
        ("data", "loss", "loss"),
        ("network", "timesteps", "timesteps T"),
        ("network", "coding", "input coding"),
    ):
        changed = dataclasses.replace(beside, **{part: {**getattr(beside, part), key: "x"}})
        assert incomparable([seen, changed]).startswith(f"the {meaning} differs: ")
        assert " ".join(flatness_comparison_lines([seen, changed])).startswith(f"compared    no: the {meaning} differs")
    apart = dataclasses.replace(beside, network={**beside.network, "surrogate": "erf:2", "reset": "soft"})
    assert incomparable([seen, apart]) == ""
    assert unlike([seen, apart]) == ["reset", "surrogate of the analysis"]
    screen = flatness_comparison_lines([seen, apart])
    assert not any(line.startswith("ggn lambda_max") for line in screen)
    assert any(line.startswith("PAC-Bayes sigma") for line in screen)
    assert any("Different reset, surrogate of the analysis" in line for line in screen)


def test_results_are_labelled_by_what_differs(seen: FlatnessResult, beside: FlatnessResult) -> None:
    assert labels([seen, beside]) == ["ikun", "kaiming"]
    same = dataclasses.replace(seen, checkpoint={"path": "x/b.pt"})
    assert labels([seen, same]) == ["ckpt", "b"]
    assert labels([seen, seen]) == ["1 ckpt", "2 ckpt"]
