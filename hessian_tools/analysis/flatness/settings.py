"""Settings of a flatness analysis and their defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hessian_tools.io.errors import check_scale
from hessian_tools.linalg.trace import LEAST_PROBES

RADIUS = 0.1
DRAWS = 32
LPF_SIGMA = 0.01
KESKAR_EPSILON = 1e-3  # Keskar et al. 2017, who also use 5e-4


@dataclass(frozen=True)
class FlatnessSettings:
    """Settings of `flatness`. Every field is stored with the result.

    Attributes:
        smoothed: Noise scales of the operator `smoothed`, relative to each filter's root mean square.
        radius: Noise scale of the average sharpness, relative to the weights.
        sigma: Noise scale of LPF, relative to the norm of each filter.
        rho: Radius of SAM, m-sharpness and worst-case sharpness. It is relative to the norm of the weights for SAM and
            m-sharpness, and to each weight for the adaptive worst case.
        epsilon: Size of Keskar's box.
        drop: Drop of the accuracy for PAC-Bayes sigma, between 0 and 1.
        m: Number of samples in a batch of m-sharpness.
        draws: Number of noise samples, in antithetic pairs: an even number, at least 4.
        probes: Number of probes of the traces.
        damping: Damping z of effective dimension and log determinant. With None it is 1% of lambda_max.
        seed: Random seed.
        memory: Memory in GiB for stored primals and eigenvectors.
    """

    smoothed: tuple[float, ...] = ()
    radius: float = RADIUS
    sigma: float = LPF_SIGMA
    rho: float = 0.01
    epsilon: float = KESKAR_EPSILON
    drop: float = 0.1
    m: int = 64
    draws: int = DRAWS
    probes: int = 32
    damping: float | None = None
    seed: int = 0
    memory: float = 4.0

    def __post_init__(self) -> None:
        positive = {name: getattr(self, name) for name in ("radius", "sigma", "rho", "epsilon", "memory")}
        positive |= {"damping": 1.0 if self.damping is None else self.damping}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value}")
        scales = [(name, getattr(self, name)) for name in ("radius", "sigma", "rho", "epsilon")]
        for name, value in [*scales, *(("noise", s) for s in self.smoothed)]:
            check_scale(name, value)
        if not 0 < self.drop < 1:
            raise ValueError(f"drop (of the accuracy) must lie between 0 and 1, not {self.drop}")
        if self.draws < 4 or self.draws % 2:
            raise ValueError(f"draws must be even and at least 4 (they form antithetic pairs), not {self.draws}")
        if self.m < 1 or self.probes < LEAST_PROBES:
            raise ValueError(f"m must be at least 1 and probes at least {LEAST_PROBES}, not {self.m} and {self.probes}")
