"""Surrogate derivatives of the spike function.

A neuron fires where x = h - theta >= 0, with h the membrane potential and theta the threshold. Training replaces the
derivative of this step function by a surrogate derivative f'(x). The second derivative of a network's loss also needs
f''(x): together, f' and f'' are the local 2-jet of the spike. This module defines F, f' = F' and f'' of every family.
`spike` is the step function with these two derivatives attached. It supports reverse mode, forward mode and vmap.

Sources: atan, sigmoid, softsign, piecewise_exp, erf and rect are those of SpikingJelly (Fang et al. 2023). fast_sigmoid
is that of snnTorch (Eshraghian et al. 2023). superspike is from Zenke & Ganguli 2018, with the default slope of Norse.
triangle is from Bellec et al. 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """A surrogate family: functions of x and of the family's single parameter p.

    Attributes:
        default: Value of p that is used if none is given.
        slope: +1 if f' becomes steeper as p grows, -1 if p is a width.
        primitive: F(x, p), which rises from 0 to `area(p)`.
        first: f'(x, p).
        second: f''(x, p). It is 0 at the kinks of f'.
        peak: f'(0) as a function of p.
        area: The integral of f' as a function of p.
        length: The scale of x on which f' varies, as a function of p.
        formula: f'(x) as readable text, in which the parameter is called a.
    """

    default: float
    slope: int
    primitive: Callable[[Tensor, float], Tensor]
    first: Callable[[Tensor, float], Tensor]
    second: Callable[[Tensor, float], Tensor]
    peak: Callable[[float], float]
    area: Callable[[float], float]
    length: Callable[[float], float]
    formula: str


def _bump(x: Tensor, k: float) -> Tensor:
    """Return 1 / (1 + k|x|), which underflows to 0 and never gives NaN. Used by fast_sigmoid and softsign."""
    return (1 + k * x.abs()).reciprocal()


def _lorentz(x: Tensor, a: float) -> Tensor:
    return (1 + (math.pi * a / 2 * x).square()).reciprocal()


def _logistic_first(x: Tensor, a: float) -> Tensor:
    """Return a s(ax) s(-ax), for s the logistic function."""
    e = torch.exp(-(a * x).abs())
    return a * e / (1 + e).square()


def _logistic_second(x: Tensor, a: float) -> Tensor:
    """Return -a^2 s(ax) s(-ax) tanh(ax / 2)."""
    y = -(a * x).abs()
    e = torch.exp(y)
    return a**2 * e * torch.expm1(y) / (1 + e) ** 3 * x.sign()


def _triangle_first(x: Tensor, w: float) -> Tensor:
    return (1 - x.abs() / w).clamp_min(0) / w


def _triangle_primitive(x: Tensor, w: float) -> Tensor:
    u = (x / w).clamp(-1, 1)
    return 0.5 + u - 0.5 * u * u.abs()


def _normal_density(x: Tensor, s: float) -> Tensor:
    return torch.exp(-0.5 * (x / s).square()) / (s * math.sqrt(2 * math.pi))


def _one(_: float) -> float:
    return 1.0


def _fast_sigmoid(default: float) -> Family:
    return Family(
        default,
        +1,
        primitive=lambda x, k: 1 / k + x * _bump(x, k),
        first=lambda x, k: _bump(x, k).square(),
        second=lambda x, k: -2 * k * x.sign() * _bump(x, k) ** 3,
        peak=_one,
        area=lambda k: 2 / k,
        length=lambda k: 1 / k,
        formula="1 / (1 + a|x|)^2",
    )


def _triangle() -> Family:
    return Family(
        1.0,
        -1,
        primitive=_triangle_primitive,
        first=_triangle_first,
        second=lambda x, w: -x.sign() / w**2 * (x.abs() < w),
        peak=lambda w: 1 / w,
        area=_one,
        length=lambda w: w,
        formula="max(0, 1 - |x|/a) / a",
    )


FAMILIES: dict[str, Family] = {
    "atan": Family(
        2.0,
        +1,
        primitive=lambda x, a: torch.atan(math.pi * a / 2 * x) / math.pi + 0.5,
        first=lambda x, a: a / 2 * _lorentz(x, a),
        second=lambda x, a: -a * (math.pi * a / 2) ** 2 * x * _lorentz(x, a).square(),
        peak=lambda a: a / 2,
        area=_one,
        length=lambda a: 2 / (math.pi * a),
        formula="(a/2) / (1 + (pi a x / 2)^2)",
    ),
    "sigmoid": Family(
        4.0,
        +1,
        primitive=lambda x, a: torch.sigmoid(a * x),
        first=_logistic_first,
        second=_logistic_second,
        peak=lambda a: a / 4,
        area=_one,
        length=lambda a: 1 / a,
        formula="a sigmoid(a x) (1 - sigmoid(a x))",
    ),
    "tanh": Family(
        2.0,
        +1,
        primitive=lambda x, k: torch.sigmoid(2 * k * x),
        first=lambda x, k: _logistic_first(x, 2 * k),
        second=lambda x, k: _logistic_second(x, 2 * k),
        peak=lambda k: k / 2,
        area=_one,
        length=lambda k: 1 / k,
        formula="(a/2) (1 - tanh(a x)^2)",
    ),
    "triangle": _triangle(),
    "linear": _triangle(),
    "fast_sigmoid": _fast_sigmoid(25.0),
    "superspike": _fast_sigmoid(100.0),
    "softsign": Family(
        2.0,
        +1,
        primitive=lambda x, a: 0.5 + a / 2 * x * _bump(x, a),
        first=lambda x, a: a / 2 * _bump(x, a).square(),
        second=lambda x, a: -(a**2) * x.sign() * _bump(x, a) ** 3,
        peak=lambda a: a / 2,
        area=_one,
        length=lambda a: 1 / a,
        formula="a / (2 (1 + a|x|)^2)",
    ),
    "piecewise_exp": Family(
        1.0,
        +1,
        primitive=lambda x, a: 0.5 - 0.5 * x.sign() * torch.expm1(-a * x.abs()),
        first=lambda x, a: a / 2 * torch.exp(-a * x.abs()),
        second=lambda x, a: -(a**2) / 2 * x.sign() * torch.exp(-a * x.abs()),
        peak=lambda a: a / 2,
        area=_one,
        length=lambda a: 1 / a,
        formula="(a/2) exp(-a|x|)",
    ),
    "erf": Family(
        2.0,
        +1,
        primitive=lambda x, a: 0.5 * torch.erfc(-a * x),
        first=lambda x, a: a / math.sqrt(math.pi) * torch.exp(-(a * x).square()),
        second=lambda x, a: -2 * a**3 / math.sqrt(math.pi) * x * torch.exp(-(a * x).square()),
        peak=lambda a: a / math.sqrt(math.pi),
        area=_one,
        length=lambda a: 1 / a,
        formula="(a/sqrt(pi)) exp(-a^2 x^2)",
    ),
    "gaussian": Family(
        0.5,
        -1,
        primitive=lambda x, s: 0.5 * torch.erfc(-x / (s * math.sqrt(2))),
        first=_normal_density,
        second=lambda x, s: -x / s**2 * _normal_density(x, s),
        peak=lambda s: 1 / (s * math.sqrt(2 * math.pi)),
        area=_one,
        length=lambda s: s,
        formula="exp(-x^2 / (2 a^2)) / (a sqrt(2 pi))",
    ),
    "rect": Family(
        1.0,
        -1,
        primitive=lambda x, w: (x / w + 0.5).clamp(0, 1),
        first=lambda x, w: (x.abs() < w / 2).to(x.dtype) / w,
        second=lambda x, w: torch.zeros_like(x),
        peak=lambda w: 1 / w,
        area=_one,
        length=lambda w: w / 2,
        formula="1/a where |x| < a/2, 0 elsewhere",
    ),
}


@dataclass(frozen=True)
class Surrogate:
    """A surrogate family with a value of its parameter. Its text form is `name:parameter`, for example `atan:2`.

    Attributes:
        name: Name of the family, a key of `FAMILIES`.
        parameter: Value of the family's parameter.
    """

    name: str
    parameter: float

    @staticmethod
    def parse(text: str) -> Surrogate:
        """Parse `name` or `name:parameter`, for example `atan` or `atan:2`.

        Args:
            text: Name of the family, with an optional parameter. The default parameter is that of the family.

        Returns:
            The surrogate.

        Raises:
            ValueError: If the family is unknown, or the parameter is not a number between 0.001 and 1000.
        """
        name, _, value = text.partition(":")
        if name not in FAMILIES:
            raise ValueError(f"unknown surrogate '{name}': choose one of {', '.join(FAMILIES)}")
        try:
            parameter = float(value) if value else FAMILIES[name].default
        except ValueError:
            raise ValueError(f"surrogate '{text}': '{value}' is not a number") from None
        if not 1e-3 <= parameter <= 1e3:
            raise ValueError(f"surrogate '{text}': the parameter must lie between 0.001 and 1000")
        return Surrogate(name, parameter)

    @property
    def family(self) -> Family:
        """The family that defines the functions of this surrogate."""
        return FAMILIES[self.name]

    def steeper(self, factor: float) -> Surrogate:
        """Return the same family with its slope multiplied by `factor`."""
        return Surrogate(self.name, self.parameter * factor**self.family.slope)

    def primitive(self, x: Tensor) -> Tensor:
        """Return F(x), which rises from 0 to `area`."""
        return self.family.primitive(x, self.parameter)

    def first(self, x: Tensor) -> Tensor:
        """Return f'(x)."""
        return self.family.first(x, self.parameter)

    def second(self, x: Tensor) -> Tensor:
        """Return f''(x). It is 0 at the kinks of f'."""
        return self.family.second(x, self.parameter)

    @property
    def peak(self) -> float:
        """The value f'(0)."""
        return self.family.peak(self.parameter)

    @property
    def area(self) -> float:
        """The integral of f'. It is 1 where F is a distribution function."""
        return self.family.area(self.parameter)

    def __str__(self) -> str:
        return f"{self.name}:{self.parameter:g}"


