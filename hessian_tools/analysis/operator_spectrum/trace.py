"""The probes of a trace: no more than its error from the data needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from hessian_tools.analysis.operator_spectrum.pyhessian import pyhessian_trace
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.linalg.lanczos import Eigenpairs
from hessian_tools.linalg.spectral_density import DensityEstimate
from hessian_tools.linalg.trace import form_variance, probe_moments
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator

ENOUGH = 0.3  # error of the probes relative to that from the data, which then grows by 4%
FIRST, LEAST = 8, 12  # probes of a trace from which the number of further ones follows, and fewest in all


def trace_forms(
    objective: Objective,
    op: Operator,
    exact: Eigenpairs,
    spectral: DensityEstimate | None,
    settings: SpectrumSettings,
    generator: torch.Generator,
    progress: Callable[[int, int, float], None],
    data_error: float,
) -> dict[str, Any]:
    """Return z'Az (forms) and ||Az||^2 (squared) of probes, including those of the density.

    "variance" is that of z'Az (see `form_variance`), from the probes that are not those of the density. From the first
    `FIRST` of them follows how many give a standard error of `ENOUGH` times `data_error` (NaN: not known); at most
    `trace_probes` are made.
    """
    if settings.backend == "pyhessian":  # its own estimator, without deflation
        forms = pyhessian_trace(objective, seed=settings.seed)
        op.products += len(forms)
        return {"forms": forms, "squared": torch.full((1,), torch.nan)}
    enough = ENOUGH * data_error
    quadratic, squared, entries, own = [], [], torch.zeros(op.shape[0], dtype=torch.float64), torch.empty(0)
    if spectral is not None:
        quadratic.append(spectral.quadratic)
        squared.append(spectral.squared)
    given = sum(len(q) for q in quadratic)
    missing = first = max(0, settings.trace_probes - given)
    while missing > 0:
        if len(own) == FIRST and enough > 0:
            needed = max(LEAST, math.ceil(form_variance(own, entries) / enough**2))
            missing = min(missing, max(0, needed - given - FIRST))
            if not missing:
                break
        count = min(missing, 4)
        q, s, e = probe_moments(op, count, generator, exact)
        quadratic.append(q)
        squared.append(s)
        entries += e
        own = torch.cat([own, s])
        missing -= count
        progress(first - missing, first, float("nan"))
    variance = form_variance(own, entries)
    return {"forms": torch.cat(quadratic), "squared": torch.cat(squared), "variance": variance}
