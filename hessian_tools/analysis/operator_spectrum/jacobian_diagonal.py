"""The exact diagonal of the GGN from the rows of the Jacobian of every sample.

With the eigenpairs (s_m, q_m) of the Hessian of a sample's loss with respect to its outputs, the GGN is the mean over
samples of sum_m s_m r_m r_m^T with r_m = J^T q_m, so its diagonal is the mean of sum_m s_m r_m^2. This takes one
backward pass per sample and direction of the outputs that is curved: at most N K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessian_tools.evaluation import differentiable
from hessian_tools.objective import Objective
from hessian_tools.runtime.cuda import full_precision

FLAT = 1e-12  # directions of the outputs with less curvature than this share of the largest are left out


def rows_needed(objective: Objective) -> int:
    """Return N M: the number of samples times the number of outputs of one sample."""
    with torch.no_grad():
        return objective.samples * objective.outputs(objective.first_inputs(1))[0].numel()


@differentiable
def jacobian_diagonal(objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the diagonal of the GGN [P] and its standard errors over the data [P], float64 on the CPU.

    The standard error is that of a mean over N independent samples; it is NaN for a single sample.

    Args:
        objective: The objective.

    Raises:
        FloatingPointError: If an entry is not finite.
    """
    single, size = objective.rebatched(1), objective.size
    sums = torch.zeros(2, size, dtype=torch.float64, device=objective.device)
    with full_precision(objective.device):
        for i in single.share:
            entries = _of_sample(single, *single.batches[i])
            sums += torch.stack([entries, entries.square()])
    first, second = (objective.summed(sums) / objective.samples).cpu()
    if not torch.isfinite(first).all():
        raise FloatingPointError("the diagonal of the GGN is not finite")
    n = objective.samples
    spread = (second - first.square()).clamp_min(0) / (n - 1) if n > 1 else torch.full_like(first, torch.nan)
    return first, spread.sqrt()


def _of_sample(objective: Objective, x: Tensor, y: Tensor) -> Tensor:
    """Return the diagonal [P] of the GGN of one sample."""
    total = torch.zeros(objective.size, dtype=torch.float64, device=objective.device)
    outputs = objective.outputs(x)
    leaf = outputs.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(objective.loss(leaf, y), leaf, create_graph=True, allow_unused=True)
    if slope is None or not slope.requires_grad or not outputs.requires_grad:
        return total
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0].flatten() for g in slope.flatten()]
    values, vectors = torch.linalg.eigh(torch.stack(rows))
    parameters = list(objective.parameters.values())
    for value, vector in zip(values.tolist(), vectors.unbind(1), strict=True):
        if abs(value) > FLAT * float(values.abs().max()):
            pull = vector.reshape(outputs.shape).to(outputs.dtype)
            row = torch.autograd.grad(outputs, parameters, pull, retain_graph=True, allow_unused=True)
            total += value * objective.flatten(row).double().square()
    return total