def spike(x: Tensor, surrogate: Surrogate, relaxed: bool = False) -> Tensor:
    """Return the spikes at x = h - theta, with f'(x) and f''(x) as first and second derivative.

    The result is computed as a Taylor polynomial about the constant c = x:

        step(c) + f'(c) (x - c) + f''(c) (x - c)^2 / 2

    Every mode of differentiation therefore gives both derivatives, in any nesting. A custom autograd.Function would
    silently lose f'' in a jvp of a jvp.

    Args:
        x: Membrane potential minus threshold, finite, of any shape.
        surrogate: The surrogate derivative.
        relaxed: If True, the values are F(x) instead of 0 or 1. The network is then an ordinary smooth function.

    Returns:
        The spikes, with the shape of x.

    Raises:
        ValueError: If `relaxed` is True and the area of the surrogate is not 1, so that F is not a distribution
            function.
    """
    if relaxed and abs(surrogate.area - 1) > 1e-12:
        raise ValueError(f"surrogate {surrogate} has area {surrogate.area:.3g}, not 1, so it has no relaxed network")
    c = x.detach()
    value = surrogate.primitive(c) if relaxed else (c >= 0).to(x.dtype)
    e = x - c
    return value + e * (surrogate.first(c) + 0.5 * e * surrogate.second(c))


