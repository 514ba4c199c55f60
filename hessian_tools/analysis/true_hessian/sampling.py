"""Second differences of the loss under weight noise, and the estimates that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessian_tools.analysis.true_hessian.settings import STRATA
from hessian_tools.linalg.stein import SteinHessian, covariances, line_steps, radii
from hessian_tools.linalg.trace import estimate
from hessian_tools.objective import Objective
from hessian_tools.perturbation import batch_losses, noise_scales
from hessian_tools.results.true_hessian import DrawMean
from hessian_tools.resume import Phases
from hessian_tools.seeding import stream

CHUNKS = 40  # parts of a stage that are stored one by one, so that an interrupted run resumes
TRACE, SEARCH, LINE, PROJECTION = range(4)  # random streams
Report = Callable[[str, int, int], None]  # (stage, forward passes of the stage done, and in all)


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """The loss under weight noise s D z, with draws of its own for every batch of samples.

    Attributes:
        objective: The loss, its data and its weights, in batches that share a draw.
        scale: Noise scale s.
        unit: D [P].
        at: Weights w [P].
        base: Loss [B] of every batch at the weights.
        weights: Share of every batch in the samples [B].
        seed: Random seed.
        phases: Storage of finished parts.
        report: Progress callback.
    """

    objective: Objective
    scale: float
    unit: Tensor
    at: Tensor
    base: Tensor
    weights: Tensor
    seed: int
    phases: Phases = field(default_factory=Phases)
    report: Report = silent

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the draws."""
        return self.objective.dtype

    def stream(self, *key: int) -> torch.Generator:
        """Return a random stream for everything that is drawn for all batches at once."""
        return stream(self.seed, 3, *key, 1)

    def draw(self, key: Sequence[int], k: int, b: int) -> Tensor:
        """Return draw k of batch b [P], from the stream `key`. Weights without noise get 0."""
        generator = stream(self.seed, 3, *key, k, b)
        z = torch.randn(self.objective.size, generator=generator, dtype=self.dtype).to(self.unit.device)
        return torch.where(self.unit > 0, z, 0)

    def draws(self, key: Sequence[int], k: int) -> Tensor:
        """Return draw k of all batches [B, P]."""
        return torch.stack([self.draw(key, k, b) for b in range(len(self.weights))])

    def point(self, z: Tensor) -> Tensor:
        """Return the weights w + s D z [P]."""
        return self.at + self.scale * self.unit * z

    def losses(self, stage: str, points: Callable[[int, int], Iterable[Tensor]], items: int, count: int) -> Tensor:
        """Compute the loss of every batch at `count` points of every item.

        Args:
            stage: Name of the stage.
            points: Maps the number of an item and of a batch to vectors z [P].
            items: Number of items.
            count: Number of points per item.

        Returns:
            Losses [items, count, B], float64.

        Raises:
            FloatingPointError: If a loss is not finite.
        """

        def weights(item: int, b: int) -> Iterator[Tensor]:
            return (self.point(z) for z in points(item, b))

        parts, size = [], math.ceil(items / CHUNKS)
        for start in range(0, items, size):
            some = range(start, min(start + size, items))

            def run(some: range = some) -> dict[str, Tensor]:
                found = []
                for losses in batch_losses(self.objective, weights, some, count):
                    found.append(losses)
                    self.report(stage, count * (some.start + len(found)), count * items)
                return {"losses": torch.stack(found)}

            parts.append(self.phases.keep(f"{stage} {start}", run)["losses"])
            self.report(stage, count * some.stop, count * items)
        whole = torch.cat(parts)
        if not torch.isfinite(whole).all():
            raise FloatingPointError(f"the loss is not finite under weight noise of scale {self.scale:g}")
        return whole


