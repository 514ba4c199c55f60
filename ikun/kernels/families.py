"""The surrogates that the numba kernels compute."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ikun.surrogates import Surrogate

# Families of f' and f'' with constants p, q and k. s is the sign of z.
LORENTZ = 0  # p / (1 + q z^2);       k z f'^2
BUMP = 1  # p / (1 + q |z|)^2;        k s f'^1.5
TRIANGLE = 2  # max(0, p - q |z|);    k s where f' > 0, else 0
RECT = 3  # p where |z| < q, else 0;  0
LAPLACE = 4  # p exp(-q |z|);         k s f'
GAUSS = 5  # p exp(-q z^2);           k z f'
LOGISTIC = 6  # p y / (1 + y)^2;      k s f' (1 - y) / (1 + y),  with y = exp(-q |z|)


def family_constants(surrogate: Surrogate) -> tuple[int, float, float, float]:
    """Return (family, p, q, k) of a surrogate."""
    a, peak = surrogate.parameter, surrogate.peak
    match surrogate.name:
        case "atan":
            q = (math.pi * a / 2) ** 2
            return LORENTZ, peak, q, -2 * q / peak
        case "fast_sigmoid" | "superspike" | "softsign":
            return BUMP, peak, a, -2 * a / math.sqrt(peak)
        case "triangle" | "linear":
            return TRIANGLE, 1 / a, a**-2, -(a**-2)
        case "rect":
            return RECT, 1 / a, a / 2, 0.0
        case "piecewise_exp":
            return LAPLACE, peak, a, -a
        case "erf":
            return GAUSS, peak, a**2, -2 * a**2
        case "gaussian":
            return GAUSS, peak, 0.5 / a**2, -(a**-2)
        case "sigmoid":
            return LOGISTIC, a, a, -a
        case "tanh":
            return LOGISTIC, 2 * a, 2 * a, -2 * a
    raise ValueError(f"the kernels do not have the surrogate {surrogate.name}")
