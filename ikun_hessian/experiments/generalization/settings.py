"""Settings of the study of generalization: the table [generalization] of a preset."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_DRAWS = 100_000


@dataclass(frozen=True)
class GeneralizationSettings:
    """Settings of the measures of every network.

    Attributes:
        threshold: Training loss, on all training samples after an epoch, at which networks are compared.
        samples: Number of training samples of the measures.
        noise: Noise scale of the operators `smoothed` and `true`, relative to the root mean square of each filter.
        draws: Number of noise draws of the average-case measures, in antithetic pairs.
        probes: Number of probes of the traces.
        observations: Number of observations of the smoothed loss's own curvature; 0 to leave it out.
        order: Seed of the random order of the networks.
        environments: Options of `train` of every environment, by its name.

    Raises:
        ValueError: If a setting is not valid.
    """

    threshold: float = 0.025
    samples: int = 500
    noise: float = 0.1
    draws: int = 16
    probes: int = 16
    observations: int = 12
    order: int = 0
    environments: dict[str, dict[str, Any]] = field(default_factory=lambda: {"base": {}})

    def __post_init__(self) -> None:
        for name in ("threshold", "noise"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        for name, least in (("samples", 1), ("draws", 4), ("probes", 10), ("observations", 0), ("order", 0)):
            if not least <= getattr(self, name) <= MOST_DRAWS:
                raise ValueError(f"{name} must be from {least} to {MOST_DRAWS:,}, not {getattr(self, name)}")
        if self.draws % 2:
            raise ValueError(f"draws must be even (they form antithetic pairs), not {self.draws}")
        if self.observations == 1:
            raise ValueError("observations must be 0, or at least 2 for an error")
        if not self.environments:
            raise ValueError("environments must name at least one environment")

    def measured(self) -> dict[str, Any]:
        """Return the settings that a measured value depends on."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in ("order", "environments")}

    @staticmethod
    def from_table(values: Mapping[str, Any]) -> GeneralizationSettings:
        """Check the types of a table and build the settings. Raise ValueError if one is unknown or of a wrong type."""
        kinds = {"threshold": (int, float), "noise": (int, float), "environments": (dict,)}
        known = [f.name for f in dataclasses.fields(GeneralizationSettings)]
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"unknown key '{name}': choose from {', '.join(known)}")
            if not isinstance(value, kinds.get(name, (int,))) or isinstance(value, bool):
                raise ValueError(f"{name} has the invalid value {value!r}")
        for name, options in values.get("environments", {}).items():
            if not isinstance(options, dict):
                raise ValueError(f"environments: '{name}' must be a table of train options, not {options!r}")
            if not name.isidentifier():
                raise ValueError(f"environments: '{name}' must be a word of letters, digits and _")
        return GeneralizationSettings(**values)
