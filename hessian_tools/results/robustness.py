"""The result of a robustness analysis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

ROBUSTNESS_SCHEMA = "ikun-hessian/robustness/1"
WEIGHTS = "weight_noise"


@dataclass(frozen=True)
class Accuracy:
    """The share of samples classified rightly; stderr: over draws of the disturbance, NaN where there was one draw."""

    value: float
    stderr: float = math.nan


@dataclass(frozen=True)
class RobustnessResult:
    """What was measured of one checkpoint. disturbed: by disturbance ("blur", "weight_noise"), then by severity."""

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


def lost(result: RobustnessResult) -> dict[str, float]:
    """By disturbance: the accuracy lost, mean over its severities; rounded, so that equal losses are equal numbers."""
    return {
        kind: round(result.accuracy - sum(found.value for found in severities.values()) / len(severities), 12)
        for kind, severities in result.disturbed.items()
    }
