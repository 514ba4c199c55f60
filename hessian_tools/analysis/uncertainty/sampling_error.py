"""Standard errors over the data: how much eigenvalues and trace would differ on other samples from the same
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessian_tools.linalg.basis import orthogonalize
from hessian_tools.linalg.lanczos import Eigenpairs
from hessian_tools.linalg.trace import rademacher
from hessian_tools.objective import Objective

if TYPE_CHECKING:
    from hessian_tools.operators.curvature import CurvatureOperator

GROUPS = 32  # groups of samples; a standard error is then accurate to 13%
PROBES = 4  # probes for the trace on the complement
CONCENTRATED = 0.3  # largest share of one group in a variance from which an interval may follow (see `concentration`)
BOOTSTRAP_DRAWS = 400  # bootstrap samples of the groups; a standard error is then accurate to 4%


def grouped(objective: Objective, generator: torch.Generator) -> Objective:
    """Shuffle the samples and divide them into `GROUPS` batches whose sizes differ by at most one.

    Shuffling is needed because batches of samples sorted by class would differ by more than chance. With fewer than
    `GROUPS` samples, each sample is a batch. There are more batches if one of them would otherwise exceed the largest
    batch of the objective.

    Args:
        objective: The loss and its data.
        generator: Random stream of the permutation.

    Returns:
        The objective with the new batches.
    """
    return objective.regrouped(sample_groups(objective, generator))


def sample_groups(objective: Objective, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return the samples of each group of `grouped`, as one index tensor [n] per group."""
    n = objective.samples
    count = max(min(GROUPS, n), math.ceil(n / max(objective.sizes)))
    return torch.randperm(n, generator=generator).tensor_split(count)


def data_errors(
    groups: CurvatureOperator,
    pairs: Eigenpairs,
    exact: Eigenpairs,
    generator: torch.Generator,
    forms_of: Callable[..., tuple[list[Tensor], Tensor]] | None = None,
) -> dict[str, Any]:
    """Estimate standard errors of eigenvalues and trace over the data.

    It takes one product with every group and every vector.

    Eigenvalues: the error is the standard deviation, over bootstrap samples b of the groups (Efron 1979), of the
    eigenvalues of V'A_b V, where V holds the converged eigenvectors. To first order an eigenvalue changes by v'dA v.
    But eigenvalues that are closer to each other than their errors mix, and then the first order is wrong by up to a
    factor of two. First order is used for eigenpairs that did not converge, and next to the rest of the spectrum,
    because the next eigenvector is then not in V.

    Trace: the estimate is the sum of v'Av over the converged eigenvectors, plus a probe estimate on their complement.
    Its variance is the covariance over the groups between the estimates of two different probes, because the variance
    of their mean would include the error of the probes. A quarter of that variance is used as a lower limit.

    Args:
        groups: Operator with one batch per group (see `grouped`).
        pairs: Eigenpairs, k of them.
        exact: The converged ones among `pairs`.
        generator: Random stream of the probes and the bootstrap.
        forms_of: Another way to compute `groups.batch_forms`.

    Returns:
        Standard errors: "pairs", a tensor [k], and "trace", a number. They are NaN for a single group. The keys
        "pairs concentration" and "trace concentration" hold what `concentration` says of each. Pass both to `withheld`
        before an error is reported.
    """
    probes, _ = orthogonalize(rademacher(groups, PROBES, generator), exact.vectors)
    (forms, probed), counts = (forms_of or groups.batch_forms)(pairs.vectors, probes)
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
    return {
        "pairs": errors,
        "trace": float(between.maximum(covariance.mean() / 4).sqrt()),
        "pairs concentration": concentration(diagonal, counts),
        "trace concentration": float(concentration(traces.mean(1, keepdim=True), counts)[0]),
    }


def concentration(values: Tensor, counts: Tensor) -> Tensor:
    """Return the largest share of one batch in the variance between batches.

    With 32 equal batches of light-tailed samples the share is about 0.17. If a few samples carry most of the variance,
    the share is large, and a standard error from the batches is often far too small, because other such samples are not
    among those drawn. Few samples have few batches, whose shares are large too.

    An interval of two standard errors is only right if it is withheld above `CONCENTRATED`. Measured on 15
    distributions with 20 to 1,500 samples: an interval that is reported and misses the mean occurs in at most 8% of the
    data sets (11 to 13% for two with infinite variance), whereas up to 94% of all intervals miss. It is withheld in 3%
    of the data sets for normal and uniform values with 64 samples or more, 5 to 10% for exponential ones with 400 or
    more, and nearly always for the curvature of a well-fitted cross-entropy.

    Args:
        values: Batch means [B, k].
        counts: Number of samples in each batch [B].

    Returns:
        Shares [k]; NaN for a single batch, and where the batches do not differ.
    """
    centred = values - counts @ values / counts.sum()
    squares = counts[:, None] * centred.square()
    shares: Tensor = squares.amax(0) / squares.sum(0) if len(counts) > 1 else torch.full_like(values[0], torch.nan)
    return shares


def samples_concentration(values: Tensor) -> float:
    """Return the `concentration` of values [N], one per sample, in random groups as those of `grouped`."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    groups = values.double().cpu()[order].tensor_split(min(GROUPS, len(values)))
    means = torch.stack([group.mean() for group in groups])[:, None]
    return float(concentration(means, torch.tensor([len(group) for group in groups], dtype=torch.float64)))


def withheld(error: float, *shares: float) -> tuple[float, float]:
    """Separate standard errors that give an interval from those that are only lower limits.

    Args:
        error: Standard error over the data.
        shares: Its concentration, NaN if the batches do not differ. For an eigenvalue also that of the trace: samples
            that are not among those drawn can bring other eigenvectors.

    Returns:
        The standard error and the lower limit. One of them is NaN.
    """
    return (error, math.nan) if all(share <= CONCENTRATED for share in shares) else (math.nan, error)


def standard_error(values: Tensor, counts: Tensor) -> Tensor:
    """Return the standard error of the mean over n independent samples, from means over batches.

    Args:
        values: Batch means [B, k].
        counts: Number of samples in each batch [B].

    Returns:
        Standard errors [k]; NaN for a single batch.
    """
    return _covariance(values, counts).diagonal().sqrt()


def _covariance(values: Tensor, counts: Tensor) -> Tensor:
    """Covariance [k, k] of the sample mean. The arguments are those of `standard_error`."""
    total, batches = counts.sum(), len(counts)
    if batches < 2:
        return torch.full((values.shape[1], values.shape[1]), float("nan"), dtype=torch.float64)
    centred = values - counts @ values / total
    return (counts[:, None] * centred).T @ centred / ((batches - 1) * total)


def _bootstrap(matrices: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Standard errors [k] of the ascending eigenvalues of the mean of matrices [B, k, k] over counts [B] samples."""
    batches = len(counts)
    chosen = torch.randint(batches, (BOOTSTRAP_DRAWS, batches), generator=generator)
    weights = torch.zeros(BOOTSTRAP_DRAWS, batches, dtype=torch.float64).scatter_add_(1, chosen, counts[chosen])
    means = (weights / weights.sum(1, keepdim=True)) @ matrices.flatten(1)
    values: Tensor = torch.linalg.eigvalsh(means.unflatten(1, matrices.shape[1:]))
    return values.std(0) * math.sqrt(batches / (batches - 1))
