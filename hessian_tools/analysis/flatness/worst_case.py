"""The largest rise of the true loss within a ball around the weights.

Every number here is a LOWER BOUND of a maximum: the most that was found. A surrogate gradient is the gradient of no
function, so that ascent along it may miss what the true loss does; a search by forward passes alone runs beside it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from hessian_tools.analysis.sampling_error import standard_error
from hessian_tools.objective import Objective
from hessian_tools.perturbation import mean_loss, noise, noise_scales, outputs_at
from hessian_tools.seeding import stream

S = TypeVar("S")
BALLS = ("l2", "adaptive", "filter", "keskar")
STEPS, SEARCHES = 20, 210
PATIENCE = 3  # steps without a rise before they are halved
ROUND = 20  # directions, in antithetic pairs, of one round of the search


@dataclass(frozen=True)
class SamSharpness:
    """A lower bound of max L(w + d) - L(w) over ||d|| <= rho: its value after one step along the surrogate gradient.

    value: mean over `batches` batches of `samples` samples; negative where steps lower the true loss. stderr: its
    standard error for other samples of the same kind, NaN for a single batch. without_gradient: batches whose gradient
    is zero; they have no direction and count as 0.
    """

    value: float
    stderr: float
    rho: float
    samples: int
    batches: int
    without_gradient: int


@dataclass(frozen=True)
class WorstCase:
    """A lower bound of the maximum over a ball (see worst_case): the most that was found.

    value: the larger of `ascent` (along surrogate gradients) and `search` (by forward passes alone), both rises
    L(w + d) - L(w) of the true loss and never negative, for d = 0 is in the ball; for keskar
    100 (max L - L(w)) / (1 + L(w)) instead. by: which found it, "neither" where nothing rose. loss: L(w).
    radius: of the ball, in the units of its kind. gradients, forwards: passes over all samples.
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
    """The objective at other weights [P], on a model of its own."""
    if objective.reset is not None:
        objective.reset(objective.model)  # state that a gradient has left behind cannot be copied
    model = copy.deepcopy(objective.model)
    named = dict(model.named_parameters())
    parameters: dict[str, Tensor] = {name: named[name] for name in objective.parameters}
    with torch.no_grad():
        for p, value in zip(parameters.values(), objective.split(w), strict=True):
            p.copy_(value)
    return replace(objective, model=model, parameters=parameters)


def sam_sharpness(objective: Objective, rho: float) -> SamSharpness:
    """L(w + rho g / ||g||) - L(w), g the surrogate gradient, L the true loss (Foret et al. 2021).

    rho is a distance in weight space. Cost: a gradient, two forward passes. Raises ValueError for rho <= 0 and for
    weights, losses or gradients that are not finite.
    """
    return _sam(objective, rho, [torch.arange(objective.samples)])


def m_sharpness(objective: Objective, rho: float, m: int, seed: int = 0) -> SamSharpness:
    """Mean of sam_sharpness over disjoint batches of m samples, each with a step of its own (Foret et al. 2021).

    The batches are drawn by the seed; a smaller last one counts for what it holds. Cost as sam_sharpness, in small
    batches. Raises ValueError as that, and for m outside 1 to N.
    """
    if not 1 <= m <= objective.samples:
        raise ValueError(f"m must lie between 1 and the {objective.samples} samples, not {m}")
    return _sam(objective, rho, torch.randperm(objective.samples, generator=stream(seed)).split(m))


def _sam(objective: Objective, rho: float, parts: Sequence[Tensor]) -> SamSharpness:
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
    return SamSharpness(mean, float(standard_error(values, counts)), rho, len(parts[0]), len(parts), without)


def worst_case(
    objective: Objective,
    rho: float,
    *,
    kind: str = "adaptive",
    steps: int = STEPS,
    searches: int = SEARCHES,
    seed: int = 0,
) -> WorstCase:
    """Lower bound of the largest rise of the true loss over a ball of weights w + d, d = s u element by element:

    - l2: ||d|| <= rho ||w||;
    - adaptive: ||d / w|| <= rho sqrt(P), so that rho is the root mean square of a weight's relative change (Kwon et al.
      2021, and Andriushchenko et al. 2023 with c = |w|, p = 2, but for the factor sqrt(P): with it one rho serves
      networks of all sizes, and the ball is that of l2 where all |w| are equal). Does not change where weights are
      rescaled without changing the network. Zero weights stay zero;
    - filter: the same in units of the root mean square of a weight's filter (forward.noise_scales);
    - keskar: |d_i| <= rho (|w_i| + 1), value 100 (max L - L) / (1 + L) (Keskar et al. 2017, metric 2.1; rho =
      KESKAR_EPSILON there).

    The ascent: `steps` projected steps of the ball's radius along the surrogate gradient (in u), the first that of
    SAM; after PATIENCE without a rise they go on from the best point, half as long. The search: `searches` forward
    passes, in rounds of random directions about the best point and a step along their sum weighted by the losses
    (Spall 1992), half as long after a round without a rise; the same directions for all networks of one size.
    Where the gradient is zero (a network that never spikes) the ascent goes in random directions; if nothing rises
    there either, the value is 0, by "neither".

    Cost: `steps` gradients, `searches` + 3 forward passes. Raises ValueError for an unknown kind, rho <= 0, steps or
    searches below 1, weights, losses or gradients that are not finite, and a relative ball about zero weights.
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
        raise ValueError(f"all weights are zero: the ball '{kind}' is relative to them and holds no other point")
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
    """The points w + scale u, u [P] float64 with ||u|| <= radius, or |u_i| <= radius in a box."""

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
        """The u of the ball farthest along g; where g does not say, in the random direction `index`."""
        if self.box:
            return torch.where(g == 0, self.random(index), g).sign() * self.radius
        g = g if g.any() else self.random(index)
        return g * (self.radius / float(g.norm()))

    def random(self, index: int) -> Tensor:
        """A random direction within the weights that can move."""
        return noise(self.objective, self.seed, index).double().masked_fill(self.scale == 0, 0)

    def losses(self, point: Callable[[S], Tensor], items: Sequence[S]) -> list[float]:
        """The true losses at u = point(item)."""
        return _losses(self.objective, lambda item: self.weights(point(item)), items)


def _ascent(ball: _Ball, steps: int, first: int) -> tuple[Tensor, Tensor]:
    """The best u of `steps` gradients and, not yet evaluated, the last. first: number of its first random direction."""
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
    """The highest loss, `start` or more, that `passes` forward passes find."""
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
    outputs = outputs_at(objective, lambda item: point(item).to(objective.dtype), items)
    losses = [mean_loss(objective, o) for o in outputs]
    if not all(map(math.isfinite, losses)):
        raise ValueError("the loss is not finite at these weights or within the ball: take a smaller rho")
    return losses


def _gradient(objective: Objective) -> tuple[float, Tensor]:
    """L and its surrogate gradient [P], float64."""
    loss, g = objective.value_and_gradient()
    if not (math.isfinite(loss) and torch.isfinite(g).all()):
        raise ValueError("the loss or its surrogate gradient is not finite at these weights or within the ball")
    return loss, g


def _weights(objective: Objective, rho: float) -> Tensor:
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be a positive number, not {rho}")
    w = objective.weights().double()
    if not torch.isfinite(w).all():
        raise ValueError("the weights have NaN or infinite entries")
    return w
