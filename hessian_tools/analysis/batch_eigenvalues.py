"""The largest eigenvalue as a distribution over mini-batches.

Training sees the curvature of one mini-batch at a time. Its largest eigenvalue varies from batch to batch. On average
it is larger than that of the whole data, because the largest eigenvalue is a convex function of the matrix.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessian_tools.analysis.settings import CURVATURES
from hessian_tools.evaluation import differentiable
from hessian_tools.io.json import clean
from hessian_tools.io.versions import versions
from hessian_tools.linalg.lanczos import Eigenpairs, eigenpairs, random_vector
from hessian_tools.objective import Objective
from hessian_tools.operators.curvature import OPERATORS
from hessian_tools.progress import Show
from hessian_tools.results.batch_eigenvalues import BATCHES_SCHEMA, BatchEigenvaluesResult
from hessian_tools.seeding import stream


@dataclass(frozen=True)
class BatchSettings:
    """Settings of `batch_eigenvalues`. Every field is stored with the result.

    Attributes:
        operator: "ggn", "hessian" or "fisher".
        batch_size: Number of samples in a batch.
        batches: Largest number of batches; None for as many as the samples fill.
        tol: Residual, relative to the eigenvalue, at which it has converged.
        seed: Random seed. It determines the batches too.
        memory: Memory in GiB for stored primals.
    """

    operator: str = "ggn"
    batch_size: int = 64
    batches: int | None = None
    tol: float = 1e-3
    seed: int = 0
    memory: float = 4.0

    def __post_init__(self) -> None:
        if self.operator not in CURVATURES:
            raise ValueError(f"operator must be {', '.join(CURVATURES)}, not {self.operator}")
        for name in ("batch_size", "batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol must lie between 0 and 1, not {self.tol}")


@differentiable
def batch_eigenvalues(
    objective: Objective,
    settings: BatchSettings | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: Show | None = None,
) -> BatchEigenvaluesResult:
    """Compute the largest eigenvalue on each of many random mini-batches without repetition, at the same weights.

    Args:
        objective: The loss, its data and its weights.
        settings: Settings of the analysis.
        provenance: The dicts `checkpoint`, `data`, `network` and `training` of the result.
        progress: Progress callback.

    Returns:
        The eigenvalues, and that of all batches together.

    Raises:
        ValueError: If there are fewer samples than `batch_size`.
        FloatingPointError: If a product is not finite.
    """
    s = settings or BatchSettings()
    if s.batch_size > objective.samples:
        raise ValueError(f"batch_size is {s.batch_size}, but there are only {objective.samples} samples")
    began = time.perf_counter()
    order = torch.randperm(objective.samples, generator=stream(s.seed, 1))
    parts = [part for part in order.split(s.batch_size) if len(part) == s.batch_size][: s.batches]
    found: list[Eigenpairs] = []
    vector: Tensor | None = None
    products = 0
    for i, part in enumerate([*parts, torch.cat(parts)]):
        whole = i == len(parts)
        op = OPERATORS[s.operator](objective.regrouped(parts if whole else [part]), s.memory * 2**30)
        noise = random_vector(op, stream(s.seed, 2, i))
        start = noise if vector is None else vector + 0.3 * noise / noise.norm()  # eigenvectors of batches are similar
        pairs = eigenpairs(op, 1, start=start, generator=stream(s.seed, 3, i), tol=s.tol)
        found.append(pairs)
        vector = pairs.vectors[:, 0]
        products += op.products * (len(parts) if whole else 1)
        if progress is not None:
            progress("batches", i + 1, len(parts) + 1, float(pairs.residuals[0]))
    *each, together = found
    known = provenance or {}
    return BatchEigenvaluesResult(
        schema=BATCHES_SCHEMA,
        checkpoint=known.get("checkpoint", {}),
        data={**known.get("data", {}), "samples": objective.samples},
        network=known.get("network", {}),
        training=known.get("training", {}),
        settings=clean(dataclasses.asdict(s)),
        num_parameters=objective.size,
        loss=objective.value_and_gradient()[0],
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        seed=s.seed,
        values=tuple(float(pairs.values[0]) for pairs in each),
        residuals=tuple(float(pairs.residuals[0]) for pairs in each),
        converged=tuple(bool(pairs.converged[0]) for pairs in each),
        whole=float(together.values[0]),
        whole_residual=float(together.residuals[0]),
        products=products,
        seconds=time.perf_counter() - began,
        versions=versions(),
    )
