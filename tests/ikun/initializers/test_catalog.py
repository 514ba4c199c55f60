"""Tests of the initializers against their formulas and against measured fixed points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from draws import images, seeded
from scipy import integrate, special
from torch import Tensor

from ikun.initializers.catalog import FILLS, INITIALIZERS, Initialized, initialize, released_beta
from ikun.initializers.rules import potential_scale, require
from ikun.layer_statistics import batch_norm_by_batch, fans, observe
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.surrogates import Surrogate

BETA = 1 / float(np.mean(1 / (1 + np.linspace(-1, 1, 1000) ** 2)))


def wide(**fields: Any) -> Network:
    """Layers of 13,000 to 50,000 weights: their sample variance is known to about 1%."""
    return Network(Spec(**{"model": "mlp", "hidden": (200, 250), "classes": 60, "norm": "none", **fields}))


# ---------------------------------------------------------------- the formulas
VARIANCES: dict[str, Callable[[int, int], float]] = {
    "ikun_v1": lambda i, o: BETA / i,
    "ikun_v2": lambda i, o: BETA / (i + o),
    "xavier": lambda i, o: 2 / (i + o),
    "kaiming": lambda i, o: 2 / i,
    "lecun": lambda i, o: 1 / i,
    "normal": lambda i, o: 0.0004,
}


@pytest.mark.parametrize("name", VARIANCES)
@pytest.mark.parametrize("shape", [(300, 150), (40, 30, 3, 3)])
def test_moments_are_the_formulas(name: str, shape: tuple[int, ...]) -> None:
    w = torch.empty(shape, dtype=torch.float64)
    area = math.prod(shape[2:])
    exact = VARIANCES[name](shape[1] * area, shape[0] * area)
    FILLS[name](w, seeded())
    count = w.numel()
    uniform = name in ("xavier", "kaiming")
    kurtosis = 1.8 if uniform else 3.0
    assert abs(float(w.mean())) < 5 * math.sqrt(exact / count)
    assert float(w.var()) / exact == pytest.approx(1, abs=5 * math.sqrt((kurtosis - 1) / count))
    assert float((w**4).mean()) / exact**2 == pytest.approx(kurtosis, rel=0.1)
    if uniform:
        assert math.sqrt(3 * exact) * 0.999 < float(w.abs().max()) <= math.sqrt(3 * exact)


def test_released_constant() -> None:
    assert released_beta() == pytest.approx(BETA, rel=1e-14)
    assert round(released_beta(), 4) == 1.2737
    assert round(math.sqrt(released_beta()), 4) == 1.1286


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (8, 3, 3, 3), (40, 2, 3, 3)])
def test_orthogonal_weights_have_orthonormal_rows_or_columns(shape: tuple[int, ...]) -> None:
    w = torch.empty(shape, dtype=torch.float64)
    FILLS["orthogonal"](w, seeded())
    m = w.flatten(1).numpy()
    small = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    np.testing.assert_allclose(small, np.eye(len(small)), atol=1e-12)


FEEDFORWARD = ("two_sided", "relay")  # refuse recurrent layers


@pytest.mark.parametrize("name", [n for n in INITIALIZERS if n not in FEEDFORWARD])
def test_a_seed_decides_every_weight(name: str) -> None:
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed * len(found))  # the global stream does not matter, with dropout neither
        net = wide(model="rsnn", neuron="lif", hidden=(20,), norm="bn", dropout=0.5)
        initialize(net, name, generator=seeded(seed), x=images())
        found.append(net.state_dict())
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
    assert all(not torch.equal(found[0][f"{n}.weight"], found[2][f"{n}.weight"]) for n in ("fc1", "rec1", "fc2"))
    assert found[0]["norm1.weight"].eq(1).all()
    assert found[0]["norm1.bias"].eq(0).all()
    assert found[0]["norm1.running_mean"].eq(0).all()
    assert found[0]["norm1.running_var"].eq(1).all()
    assert found[0]["norm1.num_batches_tracked"] == 0


@pytest.mark.parametrize("name", FILLS)
def test_formulas_without_a_law_draw_every_layer_and_need_no_batch(name: str) -> None:
    net = Network(Spec(channels=2))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(torch.nan)
    assert initialize(net, name, generator=seeded()) == Initialized((), 0)
    assert all(torch.isfinite(w.weight).all() for _, w, *_ in net.stages())
    assert net.norm1.weight.isnan().all()


@pytest.mark.parametrize("model", ["csnn", "resnet", "rsnn"])
@pytest.mark.parametrize("name", [n for n in INITIALIZERS if n not in (*FILLS, "tdbn", *FEEDFORWARD)])
def test_rules_that_measure_draw_every_layer_and_count_their_passes(name: str, model: str) -> None:
    if name == "gradient_stable" and model != "rsnn":
        pytest.skip("for recurrent layers alone")
    net, calls = Network(Spec(model=model, channels=3, hidden=(9, 8), neuron="lif")), []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _, w, *_ in net.stages():
            w.weight.fill_(torch.nan)
    done = initialize(net, name, generator=seeded(), x=images())
    layers = [n for n, *_ in net.stages()]
    told = [n for n in layers if n.startswith("rec")] if name == "gradient_stable" else layers
    assert [s.layer for s in done.solutions] == told
    assert all(s.converged for s in done.solutions)
    assert all(torch.isfinite(w.weight).all() for _, w, *_ in net.stages())
    assert done.forward_passes == len(calls) > 0


# ---------------------------------------------------------------- ikun, empirical
def check_fixed_point(net: Network, x: Tensor, alpha: float, tolerance: float) -> None:
    """After initialize(): weight variance = alpha / (fan_in E[x^2] E[f'^2]) as observe() measures them."""
    y = torch.zeros(len(x), dtype=torch.long)
    with batch_norm_by_batch(net):
        measured = observe(net, x, y, LOSSES["mse"])
    for s in measured:
        assert s.firing_rate > 0
        assert s.weight_variance == pytest.approx(s.rule_variance(alpha), rel=tolerance), s.name


@pytest.mark.parametrize("neuron", ["if", "plif"])
@pytest.mark.parametrize("norm", ["none", "bn"])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_recurrent_weights_meet_the_theorem_with_their_own_fan_and_input(norm: str, alpha: float, neuron: str) -> None:
    net, x = wide(model="rsnn", hidden=(200, 150), norm=norm, neuron=neuron), images()
    done = initialize(net, "ikun", generator=seeded(1), x=x, alpha=alpha)
    assert [s.layer for s in done.solutions] == ["fc1", "rec1", "fc2", "rec2", "fc3"]
    assert all(s.converged for s in done.solutions)
    check_fixed_point(net, x, alpha, 0.05)


@pytest.mark.parametrize("neuron", ["if", "plif"])
@pytest.mark.parametrize("norm", ["none", "bn"])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_empirical_weights_meet_the_theorem_as_measured(norm: str, alpha: float, neuron: str) -> None:
    net, x = wide(norm=norm, neuron=neuron), images()
    solutions = initialize(net, "ikun", generator=seeded(1), x=x, alpha=alpha).solutions
    assert all(s.converged and s.passes < 30 for s in solutions)
    check_fixed_point(net, x, alpha, 0.04)
    for s, (name, weights, *_) in zip(solutions, net.stages(), strict=True):
        assert s.layer == name
        fan_in, _ = fans(weights.weight)
        assert s.variance == pytest.approx(alpha / (fan_in * s.input_square * s.derivative_square), rel=0.01)
        sampling = 5 * math.sqrt(2 / weights.weight.numel())
        assert weights.weight.var().item() == pytest.approx(s.variance, rel=sampling)


def test_empirical_weights_of_the_csnn() -> None:
    net, x = Network(Spec(channels=24, classes=100)), images(32)
    solutions = initialize(net, "ikun", generator=seeded(1), x=x).solutions
    assert [s.layer for s in solutions] == ["conv1", "conv2", "fc1", "fc2"]
    assert solutions[0].input_square == pytest.approx(float(x.square().mean()), rel=1e-6)
    y = torch.zeros(len(x), dtype=torch.long)
    with batch_norm_by_batch(net):
        measured = observe(net, x, y, LOSSES["mse"])
    for s, (_, weights, *_) in zip(measured, net.stages(), strict=True):
        tolerance = 0.02 + 4 * math.sqrt(2 / weights.weight.numel())
        assert s.weight_variance == pytest.approx(s.rule_variance(), rel=tolerance), s.name


def test_alpha_scales_the_variance_where_the_law_does_not_move() -> None:
    """Before a BatchNorm h has the norm's law whatever the weights' scale: the variance is proportional to alpha."""
    x = images()
    variances = []
    for alpha in (1.0, 0.25):
        net = wide(norm="bn")
        done = initialize(net, "ikun", generator=seeded(), x=x, alpha=alpha)
        variances.append([s.variance for s in done.solutions])
    for one, quarter in zip(*(v[:2] for v in variances), strict=True):
        assert one / quarter == pytest.approx(4, rel=0.02)


def test_coded_input_and_the_mode_do_not_matter_to_the_state() -> None:
    net = wide(norm="bn", coding="poisson", timesteps=3).eval()
    x = torch.bernoulli(images()[:, None].expand(-1, 3, -1, -1, -1), generator=seeded())
    initialize(net, "ikun", generator=seeded(), x=x)
    assert not net.training
    assert not any(m._forward_pre_hooks for m in net.modules())
    check_fixed_point(net, x, 1.0, 0.04)


# ---------------------------------------------------------------- ikun, analytic
def gaussian_moment(first: Callable[[float], float], mu: float, s: float) -> float:
    def f(x: float) -> float:
        return first(x) ** 2 * math.exp(-(((x - mu) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))

    edges = sorted(
        {mu - 12 * s, mu + 12 * s, *(e for e in (-10.0, -1.0, -0.1, 0.0, 0.1, 1.0, 10.0) if abs(e - mu) < 12 * s)}
    )
    return sum(integrate.quad(f, a, b, epsabs=0, epsrel=1e-10)[0] for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("atan:2", lambda x: 1 / (1 + (math.pi * x) ** 2)),
        ("fast_sigmoid:25", lambda x: (1 + 25 * abs(x)) ** -2),
        ("triangle", lambda x: max(0.0, 1 - abs(x))),
        ("rect", lambda x: float(abs(x) < 0.5)),
        ("gaussian:0.5", lambda x: math.exp(-2 * x * x) / (0.5 * math.sqrt(2 * math.pi))),
        ("piecewise_exp:2", lambda x: math.exp(-2 * abs(x))),
        ("sigmoid", lambda x: 4 * special.expit(4 * x) * special.expit(-4 * x)),
    ],
)
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_potential_scale_solves_its_equation(text: str, first: Callable[[float], float], alpha: float) -> None:
    threshold = 1.0
    s = potential_scale(Surrogate.parse(text), threshold, alpha)
    assert s**2 * gaussian_moment(first, -threshold, s) == pytest.approx(alpha, rel=1e-6)


@pytest.mark.parametrize("fixed", [0.25, 1.0, 9.0])
@pytest.mark.parametrize("alpha", [1e-3, 0.3, 2.0])
def test_potential_scale_solves_its_equation_with_a_fixed_part(fixed: float, alpha: float) -> None:
    s = potential_scale(Surrogate("triangle", 1), 1.0, alpha, fixed)
    moment = gaussian_moment(lambda x: max(0.0, 1 - abs(x)), -1.0, s)
    assert (s**2 - fixed) * moment == pytest.approx(alpha, rel=1e-6)


def test_potential_scale_is_the_published_one() -> None:
    assert potential_scale(Surrogate("atan", 2), 1.0, 1.0) == pytest.approx(5.1, abs=0.05)
    assert potential_scale(Surrogate("fast_sigmoid", 25), 1.0, 1.0) == pytest.approx(94, abs=0.5)


@pytest.mark.parametrize("name", ["atan:2", "triangle", "rect", "gaussian:0.5", "erf", "piecewise_exp", "softsign"])
def test_potential_scale_scales_with_the_threshold(name: str) -> None:
    """h, threshold and the width of f' in other units: f' (of unit area) scales with 1/c, so s^2 E[f'^2] stays."""
    s = Surrogate.parse(name)
    assert potential_scale(s.steeper(1 / 3), 3.0, 1.0) == pytest.approx(3 * potential_scale(s, 1.0, 1.0), rel=1e-9)


def test_potential_scale_without_a_solution_says_so() -> None:
    with pytest.raises(ValueError, match="no solution"):
        potential_scale(Surrogate("atan", 2), 1.0, 1e12)


@pytest.mark.parametrize("norm", ["none", "bn"])
def test_analytic_weights_are_the_closed_rule(norm: str) -> None:
    net, x = wide(norm=norm), images()
    solutions = initialize(net, "ikun", generator=seeded(), x=x, law="analytic", alpha=0.5).solutions
    square = float(x.double().square().mean())
    for s, (_, weights, layer_norm, _, _) in zip(solutions, net.stages(), strict=True):
        scale = 1.0 if layer_norm is not None else potential_scale(Surrogate("atan", 2), 1.0, 0.5)
        moment = gaussian_moment(lambda z: 1 / (1 + (math.pi * z) ** 2), -1.0, scale)
        fan_in = weights.weight.shape[1]
        assert s.input_square == pytest.approx(square)
        assert s.variance == pytest.approx(0.5 / (fan_in * square * moment), rel=1e-7)
        if layer_norm is None:
            assert s.variance * fan_in * square == pytest.approx(scale**2, rel=1e-6)
        sampling = 5 * math.sqrt(2 / weights.weight.numel())
        assert weights.weight.var().item() == pytest.approx(s.variance, rel=sampling)
        square = 0.5 * math.erfc(1 / (scale * math.sqrt(2)))  # P(h >= threshold)


@pytest.mark.parametrize("name", FEEDFORWARD)
def test_rules_of_both_passes_draw_every_layer_from_the_seed_with_the_gain(name: str) -> None:
    nets, solutions = [], []
    for seed, gain in ((5, 1.0), (5, 1.0), (6, 1.0), (5, 0.3)):
        torch.manual_seed(len(nets))  # the global stream does not matter, with dropout neither
        net, calls = Network(Spec(model="mlp", hidden=(20, 20), norm="none", dropout=0.5)), []
        with torch.no_grad():
            for w in net.parameters():
                w.fill_(torch.nan)
        net.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        done = initialize(net, name, generator=seeded(seed), x=images(), gain=gain)
        assert done.forward_passes == len(calls)
        assert [s.layer for s in done.solutions] == ["fc1", "fc2", "fc3"]
        nets.append(net.state_dict())
        solutions.append(done.solutions)
    first, again, other, scaled = nets
    assert all(torch.equal(w, again[key]) for key, w in first.items())
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])
    assert not torch.equal(first["fc3.weight"], other["fc3.weight"])
    assert all(torch.allclose(math.sqrt(0.3) * w, scaled[key], rtol=1e-6) for key, w in first.items())
    assert [s.variance for s in solutions[3]] == pytest.approx([0.3 * s.variance for s in solutions[0]])


