"""Differences in flatness between checkpoints that were measured with the same noise and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hessian_tools.results.comparability import CONDITIONS
from hessian_tools.results.flatness import FlatnessResult

if TYPE_CHECKING:  # a report that shows no differences needs no torch
    from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """Difference of one metric between two checkpoints.

    Attributes:
        value: The difference.
        ci95: 95% confidence interval over the common draws.
        data_stderr: Standard error over the common samples. NaN where it is only known from below.
        data_stderr_least: Lower limit in place of `data_stderr`, where a few samples carry the variance.
    """

    value: float
    ci95: tuple[float, float]
    data_stderr: float
    data_stderr_least: float = math.nan


ALWAYS = ("timesteps", "coding", "output", "readout", "valid")  # conditions of the network that every metric depends on


def incomparable(found: Sequence[FlatnessResult]) -> str:
    """Return why results cannot be compared at all: other data, loss, T or settings.

    Args:
        found: The results.

    Returns:
        The reason; "" if they can be compared.
    """
    for part, key, meaning in CONDITIONS:
        if part == "data" or key in ALWAYS:
            values = dict.fromkeys(str(getattr(r, part).get(key)) for r in found)
            if len(values) > 1:
                return f"the {meaning} differs: {', '.join(v if len(v) <= 40 else v[:12] + '…' for v in values)}"
    for name in found[0].settings:
        if name != "memory" and any(r.settings.get(name) != found[0].settings[name] for r in found):
            return f"the setting {name} differs"
    return ""


def unlike(found: Sequence[FlatnessResult]) -> list[str]:
    """Return what differs between the networks so that curvatures of the surrogate cannot be compared.

    Args:
        found: The results.

    Returns:
        Names of the conditions that differ.
    """
    return [
        meaning
        for part, key, meaning in CONDITIONS
        if part == "network" and key not in ALWAYS and len({str(r.network.get(key)) for r in found}) > 1
    ]


def differences(first: FlatnessResult, other: FlatnessResult) -> dict[str, Difference]:
    """Compute other - first for every metric that is a mean over draws. Both use the same draws and samples.

    Args:
        first: Result of one checkpoint.
        other: Result of another one.

    Returns:
        Differences by metric. The dict is empty for networks of different sizes, because their noise differs.

    Raises:
        ValueError: If the results cannot be compared.
    """
    if why := incomparable((first, other)):
        raise ValueError(f"results cannot be compared: {why}")
    import torch

    from hessian_tools.analysis.uncertainty.sampling_error import GROUPS, concentration, standard_error, withheld
    from hessian_tools.linalg.trace import estimate

    found: dict[str, Difference] = {}
    if first.parameters != other.parameters:
        return found
    samples = first.data["samples"]
    parts = torch.arange(samples).tensor_split(min(GROUPS, samples))  # as in Metric.groups
    counts = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    for name, metric in first.metrics.items():
        beside = other.metrics.get(name)
        if beside is None or not (metric.pairs and beside.pairs):
            continue
        pairs = estimate(_array(beside.pairs) - _array(metric.pairs))
        groups = _array(beside.groups) - _array(metric.groups)
        share = float(concentration(groups[:, None], counts))
        found[name] = Difference(
            pairs.estimate, pairs.ci95, *withheld(float(standard_error(groups[:, None], counts)), share)
        )
    return found


def _array(values: Sequence[float]) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float64)