def make_sampler(
    objective: Objective,
    scale: float,
    *,
    group: int = 64,
    seed: int = 0,
    phases: Phases | None = None,
    report: Report = silent,
) -> Sampler:
    """Prepare the loss of an objective under weight noise.

    Args:
        objective: The loss, its data and its weights.
        scale: Noise scale s, relative to the root mean square of each filter.
        group: Number of samples that share a draw of the noise.
        seed: Random seed.
        phases: Storage of finished parts, to resume an interrupted run.
        report: Progress callback.

    Raises:
        ValueError: If all weights are zero, or if the loss at the weights is not finite.
    """
    if max(objective.sizes) > group:
        objective = objective.rebatched(group)
    at, unit = objective.weights(), noise_scales(objective)
    if not unit.any():
        raise ValueError("all weights are zero, so weight-relative noise is undefined")
    (base,) = batch_losses(objective, lambda _, b: [at], [0], 1)
    sizes = torch.tensor(objective.sizes, dtype=torch.float64)
    if not torch.isfinite(base).all():
        raise ValueError("the loss is not finite at these weights")
    return Sampler(objective, scale, unit, at, base[0], sizes / sizes.sum(), seed, phases or Phases(), report)


def draw_mean(values: Tensor, factor: float = 1.0) -> DrawMean:
    """Return the mean of independent observations [n] with its errors, multiplied by `factor`."""
    found = estimate(factor * values)
    squares = (values - values.mean()).square()
    alike = not bool(squares.any())
    ci95 = (math.nan, math.nan) if alike else found.ci95
    share = math.nan if alike else float(squares.max() / squares.sum())
    return DrawMean(found.estimate, found.stderr, ci95, found.probes, share)


def trace_values(sampler: Sampler, observations: int) -> tuple[Tensor, Tensor]:
    """Estimate the trace of H without bias, from the loss at several distances r along random directions u.

    With z = r u, tr H = E (r^2 - P) (f(r u) - f(z')) / s^2, where f is the mean of the losses at both signs, and the
    length of z' = r' u is independent of r. So what depends on the direction only does not add to the noise. r is drawn
    by importance sampling (`hessian_tools.linalg.stein.radii`).

    Args:
        sampler: The loss under noise.
        observations: Number n of observations, of 6 forward passes each.

    Returns:
        Observations of the trace [n] and of the smoothed loss [n].
    """
    size, groups = int((sampler.unit > 0).sum()), len(sampler.weights)
    r, factor = (x.reshape(observations, groups, 2) for x in radii(size, observations * groups, sampler.stream(TRACE)))

    def points(k: int, b: int) -> Iterator[Tensor]:
        z = sampler.draw((TRACE, 0), k, b)
        u = z / z.norm()
        for point in (z, *(length * u for length in r[k, b].tolist())):
            yield point
            yield -point

    f = sampler.losses("trace", points, observations, 6).unflatten(1, (3, 2)).mean(2)
    change = ((f[:, 1:] - f[:, :1]) * factor.mT).mean(1) / sampler.scale**2
    return change @ sampler.weights, f[:, 0] @ sampler.weights


def line_values(sampler: Sampler, q: Tensor, observations: int, number: int = 0, stage: str = "direction") -> Tensor:
    """Estimate q'Hq without bias along one direction.

    Args:
        sampler: The loss under noise.
        q: Unit vector [P], 0 for weights without noise. It must not depend on draws of the same `number`.
        observations: Number n of observations, of 10 forward passes each.
        number: Number of the random stream.
        stage: Name of the stage.

    Returns:
        Observations [n].
    """
    q = q.to(sampler.unit.device, sampler.dtype)
    groups = len(sampler.weights)
    found = line_steps(observations * groups, 2 * STRATA, sampler.stream(LINE, number))
    # z and -z have the same law, so every second part of the quantiles can go with each of them
    t, factor = (x.reshape(observations, groups, STRATA, 2).mT for x in found)

    def points(k: int, b: int) -> Iterator[Tensor]:
        z = sampler.draw((LINE, number, 0), k, b)
        z = z - q * (q @ z)
        for sign, steps in zip((1, -1), t[k, b].tolist(), strict=True):
            yield sign * z
            for step in steps:
                yield sign * z + step * q
                yield sign * z - step * q

    losses = sampler.losses(stage, points, observations, 2 * (1 + 2 * STRATA)).unflatten(1, (2, -1))
    second = (losses[:, :, 1::2] + losses[:, :, 2::2] - 2 * losses[:, :, :1]) / (2 * sampler.scale**2)  # [n, 2, m, B]
    values: Tensor = (second * factor.permute(0, 2, 3, 1)).mean((1, 2)) @ sampler.weights
    return values


