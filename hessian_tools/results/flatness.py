"""Results of a flatness analysis."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hessian_tools.results.text import brief, headline, with_error

NAN = math.nan
# Which loss a metric describes (`Metric.valid`).
SURROGATE, MATCHED = "surrogate", "estimate for the spiking loss under noise"
TRUE, BOUND, MIXED = "spiking loss", "spiking loss, lower bound", "loss yes, direction surrogate"


@dataclass(frozen=True)
class Metric:
    """One flatness metric with its errors and its cost.

    A number that does not exist is NaN here and null in the JSON file. `note` then gives the reason.

    Attributes:
        value: The metric.
        stderr: Standard error over the random numbers named in `over`.
        ci95: 95% confidence interval over probes or draws. For `over` equal to "residual" or "search" it is an error
            bound instead.
        data_stderr: Standard error over the data: for other samples from the same distribution. NaN where it is only
            known from below.
        data_stderr_least: Lower limit in place of `data_stderr`, where a few samples carry the variance.
        over: Source of the error in `stderr` and `ci95`: "residual", "probes", "draws" or "search".
        valid: Which loss the metric describes: SURROGATE, MATCHED, TRUE, BOUND or MIXED.
        meaning: Formula, with its radius or noise scale.
        products: Operator products over all samples that the metric took in addition to those of earlier metrics.
        gradients: Gradients over all samples, counted in the same way.
        forwards: Forward passes over all samples, counted in the same way.
        note: Why the value is missing or unusual.
        parts: Related values, by name.
        pairs: Mean of each antithetic pair of draws. Only metrics that are means over draws have it. It serves for
            differences between checkpoints.
        groups: Mean of each of `GROUPS` groups of samples, for the same metrics and the same purpose.
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
    data_stderr_least: float = NAN

    __repr__ = brief


FLATNESS_SCHEMA = "ikun-hessian/flatness/1"


@dataclass(frozen=True)
class FlatnessResult:
    """Metrics of a flatness analysis and the conditions under which they were measured.

    Attributes:
        schema: Name and version of the file format.
        checkpoint: Source of the weights, such as path and SHA-256.
        data: Data set, split, number of samples and loss.
        network: Network and its surrogate.
        training: Settings and outcome of the training.
        activity: Firing statistics, by layer of neurons.
        settings: Settings of the analysis.
        num_parameters: Number P of parameters.
        parameters: Number of elements of each parameter tensor, by name.
        weight_norms: Norm of each parameter tensor, by name.
        loss: Loss at the weights.
        accuracy: Accuracy at the weights; NaN if the targets are not class labels.
        gradient_norm: Norm of the surrogate gradient.
        dtype: Data type of the operator products.
        device: Device of the computation.
        seed: Random seed.
        main: Metrics that a claim can rest on, by name, in the order in which they are printed.
        others: All other metrics, in the same form.
        seconds: Run time in seconds.
        versions: Versions of the libraries used.
    """

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
        """All metrics by name: those of `main`, then those of `others`."""
        return {**self.main, **self.others}

    def __repr__(self) -> str:
        lines = [f"  {name}: {with_error(m.value, m)}" for name, m in self.main.items()]
        more = [f"  and {len(self.others)} others in .others"] if self.others else []
        return "\n".join([headline(self), *lines, *more])
