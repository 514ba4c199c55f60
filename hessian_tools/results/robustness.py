"""Results of a robustness analysis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hessian_tools.results.text import brief

ROBUSTNESS_SCHEMA = "ikun-hessian/robustness/1"
WEIGHTS = "weight_noise"


@dataclass(frozen=True)
class Accuracy:
    """Accuracy under one disturbance.

    Attributes:
        value: Fraction of samples that are classified correctly.
        stderr: Standard error over the draws of the disturbance; NaN for a single draw.
    """

    value: float
    stderr: float = math.nan


@dataclass(frozen=True)
class RobustnessResult:
    """Accuracies of one checkpoint under disturbances, and the conditions under which they were measured.

    Attributes:
        schema: Name and version of the file format.
        checkpoint: Source of the weights, such as path and SHA-256.
        data: Data set, split and number of samples.
        network: Network and its surrogate.
        training: Settings and outcome of the training.
        settings: Settings of the analysis.
        accuracy: Accuracy without a disturbance.
        disturbed: Accuracy by disturbance (for example "blur" or "weight_noise"), then by severity.
        seconds: Run time in seconds.
        versions: Versions of the libraries used.
    """

    schema: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    settings: dict[str, Any]
    accuracy: float
    disturbed: dict[str, dict[str, Accuracy]]
    seconds: float
    versions: dict[str, str]

    __repr__ = brief


def lost(result: RobustnessResult) -> dict[str, float]:
    """Return the loss of accuracy under each disturbance: the mean over its severities.

    Values are rounded to 12 digits, so that equal losses are equal numbers.
    """
    return {
        kind: round(result.accuracy - sum(found.value for found in severities.values()) / len(severities), 12)
        for kind, severities in result.disturbed.items()
    }
