"""The largest increase of the true loss within a ball around the weights.

Every number here is a LOWER BOUND of a maximum: the largest increase that was found. The surrogate gradient is not the
gradient of any function, so ascent along it may miss increases of the true loss. A search that uses only forward passes
complements it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from hessian_tools.analysis.uncertainty.sampling_error import concentration, standard_error
from hessian_tools.evaluation import copy_model, differentiable
from hessian_tools.objective import Objective
from hessian_tools.perturbation import mean_loss, noise, noise_scales, outputs_at
from hessian_tools.seeding import stream

S = TypeVar("S")
BALLS = ("l2", "adaptive", "filter", "keskar")
STEPS, SEARCHES = 20, 210
PATIENCE = 3  # steps without a rise before the step is halved
ROUND = 20  # directions in one round of the search, in antithetic pairs


@dataclass(frozen=True)
class SamSharpness:
    """Lower bound of max L(w + d) - L(w) over ||d|| <= rho, from one step along the surrogate gradient.

    Attributes:
        value: Mean over the batches. It is negative if the steps decrease the true loss.
        stderr: Standard error for other samples from the same distribution; NaN for a single batch.
        rho: Length of the step.
        samples: Number of samples in a batch.
        batches: Number of batches.
        without_gradient: Number of batches with a zero gradient. They have no direction and count as 0.
        concentration: Largest share of one batch in the variance between batches. Pass it to `sampling_error.withheld`
            before `stderr` is reported.
    """

    value: float
    stderr: float
    rho: float
    samples: int
    batches: int
    without_gradient: int
    concentration: float = math.nan


@dataclass(frozen=True)
class WorstCase:
    """Lower bound of the maximum of the true loss over a ball (see `worst_case`).

    Attributes:
        kind: Kind of the ball.
        rho: Relative radius.
        radius: Radius of the ball, in the units of its kind.
        loss: L(w).
        value: The larger of `ascent` and `search`. For "keskar" it is 100 (max L - L(w)) / (1 + L(w)).
        by: Which of them found it: "ascent" or "search", or "neither" if the loss did not increase.
        ascent: Increase L(w + d) - L(w) found along surrogate gradients. It is never negative, because d = 0 is in the
            ball.
        search: Increase found by forward passes only. It is never negative either.
        gradients: Number of gradients over all samples.
        forwards: Number of forward passes over all samples.
        seed: Random seed.
    """

    kind: str
    rho: float
    radius: float
    loss: float
    value: float
    by: str
    ascent: float
    search: float
    gradients: int
    forwards: int
    seed: int


def at(objective: Objective, w: Tensor) -> Objective:
    """Return the objective at other weights [P], with its own copy of the model."""
    if objective.reset is not None:
        objective.reset(objective.model)  # a state with an autograd graph cannot be copied
    model = copy_model(objective.model)
    named = dict(model.named_parameters())
    parameters: dict[str, Tensor] = {name: named[name] for name in objective.parameters}
    with torch.no_grad():
        for p, value in zip(parameters.values(), objective.split(w), strict=True):
            p.copy_(value)
    return replace(objective, model=model, parameters=parameters)


@differentiable
def sam_sharpness(objective: Objective, rho: float) -> SamSharpness:
    """Compute L(w + rho g / ||g||) - L(w), with the surrogate gradient g and the true loss L (Foret et al. 2021).

    It takes one gradient and two forward passes.

    Args:
        objective: The loss, its data and its weights.
        rho: Length of the step in weight space.

    Returns:
        The sharpness.

    Raises:
        ValueError: If `rho` is not positive, or if the weights, losses or gradients are not finite.
    """
    return _sam(objective, rho, [torch.arange(objective.samples)])


@differentiable
def m_sharpness(objective: Objective, rho: float, m: int, seed: int = 0) -> SamSharpness:
    """Compute the mean of `sam_sharpness` over disjoint batches of m samples (Foret et al. 2021).

    Each batch has its own step. The last batch may be smaller and is weighted by its size. The cost is that of
    `sam_sharpness`, in small batches.

    Args:
        objective: The loss, its data and its weights.
        rho: Length of the step in weight space.
        m: Number of samples in a batch.
        seed: Seed of the random division into batches.

    Returns:
        The sharpness.

    Raises:
        ValueError: If `m` is not between 1 and N, and as in `sam_sharpness`.
    """
    if not 1 <= m <= objective.samples:
        raise ValueError(f"m must lie between 1 and the {objective.samples} samples, not {m}")
    return _sam(objective, rho, torch.randperm(objective.samples, generator=stream(seed)).split(m))


def _sam(objective: Objective, rho: float, parts: Sequence[Tensor]) -> SamSharpness:
    """Average the increase after one step over the parts, each with its own step."""
    w = _weights(objective, rho)
    together = objective.rebatched(objective.samples)
    own = at(objective, w.to(objective.dtype))
    rises, without = [], 0
    for part in parts:
        batches = together.regrouped(part.split(max(objective.sizes))).batches
        g = _gradient(replace(own, batches=batches))[1]
        without += not g.any()
        ends = (w, w + rho * g / g.norm()) if g.any() else (w, w)
        start, end = _losses(replace(objective, batches=batches), lambda point: point, ends)
        rises.append([end - start])
    counts = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    values = torch.tensor(rises, dtype=torch.float64)
    mean = float(counts @ values[:, 0] / counts.sum())
    error, share = float(standard_error(values, counts)), float(concentration(values, counts))
    return SamSharpness(mean, error, rho, len(parts[0]), len(parts), without, share)


@differentiable
def worst_case(
    objective: Objective,
    rho: float,
    *,
    kind: str = "adaptive",
    steps: int = STEPS,
    searches: int = SEARCHES,
    seed: int = 0,
) -> WorstCase:
    """Find a lower bound of the largest increase of the true loss over a ball of weights w + d.

    The kinds of balls:

    - l2: ||d|| <= rho ||w||.
    - adaptive: ||d / w|| <= rho sqrt(P). So rho is the root mean square of the relative change of a weight. This is the
      ball of Kwon et al. 2021, and of Andriushchenko et al. 2023 with c = |w| and p = 2, except for the factor sqrt(P).
      With this factor one rho suits networks of all sizes, and the ball is that of l2 if all |w| are equal. It is the
      same ball after a rescaling of the weights that does not change the network. Zero weights stay zero.
    - filter: as adaptive, relative to the root mean square of the filter of a weight (`perturbation.noise_scales`).
    - keskar: |d_i| <= rho (|w_i| + 1), with value 100 (max L - L) / (1 + L) (Keskar et al. 2017, metric 2.1; there rho
      is KESKAR_EPSILON).

    The ascent takes `steps` projected steps along the surrogate gradient, in coordinates u with d = scale * u. The
    first step has the length of the radius and is that of SAM. After PATIENCE steps without an increase, the ascent
    restarts from the best point with half the step length.

    The search uses `searches` forward passes. Each round tries random directions around the best point, and a step
    along their sum weighted by the losses (Spall 1992). After a round without an increase the length is halved.
    Networks of the same size get the same directions.

    If the gradient is zero (for example if no neuron fires), the ascent uses random directions. If the loss does not
    increase there either, the value is 0.

    The cost is `steps` gradients and `searches` + 3 forward passes.

    Args:
        objective: The loss, its data and its weights.
        rho: Relative radius.
        kind: Kind of the ball: "l2", "adaptive", "filter" or "keskar".
        steps: Number of steps of the ascent.
        searches: Number of forward passes of the search.
        seed: Random seed.

    Returns:
        The largest increase found.

    Raises:
        ValueError: If the kind is unknown, `rho` is not positive, `steps` or `searches` is below 1, the weights, losses
            or gradients are not finite, or all weights are zero and the ball is relative to them.
    """
    if kind not in BALLS:
        raise ValueError(f"unknown ball '{kind}': choose from {', '.join(BALLS)}")
    if min(steps, searches) < 1:
        raise ValueError(f"steps and searches must be at least 1, not {steps} and {searches}")
    w = _weights(objective, rho)
    scale = {
        "l2": lambda: torch.ones_like(w),
        "adaptive": w.abs,
        "filter": lambda: noise_scales(objective).double(),
        "keskar": lambda: w.abs() + 1,
    }[kind]()
    radius = {"l2": rho * float(w.norm()), "keskar": rho}.get(kind, rho * math.sqrt(len(w)))
    if radius == 0 or not scale.any():
        raise ValueError(f"all weights are zero: the ball '{kind}' is relative to them and contains no other point")
    ball = _Ball(at(objective, w.to(objective.dtype)), w, scale, radius, kind == "keskar", seed)
    (start,) = ball.losses(lambda u: u, [torch.zeros_like(w)])
    if kind == "keskar" and start <= -1:
        raise ValueError(f"Keskar's sharpness divides by 1 + L: it needs a loss above -1, not {start:.6g}")
    ascent = max(0.0, *(loss - start for loss in ball.losses(lambda u: u, _ascent(ball, steps, searches))))
    search = _search(ball, start, searches) - start
    rise = max(ascent, search)
    return WorstCase(
        kind=kind,
        rho=rho,
        radius=radius,
        loss=start,
        value=100 * rise / (1 + start) if kind == "keskar" else rise,
        by="neither" if rise == 0 else "ascent" if ascent >= search else "search",
        ascent=ascent,
        search=search,
        gradients=steps,
        forwards=searches + 3,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _Ball:
    """The points w + scale * u, with u [P] float64 and ||u|| <= radius, or |u_i| <= radius in a box."""

    objective: Objective
    w: Tensor
    scale: Tensor
    radius: float
    box: bool
    seed: int

    def weights(self, u: Tensor) -> Tensor:
        return self.w + self.scale * u

    def project(self, u: Tensor) -> Tensor:
        if self.box:
            return u.clamp(-self.radius, self.radius)
        return u * min(1.0, self.radius / max(float(u.norm()), self.radius))

    def farthest(self, g: Tensor, index: int) -> Tensor:
        """Return the u of the ball that is farthest along g. If g is zero, use the random direction `index`."""
        if self.box:
            return torch.where(g == 0, self.random(index), g).sign() * self.radius
        g = g if g.any() else self.random(index)
        return g * (self.radius / float(g.norm()))

    def random(self, index: int) -> Tensor:
        """Return a random direction among the weights that can change."""
        return noise(self.objective, self.seed, index).double().masked_fill(self.scale == 0, 0)

    def losses(self, point: Callable[[S], Tensor], items: Sequence[S]) -> list[float]:
        """Return the true losses at u = point(item)."""
        return _losses(self.objective, lambda item: self.weights(point(item)), items)


def _ascent(ball: _Ball, steps: int, first: int) -> tuple[Tensor, Tensor]:
    """Return the best u of `steps` gradients, and the last u, which is not evaluated yet.

    `first` is the number of its first random direction.
    """
    u = torch.zeros_like(ball.w)
    best, highest, direction = u, -math.inf, u
    length, waited = 1.0, 0
    for step in range(steps):
        loss, g = _gradient(at(ball.objective, ball.weights(u).to(ball.objective.dtype)))
        g = ball.scale * g
        waited += 1
        if loss > highest:
            best, highest, direction, waited = u, loss, g, 0
        elif waited == PATIENCE:
            u, g, length, waited = best, direction, length / 2, 0
        u = ball.project(u + length * ball.farthest(g, first + step))
    return best, u


def _search(ball: _Ball, start: float, passes: int) -> float:
    """Return the highest loss that `passes` forward passes find. It is at least `start`."""
    best, highest, length = torch.zeros_like(ball.w), start, 1.0
    for number, done in enumerate(range(0, passes, ROUND + 1)):
        indices = range(number * ROUND, number * ROUND + min(ROUND, max(1, passes - done - 1)))
        centre = best

        def around(index: int, centre: Tensor = centre, length: float = length) -> Tensor:
            return ball.project(centre + length * ball.farthest(ball.random(index), index))

        losses = ball.losses(around, indices)
        uphill = torch.zeros_like(best)
        for index, loss in zip(indices, losses, strict=True):
            uphill += (loss - highest) * ball.random(index)
        found = [(max(losses), around(indices[losses.index(max(losses))]))]
        if done + len(indices) < passes:
            u = ball.project(centre + length * ball.farthest(uphill, indices.stop))
            found += [(loss, u) for loss in ball.losses(lambda u: u, [u])]
        loss, u = max(found, key=lambda pair: pair[0])
        if loss > highest:
            best, highest = u, loss
        else:
            length /= 2
    return highest


def _losses(objective: Objective, point: Callable[[S], Tensor], items: Sequence[S]) -> list[float]:
    """Return the true losses at the weights point(item). Raise ValueError if one is not finite."""
    outputs = outputs_at(objective, lambda item: point(item).to(objective.dtype), items)
    losses = [mean_loss(objective, o) for o in outputs]
    if not all(map(math.isfinite, losses)):
        raise ValueError("the loss is not finite at these weights or within the ball: use a smaller rho")
    return losses


def _gradient(objective: Objective) -> tuple[float, Tensor]:
    """Return the loss and its surrogate gradient [P] in float64. Raise ValueError if one is not finite."""
    loss, g = objective.value_and_gradient()
    if not (math.isfinite(loss) and torch.isfinite(g).all()):
        raise ValueError("the loss or its surrogate gradient is not finite at these weights or within the ball")
    return loss, g


def _weights(objective: Objective, rho: float) -> Tensor:
    """Return the weights [P] in float64. Raise ValueError if rho or the weights are invalid."""
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be a positive number, not {rho}")
    w = objective.weights().double()
    if not torch.isfinite(w).all():
        raise ValueError("the weights have NaN or infinite entries")
    return w
