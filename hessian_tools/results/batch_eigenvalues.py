"""The largest eigenvalue on each of many mini-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hessian_tools.results.text import headline

BATCHES_SCHEMA = "ikun-hessian/batches/1"


@dataclass(frozen=True)
class BatchEigenvaluesResult:
    """The largest eigenvalue of an operator on each of many mini-batches at the same weights.

    Attributes:
        schema: Name and version of the file format.
        checkpoint: Source of the weights, such as path and SHA-256.
        data: Data set, split, number of samples and loss.
        network: Network and its surrogate.
        training: Settings and outcome of the training.
        settings: Settings of the analysis: operator, batch_size, batches, tol, seed and memory.
        num_parameters: Number P of parameters.
        loss: Loss at the weights, on all samples.
        dtype: Data type of the operator products.
        device: Device of the computation.
        seed: Random seed, which also determines the batches.
        values: Largest eigenvalue on each batch.
        residuals: ||A v - value v|| for each of them.
        converged: Whether the residual meets the tolerance.
        whole: Largest eigenvalue on the union of the batches. It is at most the mean of `values`, because the largest
            eigenvalue is a convex function of the matrix.
        whole_residual: Its residual.
        products: Number of products with the operator on a batch.
        seconds: Run time in seconds.
        versions: Versions of the libraries used.
    """

    schema: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    settings: dict[str, Any]
    num_parameters: int
    loss: float
    dtype: str
    device: str
    seed: int
    values: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: tuple[bool, ...]
    whole: float
    whole_residual: float
    products: int
    seconds: float
    versions: dict[str, str]

    @property
    def mean(self) -> float:
        """Mean over the batches."""
        return math.fsum(self.values) / len(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the batches; NaN for a single batch."""
        count, mean = len(self.values), self.mean
        return math.sqrt(math.fsum((v - mean) ** 2 for v in self.values) / (count - 1)) if count > 1 else math.nan

    def __repr__(self) -> str:
        operator, size = self.settings["operator"], self.settings["batch_size"]
        return (
            f"{headline(self)}\n  {operator}: lambda_max on {len(self.values)} batches of {size} samples is "
            f"{self.mean:.3g} on average, standard deviation {self.deviation:.2g}, from {min(self.values):.3g} to "
            f"{max(self.values):.3g}\n  {operator}: lambda_max on all of them together is {self.whole:.3g}"
        )
