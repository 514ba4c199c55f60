"""The result of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CALIBRATION_SCHEMA = "ikun-hessian/calibration/1"


@dataclass(frozen=True)
class Agreement:
    """One operator against the truth at one scale, over all directions.

    correlation: Spearman's, ci95 from the standard error of its Fisher z by bootstrap over directions (percentiles
    cover too rarely near 1). ratio: median of c / v'Av over the directions where both are positive, quartiles: of the
    same; within: share of all directions with a ratio from 0.7 to 1.4. slope: of log c against log v'Av (Theil and
    Sen), 1 for proportional.
    """

    correlation: float
    ci95: tuple[float, float]
    ratio: float
    quartiles: tuple[float, float]
    within: float
    slope: float


@dataclass(frozen=True)
class Scale:
    """The truth at one noise scale: curvature c, its standard error over the draws, and the step e, per direction.

    loss: the smoothed loss. movement: root mean square change of the outputs under the noise. trace, trace_stderr: of
    D H_s D, H_s the Hessian of the smoothed loss, from its change with s: dL_s/d(s^2) = tr(D H_s D) / 2. agreement: by
    operator. predictions: of the operators that depend on the scale.
    """

    scale: float
    loss: float
    movement: float
    curvature: tuple[float, ...]
    stderr: tuple[float, ...]
    step: tuple[float, ...]
    trace: float
    trace_stderr: float
    predictions: dict[str, tuple[float, ...]]
    traces: dict[str, float]
    agreement: dict[str, Agreement]
    fitted: str


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured. kinds: of the directions. predictions: v'Av per direction, traces: of D A D; both of
    the operators that do not depend on the scale."""

    kinds: tuple[str, ...]
    predictions: dict[str, tuple[float, ...]]
    traces: dict[str, float]
    scales: tuple[Scale, ...]


@dataclass(frozen=True)
class CalibrationResult:
    """A calibration and what it was measured on; saved as NAME.calibration.json."""

    schema: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    settings: dict[str, Any]
    num_parameters: int
    weight_norms: dict[str, float]
    loss: float
    accuracy: float
    dtype: str
    device: str
    seed: int
    seconds: float
    versions: dict[str, str]
    calibration: Calibration
