"""Tests of the surrogates against finite differences, quadrature, published numbers and a one-line reference."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special
from torch import Tensor

from ikun.surrogates import FAMILIES, Surrogate, expected_square, spike

Array = npt.NDArray[np.float64]

SMOOTH = ("atan", "sigmoid", "tanh", "erf", "gaussian")
UNIT = [name for name in FAMILIES if name not in ("fast_sigmoid", "superspike")]  # F is a distribution function
PARAMETERS = (0.01, 0.3, 1.0, 2.0, 25.0, 100.0)
EVERY = [pytest.param(n, p, id=f"{n}:{p:g}") for n in FAMILIES for p in PARAMETERS]


def derivative(name: str, p: float, x: Array) -> Array:
    """f'(x) by its formula, in NumPy."""
    z = np.abs(x)
    match name:
        case "atan":
            return p / 2 / (1 + (math.pi * p / 2 * x) ** 2)
        case "sigmoid":
            return p * special.expit(p * x) * special.expit(-p * x)
        case "tanh":
            return p / 2 / np.cosh(np.minimum(p * z, 350)) ** 2
        case "triangle" | "linear":
            return np.maximum(1 - z / p, 0) / p
        case "fast_sigmoid" | "superspike":
            return (1 + p * z) ** -2.0
        case "softsign":
            return p / 2 * (1 + p * z) ** -2.0
        case "piecewise_exp":
            return p / 2 * np.exp(-p * z)
        case "erf":
            return p / math.sqrt(math.pi) * np.exp(-((p * x) ** 2))
        case "gaussian":
            return np.exp(-((x / p) ** 2) / 2) / (p * math.sqrt(2 * math.pi))
        case "rect":
            return np.where(z < p / 2, 1 / p, 0.0)
    raise AssertionError(name)


def width(name: str, p: float) -> float:
    """The length over which f' falls; its kinks are 0 and, for the two compact ones, +-width."""
    return {"triangle": p, "linear": p, "gaussian": p, "rect": p / 2}.get(name, 1 / p)


def kinks(name: str, p: float) -> list[float]:
    return [0.0] if name in SMOOTH else [0.0, width(name, p), -width(name, p)]


def places(name: str, p: float) -> Tensor:
    """Points in units of the width, none within 1e-3 of a kink."""
    units = np.concatenate([np.linspace(-6.03, 6.07, 41), [-90.0, -20.0, 20.0, 90.0]])
    return torch.from_numpy(units * width(name, p))


def first_order(x: Tensor, s: Surrogate, relaxed: bool = False) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(spike(x, s, relaxed).sum(), x)[0]


def double_backward(x: Tensor, s: Surrogate, relaxed: bool = False) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(spike(x, s, relaxed).sum(), x, create_graph=True)
    return torch.autograd.grad(g.sum(), x)[0] if g.requires_grad else torch.zeros_like(x)


def forward_mode(x: Tensor, s: Surrogate, relaxed: bool = False) -> Tensor:
    return torch.func.jvp(lambda z: spike(z, s, relaxed), (x,), (torch.ones_like(x),))[1]


def forward_over_reverse(x: Tensor, s: Surrogate, relaxed: bool = False) -> Tensor:
    g = torch.func.grad(lambda z: spike(z, s, relaxed).sum())
    return torch.func.jvp(g, (x,), (torch.ones_like(x),))[1]


def forward_over_forward(x: Tensor, s: Surrogate, relaxed: bool = False) -> Tensor:
    one = torch.ones_like(x)
    return torch.func.jvp(lambda y: torch.func.jvp(lambda z: spike(z, s, relaxed), (y,), (one,))[1], (x,), (one,))[1]


def reverse_over_forward(x: Tensor, s: Surrogate, relaxed: bool = False) -> Tensor:
    return torch.func.grad(lambda z: forward_mode(z, s, relaxed).sum())(x)


def vmapped(x: Tensor, s: Surrogate, relaxed: bool = False) -> Tensor:
    second = torch.func.grad(torch.func.grad(lambda z: spike(z, s, relaxed)))
    result: Tensor = torch.func.vmap(second)(x)
    return result


