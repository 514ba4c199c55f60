"""Critical sharpness: the smallest step of a grid along the surrogate gradient that increases the true loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.analysis.flatness.average_sharpness import PassProgress, outputs_at_weights
from hessian_tools.evaluation import differentiable
from hessian_tools.objective import Objective
from hessian_tools.perturbation import mean_loss, outputs_at, targets

LEAST, MOST = -23, 4  # log2 of the smallest and largest step of the grid, relative to the norm of the weights
DENSITY = 4  # steps of the grid per factor of 2
CUTS = 2  # bisections between the last step that does not raise the loss and the first one that does
ROUNDING = 4  # round-off of an output, in units of its dtype's epsilon


@dataclass(frozen=True)
class CriticalSharpness:
    """Critical sharpness: 2 / step.

    If no step of the grid makes the loss larger, `step` is inf and `value` is 0. If the smallest one does, `step` is 0
    and `value` is inf. Both are NaN if the gradient is zero.

    Attributes:
        value: 2 / step.
        step: The smallest step of the grid that makes the loss larger, refined by bisection.
        bounds: Interval that contains `value`.
        passes: Number of forward passes over all samples.
    """

    value: float
    step: float
    bounds: tuple[float, float]
    passes: int


@differentiable
def critical_sharpness(
    objective: Objective, gradient: Tensor, *, progress: PassProgress | None = None
) -> CriticalSharpness:
    """Compute 2 / step, where step is the smallest step along the negative gradient that increases the true loss.

    Source: Kalra et al., "A scalable measure of loss landscape curvature", 2026 (arXiv 2601.16979), for smooth
    networks. For a quadratic with Hessian A it is g'Ag / g'g, which is at most lambda_max. Here the loss is the true
    one, and the direction is the surrogate gradient, which training follows.

    The steps are those of a geometric grid: they move the weights by 2^-23, 2^-22.75, ..., 16 times the norm of the
    weights. All of them are tried in increasing order up to the first one that increases the loss, because the loss of
    a spiking network can rise and fall again between two steps (the doubling and bisection of Kalra & Barkeshli 2024,
    arXiv 2406.09405, misses such rises). So every rise that lasts for a factor of 2^(1/4) (19%) in the step is found; a
    shorter one is found only if a step of the grid meets it. Two bisections between the last step that does not
    increase the loss and the first one that does determine the value to 2.2%. This takes up to 112 forward passes,
    including the one at the weights.

    A loss that is not finite counts as larger. An increase below the round-off of the outputs does not count.

    Args:
        objective: The true loss, its data and its weights.
        gradient: Surrogate gradient [P].
        progress: Callback with the forward passes done and the upper limit of their total.

    Returns:
        The critical sharpness and its bounds.

    Raises:
        ValueError: If the gradient has another size, or if a weight, the gradient or the loss is not finite.
    """
    if gradient.shape != (objective.size,) or not gradient.isfinite().all():
        raise ValueError(f"the gradient must be {objective.size} finite numbers, one for each weight")
    at, passes = outputs_at_weights(objective), 1
    limit = mean_loss(objective, at) + _round_off(objective, at)
    w = objective.weights().double()
    g = gradient.to(w)
    if not g.any():
        return CriticalSharpness(math.nan, math.nan, (math.nan, math.nan), passes)
    # Normalized by the largest entry first, because the squares of a tiny gradient underflow.
    largest = float(g.abs().max())
    length = largest * float((g / largest).norm())
    unit = (float(w.norm()) or 1.0) / length
    most = 1 + DENSITY * (MOST - LEAST) + 1 + CUTS

    def larger(outputs: Tensor) -> bool:
        nonlocal passes
        passes += 1
        if progress is not None:
            progress(passes, most)
        return not mean_loss(objective, outputs) <= limit

    def point(k: float) -> Tensor:
        moved: Tensor = w - unit * 2.0**k * g
        return moved

    grid = [LEAST + i / DENSITY for i in range(DENSITY * (MOST - LEAST) + 1)]
    tried = zip(grid, outputs_at(objective, point, grid), strict=True)
    above = next((k for k, outputs in tried if larger(outputs)), math.inf)
    del tried  # stops the threads that compute further steps
    if above == LEAST:
        step, bounds = 0.0, (2 / (unit * 2.0**LEAST), math.inf)
    elif above == math.inf:
        step, bounds = math.inf, (0.0, 2 / (unit * 2.0**MOST))
    else:
        below = above - 1 / DENSITY
        for _ in range(CUTS):
            middle = (below + above) / 2
            (outputs,) = outputs_at(objective, point, [middle])
            below, above = (below, middle) if larger(outputs) else (middle, above)
        step, bounds = unit * 2.0 ** ((below + above) / 2), (2 / (unit * 2.0**above), 2 / (unit * 2.0**below))
    if progress is not None:
        progress(passes, passes)
    return CriticalSharpness(2 / step if step else math.inf, step, bounds, passes)


def _round_off(objective: Objective, outputs: Tensor) -> float:
    """Bound the change of the mean loss by the round-off of the outputs [N, ...], to first order."""
    wide = outputs.detach().double().requires_grad_()
    y = targets(objective)
    with torch.enable_grad():
        loss = objective.loss(wide, y.double() if y.is_floating_point() else y)
        (slope,) = torch.autograd.grad(loss, wide, allow_unused=True)
    moved = 0.0 if slope is None else float((slope * wide.detach()).abs().nan_to_num().sum())
    eps = torch.finfo(outputs.dtype).eps if outputs.is_floating_point() else 0.0
    return ROUNDING * (eps * moved + torch.finfo(torch.float64).eps * abs(float(loss.detach())))
