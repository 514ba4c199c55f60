"""The result of a flatness analysis and its metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

NAN = math.nan
# what a number may be said of
SURROGATE, MATCHED = "surrogate", "estimate for the spiking loss under noise"
TRUE, BOUND, MIXED = "spiking loss", "spiking loss, lower bound", "loss yes, direction surrogate"


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


FLATNESS_SCHEMA = "ikun-hessian/flatness/1"


@dataclass(frozen=True)
class FlatnessResult:
    """Everything that `flatness` measured, and what it was measured on. main: the metrics that can carry a claim,
    others: the rest, both in the order of the screen."""

    schema: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    activity: dict[str, Any]
    settings: dict[str, Any]
    num_parameters: int
    parameters: dict[str, int]
    weight_norms: dict[str, float]
    loss: float
    accuracy: float
    gradient_norm: float
    dtype: str
    device: str
    seed: int
    main: dict[str, Metric]
    others: dict[str, Metric]
    seconds: float
    versions: dict[str, str]

    @property
    def metrics(self) -> dict[str, Metric]:
        return {**self.main, **self.others}
