"""One flatness metric: its value, its errors, its cost, and what it may be said of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hessian_tools.average import DRAWS, LPF_SIGMA, RADIUS
from hessian_tools.measure import Run
from hessian_tools.objective import Objective
from hessian_tools.operators import Composed, Operator
from hessian_tools.trace import LEAST_PROBES
from hessian_tools.worst_case import KESKAR_EPSILON

NAN = math.nan

# what a number may be said of
SURROGATE, MATCHED = "surrogate", "estimate for the spiking loss under noise"
TRUE, BOUND, MIXED = "spiking loss", "spiking loss, lower bound", "loss yes, direction surrogate"


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


@dataclass(frozen=True)
class Metric:
    """One number. NaN (null in the JSON) stands for what there is not; `note` says why the value is missing or odd.

    ci95, and stderr where there is one: over what `over` names (residual, probes, draws, search). data_stderr: standard
    error for other samples of the same kind. valid: what the number may be said of; meaning: formula and radius.
    products (with the operator), gradients, forwards: passes over all samples that it took, beyond those of the metrics
    before it. parts: values beside it. pairs: means over antithetic pairs of draws; groups: means over `GROUPS` groups
    of samples; both of metrics that are means over draws, for differences between checkpoints.
    """

    value: float = NAN
    stderr: float = NAN
    ci95: tuple[float, float] = (NAN, NAN)
    data_stderr: float = NAN
    over: str = ""
    valid: str = ""
    meaning: str = ""
    products: int = 0
    gradients: int = 0
    forwards: int = 0
    note: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    pairs: tuple[float, ...] = ()
    groups: tuple[float, ...] = ()


@dataclass(frozen=True)
class Work:
    """What every part of one analysis needs."""

    objective: Objective
    settings: FlatnessSettings
    run: Run

    def measure(
        self,
        name: str,
        compute: Callable[[Operator], Metric],
        valid: str,
        meaning: str = "",
        op: Operator | None = None,
    ) -> Metric:
        """A phase that computes one metric, by products with `op` if there is one; what it refuses becomes its note."""

        def safely(op: Operator) -> dict[str, Any]:
            before = op.products
            try:
                metric = compute(op)
            except (ValueError, FloatingPointError) as error:
                metric = Metric(note=str(error))
            return vars(dataclasses.replace(metric, products=op.products - before, valid=valid, meaning=meaning))

        self.report(name)(0, 1)
        idle = Composed(1, torch.float64, torch.device("cpu"), lambda v: v)
        found = Metric(**self.run.phases.run(name, op or idle, safely))
        self.run.meter.finish(name, found.products + found.gradients + found.forwards)
        return found

    def report(self, name: str) -> Callable[[int, int], None]:
        step = self.run.meter.phase(name)
        return lambda done, most: step(done, most, NAN)