def _half_exp(c: float, mu: float, s: float) -> float:
    """Return E[exp(-c x); x > 0] for x ~ N(mu, s^2).

    There are two equivalent forms: erfcx overflows for large mu / s, and its logarithm cancels for large c s.
    """
    z = c * s - mu / s
    if z > 0:
        return math.exp(-((mu / s) ** 2) / 2) * float(special.erfcx(z / math.sqrt(2))) / 2
    return math.exp(c * c * s * s / 2 - c * mu + float(special.log_ndtr(-z)))


def _quadrature(surrogate: Surrogate, mu: float, s: float) -> float:
    """Return E[f'(x)^2] for x ~ N(mu, s^2) by composite Gauss-Legendre quadrature.

    The panels cover 38 standard deviations on both sides of mu and become finer towards 0, where f' varies. The range
    is this wide because a steep f' can put nearly all of the integral into the far tail that reaches 0.
    """
    lo, hi = mu - 38 * s, mu + 38 * s
    graded = surrogate.family.length(surrogate.parameter) * 2.0 ** np.arange(-8, 40)
    edges = np.concatenate([[0.0], graded, -graded, np.linspace(lo, hi, 153)])
    edges = np.unique(edges[(edges >= lo) & (edges <= hi)])
    points, weights = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (1 + points)
    first = surrogate.first(torch.from_numpy(x)).numpy()
    density = np.exp(-(((x - mu) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
    return float(np.sum(half * weights * first**2 * density))


def expected_square(surrogate: Surrogate, mu: float, s: float) -> float:
    """Return E[f'(x)^2] for x ~ N(mu, s^2), the constant in Theorem 1 of the IKUN paper (arXiv 2411.18250).

    erf, gaussian, rect, piecewise_exp, and atan at mu = 0 use a closed form. All other cases use quadrature, including
    those where a closed form loses its digits to cancellation, such as the truncated moments of triangle for s >> w.

    Args:
        surrogate: The surrogate derivative f'.
        mu: Mean of the membrane potential minus the threshold.
        s: Standard deviation of the membrane potential.

    Returns:
        The expectation.

    Raises:
        ValueError: If s is not positive.
    """
    if not s > 0:
        raise ValueError(f"the standard deviation must be positive, not {s}")
    p = surrogate.parameter
    match surrogate.name:
        case "erf":
            width = 1 + 4 * p * p * s * s
            return p * p / math.pi / math.sqrt(width) * math.exp(-2 * p * p * mu * mu / width)
        case "gaussian":
            return math.exp(-mu * mu / (p * p + 2 * s * s)) / (2 * math.pi * p * math.sqrt(p * p + 2 * s * s))
        case "rect":
            lower = (np.array([-p / 2, p / 2]) - abs(mu)) / s  # use the lower tail, where ndtr is accurate
            return float(np.diff(special.ndtr(lower))[0]) / p**2
        case "piecewise_exp":
            return p * p / 4 * (_half_exp(2 * p, mu, s) + _half_exp(2 * p, -mu, s))
        case "atan" if mu == 0 and p * s > 0.01:
            b = math.sqrt(2) / (math.pi * p * s)
            return p * p / 4 * (b * b + math.sqrt(math.pi) * b * (0.5 - b * b) * float(special.erfcx(b)))
        case _:
            return _quadrature(surrogate, mu, s)