@pytest.mark.parametrize("name", [n for n in INITIALIZERS if n not in FEEDFORWARD])
def test_gain_multiplies_the_variance_of_every_weight_and_nothing_else(name: str) -> None:
    spec = Spec(model="rsnn", hidden=(20, 20), norm="bn", neuron="lif")
    plain, scaled = Network(spec), Network(spec)
    for net, gain in ((plain, 1.0), (scaled, 0.3)):
        done = initialize(net, name, generator=seeded(), x=images(), gain=gain)
        found = done.solutions if net is scaled else (before := done.solutions)
    assert [s.variance for s in found] == pytest.approx([0.3 * s.variance for s in before])
    for (key, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = math.sqrt(0.3) if a.ndim > 1 else 1.0
        assert torch.allclose(b, factor * a, rtol=1e-6), key


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("he", {}, "unknown initializer 'he': choose one of ikun, ikun_v1"),
        ("ikun", {"law": "exact"}, "unknown law"),
        ("ikun", {"alpha": 0.0}, "alpha must be positive"),
        ("ikun", {"alpha": -1.0}, "alpha must be positive"),
        ("ikun", {"alpha": math.nan}, "alpha must be positive"),
        ("ikun", {"alpha": math.inf}, "alpha must be positive"),
        ("kaiming", {"gain": 0.0}, "gain must be positive"),
        ("kaiming", {"gain": math.nan}, "gain must be positive"),
        ("ikun", {"x": None}, "needs a batch"),
        ("ikun", {"x": None, "law": "analytic"}, "needs a batch"),
        ("ikun", {"x": torch.zeros(4, 1, 8, 8)}, "no solution for layer fc1: its input is zero"),
        ("ikun", {"x": images(8).double()}, "x is torch.float64, the module's parameters are torch.float32"),
    ],
)
def test_refusals_say_why(name: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        initialize(wide(hidden=(5,)), name, generator=seeded(), **{"x": images(8), **options})
    assert "\n" not in str(caught.value)


MEASURING = [(n, "empirical") for n in INITIALIZERS if n not in (*FILLS, "tdbn")] + [
    ("ikun", "analytic"),
    ("firing", "analytic"),
]


@pytest.mark.parametrize(("name", "law"), MEASURING)
def test_a_batch_that_nothing_can_be_measured_on_is_refused_before_anything(name: str, law: str) -> None:
    spoiled = {"NaN": images(8), "Inf": images(8), r"x \[0, 1, 8, 8\] is empty": images(0)}
    spoiled["NaN"][3, 0, 1, 2], spoiled["Inf"][3, 0, 1, 2] = math.nan, -math.inf
    net = wide(model="rsnn", hidden=(5,), neuron="lif")
    before = net.state_dict()["fc1.weight"].clone()
    for part, x in spoiled.items():
        with pytest.raises(ValueError, match=part):
            initialize(net, name, generator=seeded(), x=x, law=law)
        initialize(wide(hidden=(5,)), "kaiming", generator=seeded(), x=x)  # measures nothing
    assert torch.equal(net.fc1.weight, before)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ((0.0, 1.0), "its input is zero"),
        ((1.0, 0.0), "the surrogate derivative is zero at its potentials"),
        ((math.nan, 1.0), "its input is not finite"),
        ((math.inf, 1.0), "its input is not finite"),
        ((1.0, math.nan), "its surrogate derivative is not finite"),
    ],
)
def test_a_rule_requires_finite_positive_moments(values: tuple[float, float], part: str) -> None:
    require("ikun", "fc1", 1e-300, 1e-300)
    with pytest.raises(ValueError, match=f"the ikun rule has no solution for layer fc1: {part}"):
        require("ikun", "fc1", *values)