FIRST = {"reverse": first_order, "forward": forward_mode}
SECOND: dict[str, Callable[..., Tensor]] = {
    "double backward": double_backward,
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
    "vmap": vmapped,
}


# ---------------------------------------------------------------- the table
@pytest.mark.parametrize(("name", "p"), EVERY)
def test_derivative_is_the_documented_formula(name: str, p: float) -> None:
    x = places(name, p)
    found = Surrogate(name, p).first(x).numpy()
    np.testing.assert_allclose(found, derivative(name, p, x.numpy()), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize(("name", "p"), EVERY)
def test_the_printed_formula_is_the_function(name: str, p: float) -> None:
    text, _, where = Surrogate(name, p).family.formula.partition(" where ")
    text += " * (|x| < a/2)" if where == "|x| < a/2, 0 elsewhere" else ""
    text = re.sub(r"\|x\|", " abs(x)", text).replace("^", "**")
    text = re.sub(r"((?<![a-z])(?:a|\d|pi)|\)) (?=[a-z(])", r"\1 * ", text)  # a product of what stands side by side
    known = {"sigmoid": lambda z: 1 / (1 + np.exp(-z)), "max": np.maximum, "abs": np.abs, "pi": np.pi}
    x = places(name, p).numpy()
    found = eval(text, {"__builtins__": {}}, {"a": p, "x": x, "tanh": np.tanh, "exp": np.exp, "sqrt": np.sqrt, **known})
    np.testing.assert_allclose(found, derivative(name, p, x), rtol=1e-9, atol=1e-12 / width(name, p))


@pytest.mark.parametrize(("name", "p"), EVERY)
def test_each_function_is_the_slope_of_the_one_before(name: str, p: float) -> None:
    s, x, step = Surrogate(name, p), places(name, p), 1e-5 * width(name, p)
    peak = float(derivative(name, p, np.zeros(1))[0])
    slope = (s.primitive(x + step) - s.primitive(x - step)) / (2 * step)
    np.testing.assert_allclose(slope, derivative(name, p, x.numpy()), atol=1e-8 * peak, rtol=0)
    bend = (derivative(name, p, (x + step).numpy()) - derivative(name, p, (x - step).numpy())) / (2 * step)
    np.testing.assert_allclose(s.second(x), bend, atol=1e-8 * peak / width(name, p), rtol=0)


@pytest.mark.parametrize(("name", "p"), EVERY)
def test_area_peak_and_the_ends_of_the_primitive(name: str, p: float) -> None:
    s, unit = Surrogate(name, p), width(name, p)
    far = 30.0 if name in ("sigmoid", "tanh", "erf", "gaussian", "piecewise_exp", "triangle", "linear", "rect") else 1e9
    edges = [0.0, *(unit * k for k in (1.0, 2.0, 5.0, 30.0, 1e3, 1e5, 1e7, 1e9) if k <= far)]

    def density(x: float) -> float:
        return float(derivative(name, p, np.array([x]))[0])

    half = sum(
        integrate.quad(density, a, b, epsabs=0, epsrel=1e-11)[0] for a, b in itertools.pairwise(edges) if density(a) > 0
    )
    assert s.area == pytest.approx(2 * half, rel=3e-9)
    assert s.peak == pytest.approx(density(0.0), rel=1e-14)
    ends = s.primitive(torch.tensor([-1e13, 1e13], dtype=torch.float64) * unit)
    assert ends.tolist() == pytest.approx([0.0, s.area], abs=1e-12 * s.area)
    assert float(s.primitive(torch.zeros(1, dtype=torch.float64))) == pytest.approx(s.area / 2, rel=1e-14)


def test_defaults_are_those_of_the_sources() -> None:
    known = {"atan": 2, "sigmoid": 4, "fast_sigmoid": 25, "softsign": 2, "piecewise_exp": 1, "erf": 2}
    for name, value in known.items():
        assert Surrogate.parse(name) == Surrogate(name, value)
    assert Surrogate.parse("fast_sigmoid").area == pytest.approx(0.08)


# ---------------------------------------------------------------- spike()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_spike_has_the_value_of_the_step_and_both_derivatives_in_every_mode(name: str, dtype: torch.dtype) -> None:
    p = FAMILIES[name].default
    s, x64 = Surrogate(name, p), places(name, p)
    x = x64.to(dtype)
    assert torch.equal(spike(x, s), (x >= 0).to(dtype))
    step, tolerance = 1e-5 * width(name, p), 1e-5 if dtype == torch.float32 else 1e-8
    exact = derivative(name, p, x64.numpy())
    bend = (derivative(name, p, x64.numpy() + step) - derivative(name, p, x64.numpy() - step)) / (2 * step)
    for mode, function in FIRST.items():
        found = function(x, s)
        assert found.dtype == dtype, mode
        np.testing.assert_allclose(found, exact, atol=tolerance * exact.max(), rtol=0, err_msg=mode)
    scale = exact.max() / width(name, p)
    for mode, function in SECOND.items():
        found = function(x, s)
        assert found.dtype == dtype, mode
        np.testing.assert_allclose(found, bend, atol=tolerance * scale, rtol=0, err_msg=mode)


def test_forward_over_forward_has_the_second_derivative() -> None:
    x = torch.tensor([0.3, -0.5])
    torch.testing.assert_close(forward_over_forward(x, Surrogate("atan", 2)), Surrogate("atan", 2).second(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_value_at_the_threshold_is_a_spike(name: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])
    assert spike(x, Surrogate.parse(name)).tolist() == [1, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_ever_nan_or_infinite(name: str, dtype: torch.dtype) -> None:
    for p in (0.01, 0.1, 1.0, 10.0, 100.0):
        s = Surrogate(name, p)
        x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e6, -1e6, 0.5, -3.0, *kinks(name, p)], dtype=dtype)
        for relaxed in (False, True) if name in UNIT else (False,):
            assert torch.isfinite(spike(x, s, relaxed)).all()
            for mode, function in {**FIRST, **SECOND}.items():
                assert torch.isfinite(function(x, s, relaxed)).all(), (mode, s)


@pytest.mark.parametrize("name", FAMILIES)
def test_second_derivative_is_zero_at_the_peak(name: str) -> None:
    x = torch.tensor([0.0, -0.0], dtype=torch.float64)
    for function in SECOND.values():
        assert function(x, Surrogate.parse(name)).tolist() == [0, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_one_line_reference(name: str) -> None:
    """step(x) + (F(x) - F(x).detach()), the derivatives of F by autograd; with an outer function and a mixed term."""
    s = Surrogate.parse(name)
    x = places(name, s.parameter)
    w = torch.linspace(-1, 2, len(x), dtype=torch.float64)

    def reference(z: Tensor) -> Tensor:
        f = s.primitive(z)
        return (z >= 0).to(z.dtype) + (f - f.detach())

    found: list[list[Tensor]] = []
    for function in (lambda z: spike(z, s), reference):
        z = x.clone().requires_grad_()
        value = (function(z) * w * z.sin()).sum() + function(z).square().sum()
        (g,) = torch.autograd.grad(value, z, create_graph=True)
        (h,) = torch.autograd.grad((g * w).sum(), z)
        found.append([value.detach(), g.detach(), h])
    scales = (1.0, max(1.0, s.peak), max(1.0, s.peak, s.peak / width(name, s.parameter), s.peak**2))
    for a, b, scale in zip(*found, scales, strict=True):
        assert float((a - b).abs().max()) <= 1e-13 * 30 * scale if a.dim() else abs(float(a - b)) <= 1e-12


@pytest.mark.parametrize("name", UNIT)
def test_relaxed_is_the_primitive_with_its_own_derivatives(name: str) -> None:
    s = Surrogate.parse(name)
    x, step = places(name, s.parameter), 1e-5 * width(name, s.parameter)
    value = spike(x, s, True)
    assert torch.equal(value, s.primitive(x))
    difference = (spike(x + step, s, True) - spike(x - step, s, True)) / (2 * step)
    np.testing.assert_allclose(first_order(x, s, True), difference, atol=1e-8 * s.peak)


@pytest.mark.parametrize("text", ["fast_sigmoid:25", "superspike", "fast_sigmoid:2.1"])
def test_no_relaxed_network_without_a_distribution_function(text: str) -> None:
    with pytest.raises(ValueError, match="area"):
        spike(torch.zeros(2), Surrogate.parse(text), relaxed=True)


def test_a_fast_sigmoid_of_unit_area_has_a_relaxed_network() -> None:
    assert float(spike(torch.zeros(()), Surrogate.parse("fast_sigmoid:2"), relaxed=True)) == 0.5


# ---------------------------------------------------------------- names
@pytest.mark.parametrize("name", FAMILIES)
def test_names_round_trip(name: str) -> None:
    s = Surrogate.parse(f"{name}:0.25")
    assert (s.name, s.parameter) == (name, 0.25)
    assert Surrogate.parse(str(s)) == s
    assert Surrogate.parse(name).parameter == FAMILIES[name].default


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "unknown surrogate ''"),
        ("arctan:2", "unknown surrogate 'arctan'"),
        ("ATAN", "atan, sigmoid"),
        ("atan:two", "'two' is not a number"),
        ("atan:2:3", "not a number"),
        ("atan:0", "between"),
        ("atan:-2", "between"),
        ("atan:nan", "between"),
        ("atan:inf", "between"),
        ("atan:1e9", "between"),
    ],
)
def test_bad_names_are_refused(text: str, part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        Surrogate.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_steeper_squeezes_the_shape(name: str) -> None:
    """f'_steep(x) is proportional to f'(3 x): a slope three times as steep, not a width three times as wide."""
    s = Surrogate.parse(name)
    x = places(name, s.parameter)
    steep = s.steeper(3.0)
    np.testing.assert_allclose(steep.first(x) / steep.peak, s.first(3 * x) / s.peak, rtol=1e-9, atol=1e-300)
    assert s.steeper(2).steeper(0.5) == s


# ---------------------------------------------------------------- E[f'^2]
@pytest.mark.parametrize(
    ("text", "off", "centred", "digits"),
    [  # reference values for mu = -1 and mu = 0, s = 1
        ("atan:2", 0.12046, 0.19214, 5),
        ("sigmoid:4", 0.16104, 0.25595, 5),
        ("erf:2", 0.19289, 0.30881, 5),
        ("piecewise_exp:2", 0.12036, 0.18882, 5),
        ("triangle:1", 0.16097, 0.25355, 5),
        ("rect:1", 0.24173, 0.38292, 5),
        ("fast_sigmoid:25", 0.006452, 0.010631, 6),
    ],
)
def test_expected_square_is_the_printed_table(text: str, off: float, centred: float, digits: int) -> None:
    s = Surrogate.parse(text)
    assert round(expected_square(s, -1, 1), digits) == off
    assert round(expected_square(s, 0, 1), digits) == centred


def integral(name: str, p: float, mu: float, s: float) -> float:
    """E[f'^2] by scipy's adaptive quadrature between the kinks, the bulk of the density and the width of f'."""

    def f(x: float) -> float:
        return float(derivative(name, p, np.array([x]))[0]) ** 2 * math.exp(-(((x - mu) / s) ** 2) / 2)

    unit = width(name, p)
    marks = {mu + k * s for k in (-37, -20, -12, -6, -3, -1, 0, 1, 3, 6, 12, 20, 37)}
    marks |= {0.0} | {k * sign * unit for k in (0.1, 0.5, 1, 2, 4, 10, 40, 200, 1e3, 1e4) for sign in (-1, 1)}
    edges = sorted(m for m in marks if mu - 37 * s <= m <= mu + 37 * s)
    parts = (
        integrate.quad(f, a, b, epsabs=0, epsrel=1e-10, limit=100)[0]
        for a, b in itertools.pairwise(edges)
        if max(f(a), f(b), f((a + b) / 2)) > 0
    )
    return math.fsum(parts) / (s * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("linear", "superspike")])
