"""The diagonal of an operator of an analysis, exact where that is cheap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessian_tools.analysis.context import AnalysisContext, Factory
from hessian_tools.analysis.operator_spectrum.jacobian_diagonal import jacobian_diagonal, rows_needed
from hessian_tools.linalg.diagonal import diagonal
from hessian_tools.linalg.lanczos import Eigenpairs
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator
from hessian_tools.operators.curvature import ggn
from hessian_tools.results.operator_spectrum import Diagonal

MOST_ROWS = 20_000  # backward passes of single samples for an exact diagonal of the GGN


def measured_diagonal(
    run: AnalysisContext, name: str, objective: Objective, factory: Factory, pairs: Eigenpairs, index: int
) -> Diagonal:
    """Compute the diagonal of one operator.

    It is exact for at most `diagonal_probes` parameters, and for the GGN with at most `MOST_ROWS` outputs of all
    samples. Otherwise it is estimated, with the converged eigenpairs taken out.

    Args:
        run: Settings, progress and stored phases of the analysis.
        name: Name of the operator.
        objective: The loss, its data and its weights.
        factory: Function that makes the operator from an objective and the bytes for stored primals.
        pairs: Eigenpairs of the operator.
        index: Position of the operator in the analysis. Each position has its own random streams.

    Raises:
        FloatingPointError: If an entry is not finite.
    """
    probes, phase = run.settings.diagonal_probes, f"{name}: diagonal"
    if factory is ggn and objective.size > probes and (rows := rows_needed(objective)) <= MOST_ROWS:
        run.meter.phase(phase)(0, 1, float("nan"))
        exact = run.phases.keep(phase, lambda: dict(zip("vs", jacobian_diagonal(objective), strict=True)))
        values, data = exact["v"], exact["s"]
        return Diagonal("Jacobian", rows, _entries(objective, values, torch.zeros_like(values), data))
    step = run.meter.phase(phase)

    def compute(op: Operator) -> dict[str, Any]:
        known = pairs.take(pairs.converged)
        return vars(diagonal(op, probes, run.generator("diagonal", index), known, step))

    op = factory(objective, run.settings.memory * 2**30)
    found = run.phase(phase, op, compute)
    method = "unit vectors" if found["exact"] else "probes"
    unknown = torch.full_like(found["values"], torch.nan)
    return Diagonal(method, found["probes"], _entries(objective, found["values"], found["stderr"], unknown))


def _entries(objective: Objective, *columns: Tensor) -> dict[str, Any]:
    """Return an array [3, ...] per parameter."""
    parts = objective.split(torch.stack(columns))
    return {name: part.numpy() for name, part in zip(objective.parameters, parts, strict=True)}