def test_lsuv_refuses_an_output_that_overflows() -> None:
    with pytest.raises(ValueError, match="layer fc1: its output is not finite"):
        initialize(wide(hidden=(5,)), "lsuv", generator=seeded(), x=images(8) * 3e38)


@pytest.mark.parametrize("name", ["ikun", "kaiming"])
def test_a_module_without_values_is_refused(name: str) -> None:
    with torch.device("meta"):
        net = wide(hidden=(5,))
    with pytest.raises(ValueError, match="on the meta device and has no values yet"):
        initialize(net, name, generator=seeded(), x=images(8))


def test_frozen_weights_stay_and_are_listed() -> None:
    net = wide(norm="bn")
    net.fc1.requires_grad_(False)
    net.norm1.requires_grad_(False)
    before = net.fc1.weight.clone()
    done = initialize(net, "ikun", generator=seeded(), x=images(), gain=2.0)
    assert torch.equal(net.fc1.weight, before)
    assert done.untouched == ("fc1.weight",)
    assert [s.layer for s in done.solutions] == ["fc2", "fc3"]
    initialize(net, "tdbn", generator=seeded(), alpha=0.5)
    assert net.norm1.weight.eq(1).all()
    assert net.norm2.weight.eq(0.5).all()
    with pytest.raises(ValueError, match="law 'analytic' needs all weights to be drawn, but some are frozen"):
        initialize(net, "ikun", generator=seeded(), x=images(), law="analytic")
    with pytest.raises(ValueError, match="all weights are frozen"):
        initialize(net.requires_grad_(False), "kaiming", generator=seeded())


