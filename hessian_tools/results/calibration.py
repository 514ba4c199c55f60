"""Results of a calibration: measured curvatures of the true loss and what each operator predicts for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hessian_tools.results.text import brief

CALIBRATION_SCHEMA = "ikun-hessian/calibration/1"


@dataclass(frozen=True)
class Agreement:
    """Agreement of one operator with the measured curvature at one noise scale, over all directions.

    Here c is the measured curvature along a direction v, and v'Av is what the operator A predicts.

    Attributes:
        correlation: Spearman rank correlation of c and v'Av.
        ci95: 95% confidence interval of `correlation`: Fisher's z with 1.96 standard errors on either side. The
            standard error is a bootstrap estimate over directions. (A percentile bootstrap interval covers too rarely
            near a correlation of 1.)
        ratio: Median of c / v'Av over the directions where both are positive.
        quartiles: First and third quartile of the same ratio.
        within: Fraction of all directions whose ratio is between 0.7 and 1.4.
        slope: Theil-Sen slope of log c against log v'Av. It is 1 if the two are proportional.
    """

    correlation: float
    ci95: tuple[float, float]
    ratio: float
    quartiles: tuple[float, float]
    within: float
    slope: float


@dataclass(frozen=True)
class Scale:
    """Measured curvature at one noise scale, and how well the operators predict it.

    Per-direction values are in the order of `Calibration.kinds`.

    Attributes:
        scale: Noise scale s, relative to the root mean square (RMS) of each filter.
        loss: Smoothed loss L_s(w).
        movement: RMS change of the network's outputs under the noise.
        curvature: Measured curvature c along each direction.
        stderr: Standard error of each curvature, over the noise draws.
        step: Step e of the second difference along each direction.
        trace: Measured trace of D H_s D, where H_s is the Hessian of the smoothed loss and D the diagonal matrix of
            filter RMS values. It follows from the change of the loss with s: dL_s/d(s^2) = tr(D H_s D) / 2.
        trace_stderr: Standard error of `trace`, over the noise draws.
        predictions: v'Av along each direction, by operator, for the operators that depend on the noise scale.
        traces: Trace of D A D, by operator, for the operators that depend on the noise scale.
        agreement: Agreement with the measured curvature, by operator.
        fitted: Label of the surrogate whose GGN is the operator "ggn, fitted"; "" if there is none.
        halves: The curvature along each direction from either half of the noise draws; empty in older results.
        redrawn: v'Av along each direction of the operator smoothed with other draws; empty without this operator.
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
    halves: tuple[tuple[float, ...], ...] = ()
    redrawn: tuple[float, ...] = ()

    __repr__ = brief


@dataclass(frozen=True)
class Calibration:
    """Measurements of `calibrate`.

    Attributes:
        kinds: Kind of each direction, for example "hessian, top" or "random".
        predictions: v'Av along each direction, by operator, for the operators that do not depend on the noise scale.
        traces: Trace of D A D, by operator, for the operators that do not depend on the noise scale.
        scales: Measurements at each noise scale.
    """

    kinds: tuple[str, ...]
    predictions: dict[str, tuple[float, ...]]
    traces: dict[str, float]
    scales: tuple[Scale, ...]

    __repr__ = brief


@dataclass(frozen=True)
class CalibrationResult:
    """A calibration and the conditions under which it was measured. It is saved as NAME.calibration.json.

    Attributes:
        schema: Name and version of the file format.
        checkpoint: Source of the weights, such as path and SHA-256.
        data: Data set, split, number of samples and loss.
        network: Network and its surrogate.
        training: Settings and outcome of the training.
        settings: Settings of the calibration.
        num_parameters: Number P of parameters.
        weight_norms: Norm of each parameter tensor, by name.
        loss: Loss at the weights.
        accuracy: Accuracy at the weights.
        dtype: Data type of the operator products.
        device: Device of the computation.
        seed: Random seed.
        seconds: Run time in seconds.
        versions: Versions of the libraries used.
        calibration: The measurements.
    """

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

    __repr__ = brief
