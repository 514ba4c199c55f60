"""What a flatness analysis measures, and its defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hessian_tools.linalg.trace import LEAST_PROBES

RADIUS = 0.1
DRAWS = 32
LPF_SIGMA = 0.01
KESKAR_EPSILON = 1e-3  # Keskar et al. 2017; they also use 5e-4


@dataclass(frozen=True)
class FlatnessSettings:
    """What `flatness` measures; every field is stored with the result.

    smoothed: scales of the weight noise, over each filter's root mean square, at which the noise-matched operator is
    measured. radius: of the average sharpness, over the size of the weights. sigma: of LPF, over each filter's norm.
    rho: of SAM and m-sharpness (steps on m samples), over the norm of the weights, and of the adaptive worst case, over
    each weight's size. epsilon: of Keskar's box. drop: of accuracy, for PAC-Bayes sigma. draws: of all noise. probes:
    of the traces. damping: z of effective dimension and log det, 1% of lambda_max if None. memory: GiB for kept primals
    and eigenvectors.
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
        for name, value in [*positive.items(), *(("noise", s) for s in self.smoothed)]:
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value}")
        if not 0 < self.drop < 1:
            raise ValueError(f"drop, of the accuracy, must lie between 0 and 1, not {self.drop}")
        if self.draws < 4 or self.draws % 2:
            raise ValueError(f"draws come in antithetic pairs, at least two: 4, 6, ..., not {self.draws}")
        if self.m < 1 or self.probes < LEAST_PROBES:
            raise ValueError(f"m must be at least 1 and probes at least {LEAST_PROBES}, not {self.m} and {self.probes}")