@pytest.mark.parametrize("name", ["ikun", "firing"])
def test_analytic_rules_refuse_branches(name: str) -> None:
    with pytest.raises(ValueError, match="for a chain of layers, but this network has branches: choose empirical"):
        initialize(Network(Spec(model="resnet")), name, generator=seeded(), x=images(8), law="analytic")


def test_analytic_rule_refuses_a_dead_input() -> None:
    with pytest.raises(ValueError, match="input is zero"):
        initialize(wide(hidden=(5,)), "ikun", generator=seeded(), x=torch.zeros(4, 1, 8, 8), law="analytic")


def test_a_dead_layer_is_named() -> None:
    with pytest.raises(ValueError, match="layer fc2: its input is zero"):
        initialize(wide(hidden=(5,)), "ikun", generator=seeded(), x=images(8), alpha=1e-6)


def test_analytic_rule_refuses_what_underflows() -> None:
    """Behind a BatchNorm h ~ N(0, 1): 50 standard deviations below the threshold nothing fires and f' is 0."""
    for surrogate, part in (("gaussian:0.1", "derivative is zero"), ("atan:2", "layer fc2: its input is zero")):
        net = wide(hidden=(5,), norm="bn", threshold=50.0, surrogate=surrogate)
        with pytest.raises(ValueError, match=part):
            initialize(net, "ikun", generator=seeded(), x=images(8), law="analytic")


def test_a_derivative_of_zero_is_named() -> None:
    with pytest.raises(ValueError, match="layer fc1: the surrogate derivative is zero"):
        initialize(wide(hidden=(5,), surrogate="rect:0.001"), "ikun", generator=seeded(), x=images(1) * 1e-3)
