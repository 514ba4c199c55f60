"""The spectrum of the Gauss-Newton matrix without probes: all its eigenvalues that are not zero are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessian_tools.analysis.context import AnalysisContext
from hessian_tools.analysis.settings import DAMPING, SpectrumSettings
from hessian_tools.linalg.lanczos import Eigenpairs, certified
from hessian_tools.linalg.spectral_density import DensityEstimate
from hessian_tools.linalg.trace import TraceEstimate
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator
from hessian_tools.operators.gram import GramError, gram_eigenvectors, gram_matrix, gram_numbers
from hessian_tools.results.operator_spectrum import Functional

FEW_ROWS = 1500  # samples times outputs: with as many, the Gram matrix takes as long as Lanczos and probes


def exact_by_default(objective: Objective, settings: SpectrumSettings) -> bool:
    """Return whether settings leave it open if all eigenvalues are computed, and it takes less time."""
    chosen = (settings.exact, settings.steps, settings.probes, settings.accuracy)
    usual = settings.method == "lanczos" and settings.density and all(value is None for value in chosen)
    return usual and is_cheaper(objective, settings.memory)


@torch.no_grad()
def is_cheaper(objective: Objective, memory: float) -> bool:
    """Return whether all eigenvalues take less time than a few of them by the Lanczos process and a density.

    With `FEW_ROWS` samples times outputs it takes as long on a network of 6,056 parameters. What is kept may take a
    quarter of the memory.

    Args:
        objective: The loss, its data and its weights.
        memory: Memory in GiB.
    """
    if objective.group is not None or objective.samples > FEW_ROWS:
        return False
    rows = objective.samples * objective.outputs(objective.batches[0][0])[0].numel()
    return rows <= FEW_ROWS and 4 * gram_numbers(objective) * objective.dtype.itemsize <= memory * 2**30


def all_eigenvalues(objective: Objective, top: int, progress: Callable[[int, int, float], None]) -> dict[str, Tensor]:
    """Return all eigenvalues [r] that are not zero, in descending order, and the eigenvectors [P, k] of the largest.

    The eigenvalues are on the CPU, as those of an iterative method are, and the eigenvectors on the objective's device.

    Raises:
        GramError: If the objective has no Gram matrix, or a too large one.
    """
    gram = gram_matrix(objective, lambda done, total: progress(done, total, float("nan")))
    least = torch.finfo(objective.dtype).eps * float(gram.values[0]) if len(gram.values) else 0.0
    rank = min(int((gram.values > least).sum()), objective.size)
    values = gram.values[:rank]
    count = max(1, min(top, rank))
    vectors, _ = torch.linalg.qr(gram_eigenvectors(objective, gram, count))
    return {"values": values, "vectors": vectors.to(objective.device)}


def all_eigenvalues_if_chosen(
    run: AnalysisContext,
    objective: Objective,
    phase: Callable[..., dict[str, Any]],
    top: int,
    progress: Callable[[int, int, float], None],
) -> dict[str, Tensor] | None:
    """Return all eigenvalues of the GGN and eigenvectors of the largest; None if they are not to be computed so."""
    settings = run.settings
    given = bool(settings.exact) and settings.time is None
    try:
        if not (settings.exact or exact_by_default(objective, settings)):
            return None
        return phase("all eigenvalues", lambda op, random: all_eigenvalues(objective, top, progress))
    except (GramError, RuntimeError):  # torch raises the second, for want of memory or in networks not foreseen here
        if given:
            raise
        return None


def exact_pairs(op: Operator, values: Tensor, vectors: Tensor, tol: float) -> Eigenpairs:
    """Return eigenpairs with their residuals, one product each, and bounds from the other eigenvalues."""
    rest = values[vectors.shape[1] :]
    if len(rest) + vectors.shape[1] < op.shape[0]:
        rest = torch.cat([rest, torch.zeros(1, dtype=rest.dtype)])
    others = rest, torch.full_like(rest, torch.finfo(op.dtype).eps * float(values[0]) if len(values) else 0.0)
    norm = float(values[0]) if len(values) else None
    return certified(op, vectors, tol, norm, others, steps=op.shape[0])


def exact_density(values: Tensor, atoms: int, size: int) -> DensityEstimate:
    """Return the density as one quadrature whose nodes are all eigenvalues, zero for those that are not in `values`.

    Args:
        values: All eigenvalues [r] that are not zero, in descending order.
        atoms: How many of them count as deflated.
        size: P, the number of eigenvalues.
    """
    nodes = torch.cat([values, torch.zeros(1, dtype=values.dtype)])
    weights = torch.full_like(nodes, 1 / size)
    weights[-1] = max(0.0, 1 - len(values) / size)
    rest = values[atoms:]
    forms, squares = rest.sum()[None], rest.square().sum()[None]
    return DensityEstimate((nodes,), (weights,), atoms, len(values), forms, squares, (nodes,), (weights,), 0.0)


def exact_trace(values: Tensor) -> TraceEstimate:
    """Return the trace, without an error."""
    total = float(values.sum())
    return TraceEstimate(total, 0.0, (total, total), 0)


def exact_functions(values: Tensor, size: int, damping: float | None) -> dict[str, Any]:
    """Return the effective dimension and the log determinant, without an error."""
    z = damping or DAMPING * (float(values[0]) if len(values) else 0.0)
    if z <= 0:
        return {}

    def functional(value: float) -> Functional:
        return Functional(value, 0.0, (value, value), 0, 0.0, z)

    log = float((values + z).log().sum()) + (size - len(values)) * math.log(z)
    return {
        "effective_dimension": functional(float((values / (values + z)).sum())),
        "log_determinant": functional(log),
    }