def projection(
    sampler: Sampler, basis: Tensor, observations: int, number: int = 0, stage: str = "projection"
) -> tuple[Tensor, Tensor]:
    """Estimate V'HV without bias for a given subspace.

    The noise is that of V'HV, whatever the number of weights.

    Args:
        sampler: The loss under noise.
        basis: Orthonormal columns V [P, k], 0 for weights without noise. They must not depend on draws of the same
            `number`.
        observations: Number n of observations, of 3 forward passes each.
        number: Number of the random stream.
        stage: Name of the stage.

    Returns:
        The second differences [n, B] and the draws within the subspace [n, B, k], for `entries`.
    """
    v = basis.to(sampler.unit.device, sampler.dtype)

    def points(k: int, b: int) -> Iterator[Tensor]:
        z = sampler.draw((PROJECTION, number), k, b)
        inside = v @ (v.T @ z)
        yield z - inside
        yield z
        yield z - 2 * inside

    losses = sampler.losses(stage, points, observations, 3)
    second = (losses[:, 1] + losses[:, 2] - 2 * losses[:, 0]) / (2 * sampler.scale**2)
    y = torch.stack([(sampler.draws((PROJECTION, number), k) @ v).double().cpu() for k in range(observations)])
    return second, y


def entries(second: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return observations [n, k, k] whose mean is the estimate of V'HV (see `projection`)."""
    n, _, k = y.shape
    found = torch.empty(n, k, k, dtype=torch.float64)
    for i in range(k):
        for j in range(i, k):
            found[:, i, j] = found[:, j, i] = covariances(second, y[..., i] * y[..., j], weights)
    return found


def search_differences(sampler: Sampler, pairs: int, first: Tensor | None = None) -> Tensor:
    """Compute the second differences [K, B] of K pairs z, -z of noise in all weights, for `stein_hessian`.

    Args:
        sampler: The loss under noise.
        pairs: K.
        first: Those of the first pairs, if they are known.
    """
    start = 0 if first is None else len(first)

    def points(k: int, b: int) -> Iterator[Tensor]:
        z = sampler.draw((SEARCH,), start + k, b)
        yield z
        yield -z

    losses = sampler.losses("search", points, pairs - start, 2)
    rest = (losses.sum(1) - 2 * sampler.base) / (2 * sampler.scale**2)
    return rest if first is None else torch.cat([first, rest])


def stein_hessian(
    sampler: Sampler,
    c: Tensor,
    control: tuple[Tensor, Tensor] | None = None,
    chosen: Sequence[int] | None = None,
    memory: float = 0.0,
) -> SteinHessian:
    """Return the sample estimate of H, whose mean is H whatever the control.

    Args:
        sampler: The loss under noise.
        c: Second differences [K, B] (see `search_differences`).
        control: U [P, k] and M [k, k] of the control S = U M U'. It must not depend on these draws.
        chosen: Numbers of the draws to use; None for all.
        memory: Bytes for draws that are kept.
    """
    numbers = list(range(len(c)) if chosen is None else chosen)
    c, s = c[numbers], None
    if control is not None:
        u, m = control[0].double(), control[1].double().to(control[0].device)
        narrow = u.to(sampler.unit.device, sampler.dtype)
        y = torch.stack([(sampler.draws((SEARCH,), k) @ narrow).double().cpu() for k in numbers])
        c = c - ((y @ m.cpu()) * y).sum(2) / 2

        def s(block: Tensor) -> Tensor:
            return u @ (m @ (u.T @ block))

    return SteinHessian(
        c,
        sampler.weights,
        lambda k: sampler.draws((SEARCH,), numbers[k]),
        sampler.objective.size,
        sampler.dtype,
        sampler.unit.device,
        s,
        memory,
    )
