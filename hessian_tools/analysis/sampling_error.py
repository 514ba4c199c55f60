"""Standard errors of eigenvalues and trace from the data: how far they would be on other samples of the same kind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessian_tools.linalg.lanczos import Eigenpairs, orthogonalize
from hessian_tools.linalg.trace import rademacher
from hessian_tools.objective import Objective

if TYPE_CHECKING:
    from hessian_tools.operators.curvature import CurvatureOperator

GROUPS = 32  # parts of the data whose spread is measured: 13% accuracy of a standard error
PROBES = 4  # for the trace of the complement
BOOTSTRAP_DRAWS = 400  # bootstrap resamples of the groups: 4% accuracy


def grouped(objective: Objective, generator: torch.Generator) -> Objective:
    """The same samples, shuffled, in GROUPS batches whose sizes differ by one at most.

    Shuffled, for batches of samples sorted by class would differ by more than chance. One batch a sample where there
    are fewer than GROUPS; more batches where one would be larger than the objective's largest.
    """
    n = objective.samples
    count = max(min(GROUPS, n), math.ceil(n / max(objective.sizes)))
    return objective.regrouped(torch.randperm(n, generator=generator).tensor_split(count))


def data_errors(
    groups: CurvatureOperator, pairs: Eigenpairs, exact: Eigenpairs, generator: torch.Generator
) -> dict[str, Any]:
    """Standard errors of the eigenvalues (pairs [k]) and of the trace; NaN for a single group.

    groups: the operator, with one batch a group (see `grouped`). exact: the converged ones of `pairs`. One product
    with every group and vector.

    Eigenvalues: the spread, over bootstrap resamples of the groups (Efron 1979), of the eigenvalues of V'A_b V, V the
    converged eigenvectors. To first order an eigenvalue moves by v'dA v alone, but neighbours closer than their errors
    mix, and that is off by up to a factor of two. First order serves unconverged pairs, and the last pair before the
    rest of the spectrum, whose next neighbour is not in V.
    Trace: the converged pairs' forms, plus probes on their complement. Its variance is the covariance, over the groups,
    between two probes' forms: the variance of their mean holds the probes' own error besides. A quarter of that one is
    the least that is believed.
    """
    probes, _ = orthogonalize(rademacher(groups, PROBES, generator), exact.vectors)
    (forms, probed), counts = groups.batch_forms(pairs.vectors, probes)
    probed = probed.diagonal(dim1=1, dim2=2)
    diagonal = forms.diagonal(dim1=1, dim2=2)
    errors = standard_error(diagonal, counts)
    known = pairs.converged.nonzero().flatten()
    if len(known) and len(counts) > 1:
        order = known[pairs.values[known].argsort()]
        spread = _bootstrap(forms[:, order][:, :, order], counts, generator)
        if missing := groups.shape[0] - len(known):
            rest = float(counts @ probed.mean(1) / counts.sum()) / missing  # the mean of all other eigenvalues
            cut = int((pairs.values[order] < rest).sum())
            inner = slice(max(0, cut - 1), cut + 1)
            spread[inner] = errors[order[inner]]
        errors[order] = spread
    traces = diagonal[:, known].sum(1, keepdim=True) + probed
    covariance = _covariance(traces, counts)
    between = (covariance.sum() - covariance.trace()) / (PROBES * (PROBES - 1))
    return {"pairs": errors, "trace": float(between.maximum(covariance.mean() / 4).sqrt())}


def standard_error(values: Tensor, counts: Tensor) -> Tensor:
    """Standard error [k] of the sample mean of n independent samples, from batch means [B, k] of counts [B] samples.

    NaN for a single batch.
    """
    return _covariance(values, counts).diagonal().sqrt()


def _covariance(values: Tensor, counts: Tensor) -> Tensor:
    """Covariance [k, k] of the sample mean, arguments as in `standard_error`."""
    total, batches = counts.sum(), len(counts)
    if batches < 2:
        return torch.full((values.shape[1], values.shape[1]), float("nan"), dtype=torch.float64)
    centred = values - counts @ values / total
    return (counts[:, None] * centred).T @ centred / ((batches - 1) * total)


def _bootstrap(matrices: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Standard errors [k] of the ascending eigenvalues of the mean of matrices [B, k, k] of counts [B] samples."""
    batches = len(counts)
    chosen = torch.randint(batches, (BOOTSTRAP_DRAWS, batches), generator=generator)
    weights = torch.zeros(BOOTSTRAP_DRAWS, batches, dtype=torch.float64).scatter_add_(1, chosen, counts[chosen])
    means = (weights / weights.sum(1, keepdim=True)) @ matrices.flatten(1)
    values: Tensor = torch.linalg.eigvalsh(means.unflatten(1, matrices.shape[1:]))
    return values.std(0) * math.sqrt(batches / (batches - 1))
