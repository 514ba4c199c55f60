"""Critical sharpness: the smallest step along the surrogate gradient that increases the true loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hessian_tools.analysis.flatness.average_sharpness import PassProgress, outputs_at_weights
from hessian_tools.objective import Objective
from hessian_tools.perturbation import mean_loss, outputs_at

FIRST_STEP = 2.0**-7  # norm of the first step, relative to that of the weights
SHRINK, GROW, CUTS = 16, 11, 4  # largest number of halvings and of doublings of that step, then bisections


@dataclass(frozen=True)
class CriticalSharpness:
    """Critical sharpness: 2 / step.

    If no step makes the loss larger, `step` is inf and `value` is 0. If every step does, `step` is 0 and `value` is
    inf. Both are NaN if the gradient is zero.

    Attributes:
        value: 2 / step.
        step: Smallest step found that makes the loss larger.
        bounds: Interval that contains `value`.
        passes: Number of forward passes over all samples.
    """

    value: float
    step: float
    bounds: tuple[float, float]
    passes: int


def critical_sharpness(
    objective: Objective, gradient: Tensor, *, progress: PassProgress | None = None
) -> CriticalSharpness:
    """Compute 2 / step, where step is the smallest step along the negative gradient that increases the true loss.

    Source: Kalra et al., "A scalable measure of loss landscape curvature", 2026 (arXiv 2601.16979), for smooth
    networks. For a quadratic with Hessian A it is g'Ag / g'g, which is at most lambda_max. Here the loss is the true
    one, and the direction is the surrogate gradient, which training follows.

    The line search is that of Kalra & Barkeshli 2024 (arXiv 2406.09405): doubling, then bisection. The first step is
    1/128 of the norm of the weights, and is halved while it is too long. A loss that is not finite counts as larger.
    The bisection ends at a factor of 2^(1/16), so the value is known to 2.2%. The steps range from 2^-23 to 16 times
    the norm of the weights. A search usually takes 6 to 12 forward passes, including the one at the weights.

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
    base, passes = mean_loss(objective, outputs_at_weights(objective)), 1
    w = objective.weights().double()
    g = gradient.to(w)
    if not g.any():
        return CriticalSharpness(math.nan, math.nan, (math.nan, math.nan), passes)
    unit = FIRST_STEP * (float(w.norm()) or 1.0) / float(g.norm())

    def larger(k: float, most: int) -> bool:
        nonlocal passes
        (outputs,) = outputs_at(objective, lambda step: w - step * g, [unit * 2.0**k])
        passes += 1
        if progress is not None:
            progress(passes, passes + most)
        return not mean_loss(objective, outputs) <= base

    k = 0
    if larger(k, max(SHRINK, GROW) + CUTS):
        while k > -SHRINK and larger(k - 1, SHRINK + k - 1 + CUTS):
            k -= 1
        below, above = k - 1.0, float(k)
    else:
        while k < GROW and not larger(k + 1, GROW - k - 1 + CUTS):
            k += 1
        below, above = float(k), k + 1.0
    if below < -SHRINK:
        step, bounds = 0.0, (2 / (unit * 2.0**above), math.inf)
    elif above > GROW:
        step, bounds = math.inf, (0.0, 2 / (unit * 2.0**below))
    else:
        for left in reversed(range(CUTS)):
            middle = (below + above) / 2
            below, above = (below, middle) if larger(middle, left) else (middle, above)
        step, bounds = unit * 2.0 ** ((below + above) / 2), (2 / (unit * 2.0**above), 2 / (unit * 2.0**below))
    if progress is not None:
        progress(passes, passes)
    return CriticalSharpness(2 / step if step else math.inf, step, bounds, passes)