@settings(max_examples=8)
@given(
    mu=st.floats(-3, 3),
    log_s=st.floats(math.log(1e-3), math.log(1e3)),
    log_p=st.floats(math.log(0.05), math.log(50)),
)
@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
def test_expected_square_is_the_integral(name: str, mu: float, log_s: float, log_p: float) -> None:
    s, p = math.exp(log_s), math.exp(log_p)
    exact = integral(name, p, mu, s)
    found = expected_square(Surrogate(name, p), mu, s)
    assert found == pytest.approx(exact, rel=1e-8, abs=1e-200)
    assert expected_square(Surrogate(name, p), -mu, s) == pytest.approx(found, rel=1e-12, abs=1e-200)


@pytest.mark.parametrize(
    ("name", "p"),
    [("sigmoid", 100), ("tanh", 50), ("piecewise_exp", 100), ("erf", 50), ("gaussian", 0.03), ("rect", 0.1)],
)
def test_expected_square_is_right_far_in_the_tail(name: str, p: float) -> None:
    """Twenty deviations below the threshold all of the integral comes from ten deviations out and more."""
    exact = integral(name, p, -1.0, 0.05)
    assert 0 < exact < 1e-20
    assert expected_square(Surrogate(name, p), -1.0, 0.05) == pytest.approx(exact, rel=1e-8, abs=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("p", [0.01, 1.0, 100.0])
def test_expected_square_is_right_at_the_extremes_of_s(name: str, p: float) -> None:
    """A narrow law sees f'(mu)^2 at mu; a wide one is flat where f' lives: density(0) times the integral of f'^2."""
    if name != "rect":  # constant where it is not zero; the others need the second-order term only
        mu = 0.37 * width(name, p)
        narrow = expected_square(Surrogate(name, p), mu, 1e-6 * width(name, p))
        assert narrow == pytest.approx(float(derivative(name, p, np.array([mu]))[0]) ** 2, rel=1e-7, abs=0)
    unit, s = width(name, p), 1e6 * width(name, p)
    edges = [unit * k for k in (0, 0.5, 1, 2, 4, 10, 30, 300, 3e4)]
    square = 2 * sum(
        integrate.quad(lambda x: float(derivative(name, p, np.array([x]))[0]) ** 2, a, b, epsabs=0, epsrel=1e-9)[0]
        for a, b in itertools.pairwise(edges)
        if derivative(name, p, np.array([a]))[0] > 0
    )
    assert expected_square(Surrogate(name, p), 0.0, s) == pytest.approx(
        square / (s * math.sqrt(2 * math.pi)), rel=1e-6, abs=0
    )


@pytest.mark.parametrize("b", [0.001, 0.1, 1.0, 5.0, 44.0, 46.0, 1e3, 3e3, 1e4, 3e4, 1e5])
def test_centred_atan_keeps_its_digits(b: float) -> None:
    """The closed form at mu = 0 cancels for a small s; E 1/(1 + k^2 x^2)^2 against a quadrature in u = x / s."""
    k_s = math.sqrt(2) / (2 * b)
    u_edges = sorted({0.0, 1.0, 3.0, 8.0, 30.0, *(q for q in (0.1 / k_s, 1 / k_s, 10 / k_s, 100 / k_s) if q < 30)})
    moment = sum(
        integrate.quad(lambda u: math.exp(-u * u / 2) / (1 + (k_s * u) ** 2) ** 2, a, c, epsabs=0, epsrel=1e-12)[0]
        for a, c in itertools.pairwise(u_edges)
    )
    s = 2 * k_s / (math.pi * 2)  # atan:2 has k = pi
    exact = 2 * moment / math.sqrt(2 * math.pi)
    assert expected_square(Surrogate("atan", 2), 0.0, s) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("s", [0.0, -1.0, float("nan")])
def test_expected_square_needs_a_positive_deviation(s: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        expected_square(Surrogate("atan", 2), 0.0, s)
