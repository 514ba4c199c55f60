"""The eigenpairs of one operator by the method of the settings, and its largest eigenvalues without more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessian_tools.analysis.context import AnalysisContext
from hessian_tools.analysis.operator_spectrum.pyhessian import pyhessian_eigenpairs
from hessian_tools.analysis.planning.memory import Budget, budget
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.linalg.lanczos import Eigenpairs, Enough, eigenpairs
from hessian_tools.linalg.power_iteration import power_iteration
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator
from hessian_tools.results.operator_spectrum import Eigenvalue


def chosen_eigenpairs(
    objective: Objective,
    op: Operator,
    top: int,
    smallest: int,
    settings: SpectrumSettings,
    generator: torch.Generator,
    room: Budget,
    enough: Enough | None,
    progress: Callable[[int, int, float], None],
) -> Eigenpairs:
    """Compute the eigenpairs with the method and the backend of the settings.

    Without a tolerance in the settings, the Lanczos process stops where `enough` tells.
    """
    if settings.backend == "pyhessian":
        return pyhessian_eigenpairs(objective, op, top, tol=settings.tightest, seed=settings.seed)
    if settings.method == "power":
        return power_iteration(op, top, generator=generator, tol=settings.tightest, progress=progress)
    return eigenpairs(
        op,
        0 if settings.magnitude else top,
        smallest,
        magnitude=top if settings.magnitude else 0,
        generator=generator,
        tol=settings.tightest,
        max_products=settings.max_products,
        max_basis=room.vectors,
        basis_dtype=room.basis_dtype,
        enough=None if settings.tol or settings.vectors else enough,
        progress=progress,
    )


def two_ends(found: Sequence[Eigenvalue], top: int, settings: SpectrumSettings) -> tuple[list[int], list[int]]:
    """Return the indices of the largest eigenvalues, descending, and of the smallest, ascending.

    Eigenvalues that were found by magnitude are split by sign, unless all are negative.
    """
    order = sorted(range(len(found)), key=lambda i: -found[i].value)
    upper = [i for i in order if i < top]
    lower = [i for i in reversed(order) if i >= top]
    if (settings.magnitude or settings.method == "power") and found[upper[0]].value >= 0:
        lower = [i for i in reversed(upper) if found[i].value < 0]
        upper = [i for i in upper if found[i].value >= 0]
    return upper, lower


def lambda_max(run: AnalysisContext, name: str, op: Operator, start: Tensor, tol: float = 1e-3) -> float:
    """Compute the largest eigenvalue of an operator.

    Args:
        run: Settings, progress and stored phases of the analysis.
        name: Name of the phase.
        op: The operator.
        start: Start vector [P].
        tol: Residual, relative to the norm of the operator. The error of the value is of second order in it.

    Returns:
        The eigenvalue; NaN if it did not converge in 100 products.
    """
    room = budget(run.settings.memory * 2**30, op.shape[0], 1, dtype=op.dtype)
    step = run.meter.phase(name)

    def compute(op: Operator) -> dict[str, Any]:
        pairs = eigenpairs(
            op,
            1,
            generator=torch.Generator(),
            tol=tol,
            max_products=100,
            max_basis=min(100, room.vectors),
            basis_dtype=room.basis_dtype,
            start=start,
            progress=step,
        )
        return {"value": float(pairs.values[0]) if bool(pairs.converged[0]) else float("nan")}

    value: float = run.phase(name, op, compute)["value"]
    return value


def largest_eigenvalues(
    op: Operator,
    count: int,
    settings: SpectrumSettings,
    generator: torch.Generator,
    progress: Callable[[int, int, float], None],
) -> list[float]:
    """Return the largest eigenvalues that converged, in descending order."""
    room = budget(settings.memory * 2**30, op.shape[0], count, dtype=op.dtype)
    found = eigenpairs(
        op,
        count,
        generator=generator,
        tol=settings.tightest,
        max_products=settings.max_products,
        max_basis=room.vectors,
        basis_dtype=room.basis_dtype,
        progress=progress,
    )
    return sorted(found.values[found.converged].tolist(), reverse=True)
