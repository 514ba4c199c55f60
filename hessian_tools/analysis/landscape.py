"""The loss along lines and planes in weight space, with the curvature that the operators predict there.

There are two losses. The true loss is that of the network as it computes; with spikes it is piecewise constant. The
relaxed loss is that of the relaxed network, in which every spike is replaced by the primitive of the surrogate. It is
smooth, but it belongs to another network.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hessian_tools.analysis.context import AnalysisError, require_symmetry
from hessian_tools.analysis.planning.memory import budget
from hessian_tools.evaluation import differentiable
from hessian_tools.io.json import clean
from hessian_tools.io.versions import versions
from hessian_tools.linalg.lanczos import Eigenpairs, eigenpairs
from hessian_tools.nonfinite import first_not_finite
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator, symmetry_error
from hessian_tools.operators.curvature import ggn, hessian
from hessian_tools.perturbation import accuracy, filter_norms, mean_loss, noise, outputs_at
from hessian_tools.progress import Meter, Show
from hessian_tools.results.landscape import (
    LANDSCAPE_SCHEMA,
    NAN,
    RANDOM_RANGE,
    SHARP_RANGE,
    LandscapeResult,
    Line,
    Plane,
)
from hessian_tools.resume import Phases
from hessian_tools.seeding import stream

LEAST_RANGE, MOST_RANGE = 1e-6, 1e6  # relative to ||w||; nearer, the weights' round-off hides the loss
TOL = 1e-4  # tolerance of the eigenvectors: residual relative to the norm of the operator
S = TypeVar("S")
Op = TypeVar("Op", bound=Operator)


@dataclass(frozen=True)
class LandscapeSettings:
    """Settings of `landscape`. Every field is stored with the result.

    Attributes:
        directions: Directions of the lines: "top1", "top2", ... (eigenvectors of the surrogate Hessian, the largest
            eigenvalue first), "negative" (eigenvector of the most negative eigenvalue), "gradient", and "random1",
            "random2", ... (random directions).
        planes: Pairs of such directions. Their lines are computed too.
        points: Number of grid points on a line. It is odd, so that 0 is one of them.
        plane_points: Number of grid points along each axis of a plane. It is odd as well.
        range: Largest distance, relative to ||w||. With None it is RANDOM_RANGE for random directions and SHARP_RANGE
            for the others.
        accuracy: Whether to compute accuracies along the lines too.
        seed: Random seed.
        memory: Memory in GiB.
    """

    directions: tuple[str, ...] = ("top1", "top2", "negative", "gradient", "random1", "random2")
    planes: tuple[tuple[str, str], ...] = (("random1", "random2"), ("top1", "negative"))
    points: int = 41
    plane_points: int = 21
    range: float | None = None
    accuracy: bool = False
    seed: int = 0
    memory: float = 4.0

    def __post_init__(self) -> None:
        for name in self.names:
            if not re.fullmatch(r"(top|random)[1-9][0-9]{0,3}|negative|gradient", name):
                known = "top1, top2, ..., negative, gradient, random1, random2, ..."
                raise ValueError(f"unknown direction '{name}': choose from {known}")
        if not self.names:
            raise ValueError("no direction chosen")
        for first, second in self.planes:
            if first == second:
                raise ValueError(f"plane {first},{second}: a plane needs two different directions")
        for name in ("points", "plane_points"):
            count = getattr(self, name)
            if count < 3 or count % 2 == 0:
                raise ValueError(
                    f"{name.replace('_', ' ')} must be odd and at least 3 (0 is a grid point), not {count}"
                )
        if self.range is not None and not LEAST_RANGE <= self.range <= MOST_RANGE:
            raise ValueError(
                f"range must be a positive number from {LEAST_RANGE:g} to {MOST_RANGE:g} (relative to the norm of the "
                f"weights), not {self.range:g}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The directions of the lines and of the planes, without duplicates."""
        return tuple(dict.fromkeys((*self.directions, *(name for plane in self.planes for name in plane))))


def random_direction(objective: Objective, seed: int, number: int) -> Tensor:
    """Return a random filter-normalized direction.

    A Gaussian vector is scaled filter by filter to the norms of the filters of the weights (Li et al. 2018, section 4),
    then normalized. In vectors such as biases, each entry is a filter.

    Args:
        objective: Objective with the weights.
        seed: Random seed.
        number: Number of the direction, from 1. Objectives with the same number of parameters get the same Gaussian
            vector.

    Returns:
        Unit vector [P], float64.
    """
    z = noise(objective, seed, 2 * number - 2)
    drawn = dict(zip(objective.parameters, objective.split(z), strict=True))
    d: Tensor = z.double() * filter_norms(objective) / filter_norms(dataclasses.replace(objective, parameters=drawn))
    d /= d.norm()
    return d


@differentiable
def landscape(
    objective: Objective,
    settings: LandscapeSettings | None = None,
    *,
    relaxed: Objective | None = None,
    refused: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Show | None = None,
    phases: Phases | None = None,
) -> LandscapeResult:
    """Compute the loss along lines and planes through the weights, with the second derivatives of the operators there.

    Args:
        objective: The true loss, its data and its weights.
        settings: Settings of the analysis.
        relaxed: Objective of the relaxed network with the same weights.
        refused: Reason why there is no relaxed network, by name. It is stored in the result.
        provenance: The dicts `checkpoint`, `data`, `network` and `training` of the result.
        progress: Progress callback.
        phases: Storage of finished lines and planes, to resume an interrupted run.

    Returns:
        The losses. A loss that is not finite away from the weights is NaN.

    Raises:
        ValueError: If all weights are 0, or if no direction is available.
        AnalysisError: If the Hessian is not symmetric, or if a number at the weights themselves is not finite.
    """
    settings = settings or LandscapeSettings()
    began = time.perf_counter()
    meter = Meter(_expected(settings, relaxed is not None), progress)
    objectives = [objective] if relaxed is None else [objective, relaxed]
    work = LandscapeWork(settings, objectives, phases or Phases(), meter)
    w = objective.weights().double()
    norm = float(w.norm())
    if norm == 0:
        raise ValueError("all weights are 0, so distances relative to their norm are undefined")
    why = dict(refused or {})
    try:
        _, gradient = objective.value_and_gradient()
        if not torch.isfinite(gradient).all():
            raise FloatingPointError("the gradient is not finite")
        at_w = [next(iter(outputs_at(each, lambda _: w, [0]))) for each in objectives]
        losses = [mean_loss(each, outputs) for each, outputs in zip(objectives, at_w, strict=True)]
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(f"the loss ({', '.join(map(str, losses))}) is not finite")
        directions, asymmetry = find_directions(work, gradient, why)
        if not directions:
            raise ValueError("nothing to draw: " + "; ".join(f"{name}: {reason}" for name, reason in why.items()))
        lines = tuple(_lines(work, w, directions, gradient))
    except FloatingPointError as error:
        where = first_not_finite(objective) or str(error)
        raise AnalysisError(f"{where} at these weights: the analysis stops") from None
    planes = tuple(_planes(work, w, directions, why))
    known = {"checkpoint": {}, "data": {}, "network": {}, "training": {}, **(provenance or {})}
    known["data"] = {**known["data"], "samples": objective.samples}
    return LandscapeResult(
        schema=LANDSCAPE_SCHEMA,
        **known,
        settings=clean(dataclasses.asdict(settings)),
        num_parameters=objective.size,
        parameters={name: p.numel() for name, p in objective.parameters.items()},
        weight_norm=norm,
        loss=losses[0],
        relaxed_loss=losses[1] if relaxed is not None else NAN,
        accuracy=accuracy(objective, at_w[0]),
        gradient_norm=float(gradient.norm()),
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        seed=settings.seed,
        symmetry_error=asymmetry,
        lines=lines,
        planes=planes,
        refused=why,
        products=work.phases.products,
        evaluations=work.evaluations,
        seconds=time.perf_counter() - began + work.phases.seconds,
        versions=versions(),
    )


@dataclass(frozen=True)
class Direction:
    """A unit vector [P] in float64. `residual` and `converged` are as in `Line`."""

    vector: Tensor
    residual: float = NAN
    converged: bool = True


@dataclass
class LandscapeWork:
    """State that all parts of one analysis share. `objectives` holds the true one and, if there is one, the relaxed
    one.
    """

    settings: LandscapeSettings
    objectives: Sequence[Objective]
    phases: Phases
    meter: Meter
    evaluations: int = 0

    def products(self, name: str, op: Op, compute: Callable[[Op], dict[str, Any]]) -> dict[str, Any]:
        """Run a phase that computes products with an operator."""
        before = self.phases.products
        self.meter.phase(name)(0, 1, NAN)
        found = self.phases.run(name, op, compute)
        self.meter.finish(name, self.phases.products - before)
        return found

    def evaluate(self, name: str, point: Callable[[S], Tensor], items: Sequence[S]) -> tuple[Tensor, Tensor]:
        """Return losses and accuracies [objectives, items] at the weights `point(item)`."""
        total = len(self.objectives) * len(items)
        report = self.meter.phase(name)
        report(0, total, NAN)

        def compute() -> dict[str, Any]:
            losses, shares = torch.empty(2, len(self.objectives), len(items), dtype=torch.float64)
            for i, objective in enumerate(self.objectives):
                for j, outputs in enumerate(outputs_at(objective, point, items)):
                    losses[i, j], shares[i, j] = mean_loss(objective, outputs), accuracy(objective, outputs)
                    report(i * len(items) + j + 1, total, NAN)
            return {"losses": losses, "accuracies": shares}

        found = self.phases.keep(name, compute)
        self.meter.finish(name, total)
        self.evaluations += total
        return found["losses"], found["accuracies"]


def _lines(work: LandscapeWork, w: Tensor, directions: Mapping[str, Direction], gradient: Tensor) -> Iterator[Line]:
    """Compute the lines, one for each direction."""
    settings = work.settings
    vectors = torch.stack([d.vector for d in directions.values()], 1)
    memory = settings.memory * 2**30 / 2
    curved = _forms(work, "v'Hv", hessian(work.objectives[0], memory), vectors)
    linear = _forms(work, "v'Gv", ggn(work.objectives[0], memory), vectors)
    for (name, direction), h, g in zip(directions.items(), curved, linear, strict=True):
        v, distances = direction.vector, _distances(_range(settings, name) * float(w.norm()), settings.points)
        losses, shares = work.evaluate(f"line {name}", lambda t, v=v: w + t * v, distances)  # type: ignore[misc]
        both = (*true_and_relaxed(losses), *(true_and_relaxed(shares) if settings.accuracy else ((), ())))
        yield Line(name, h, g, float(gradient @ v), direction.residual, direction.converged, distances, *both)


def _planes(
    work: LandscapeWork, w: Tensor, directions: Mapping[str, Direction], refused: dict[str, str]
) -> Iterator[Plane]:
    """Compute the planes. A plane with a missing direction is added to `refused`."""
    settings = work.settings
    for pair in settings.planes:
        name = f"plane {','.join(pair)}"
        if missing := [each for each in pair if each not in directions]:
            refused[name] = f"direction {missing[0]} is not available"
            continue
        u, v = (directions[each].vector for each in pair)
        reach = min(_range(settings, each) for each in pair)
        distances = _distances(reach * float(w.norm()), settings.plane_points)
        grid = [(s, t) for t in distances for s in distances]
        losses, _ = work.evaluate(name, lambda at, u=u, v=v: w + at[0] * u + at[1] * v, grid)  # type: ignore[misc]
        true, relaxed = true_and_relaxed(losses.unflatten(1, (len(distances), len(distances))))
        yield Plane(pair, float(u @ v), distances, tuple(map(tuple, true)), tuple(map(tuple, relaxed)))


def true_and_relaxed(values: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split values into those of the true and of the relaxed network; () if there is no relaxed network."""
    true, *rest = values.tolist()
    return tuple(true), tuple(rest[0]) if rest else ()


def find_directions(
    work: LandscapeWork, gradient: Tensor, refused: dict[str, str]
) -> tuple[dict[str, Direction], float]:
    """Return the directions by name and the symmetry error of the Hessian (NaN if it was not needed).

    A direction that is not available is added to `refused`.
    """
    names, size = work.settings.names, work.objectives[0].size
    ranks = {name: int(name.removeprefix("top")) for name in names if name.startswith("top")}
    found: dict[str, Direction] = {}
    asymmetry = NAN
    if ranks or "negative" in names:
        largest = min(max(ranks.values(), default=0), size)
        pairs, asymmetry = _eigenpairs(work, largest, min("negative" in names, size - largest))
        ranks["negative"] = int(pairs.values.argmin()) + 1
    for name in names:
        if name.startswith("random"):
            number = int(name.removeprefix("random"))
            found[name] = Direction(random_direction(work.objectives[0], work.settings.seed, number))
        elif name == "gradient" and not gradient.any():
            refused[name] = "the surrogate gradient is 0 at these weights: no neuron is near its threshold"
        elif name == "gradient":
            found[name] = Direction(gradient / gradient.norm())
        elif pairs.norm == 0:
            refused[name] = "the surrogate Hessian is 0 at these weights: every direction is an eigenvector"
        elif ranks[name] > size:
            refused[name] = f"there are only {size} eigenvalues"
        else:
            i = ranks[name] - 1
            if name == "negative" and not pairs.values[i] < -TOL * pairs.norm:
                refused[name] = f"the smallest eigenvalue, {float(pairs.values[i]):.2g}, is not negative"
                continue
            v = pairs.vectors[:, i]
            uphill = -v if gradient @ v < 0 else v
            found[name] = Direction(uphill, float(pairs.residuals[i]), bool(pairs.converged[i]))
    return found, asymmetry


def _eigenpairs(work: LandscapeWork, largest: int, smallest: int) -> tuple[Eigenpairs, float]:
    """Return outermost eigenpairs of the surrogate Hessian, and its symmetry error."""
    room = budget(work.settings.memory * 2**30, work.objectives[0].size, largest + smallest)
    op = hessian(work.objectives[0], room.kept)
    random, start = (stream(work.settings.seed, 0, *name) for name in (b"symmetry", b"eigenvalues"))
    error: float = work.products("symmetry", op, lambda op: {"error": symmetry_error(op, random)})["error"]
    require_symmetry("hessian", error, op.dtype)
    step = work.meter.phase("eigenvalues")

    def compute(op: Operator) -> dict[str, Any]:
        return vars(eigenpairs(op, largest, smallest, generator=start, tol=TOL, max_basis=room.vectors, progress=step))

    return Eigenpairs(**work.products("eigenvalues", op, compute)), error


def _forms(work: LandscapeWork, name: str, op: Operator, vectors: Tensor) -> list[float]:
    """Return v'Av for every column of [P, k]."""
    found: Tensor = work.products(name, op, lambda op: {"forms": (vectors * (op @ vectors)).sum(0)})["forms"]
    return [float(form) for form in found]


def _range(settings: LandscapeSettings, name: str) -> float:
    """Return the largest distance along a direction, relative to ||w||."""
    return settings.range or (RANDOM_RANGE if name.startswith("random") else SHARP_RANGE)


def _distances(reach: float, points: int) -> tuple[float, ...]:
    """Return a grid that is symmetric about an exact 0, from -reach to reach."""
    half = points // 2
    return tuple(reach * (i / half) for i in range(-half, half + 1))


def _expected(settings: LandscapeSettings, relaxed: bool) -> dict[str, int]:
    """Estimate the products and evaluations of every phase, for the progress bar."""
    networks = 1 + relaxed
    return {
        "eigenvalues": 40,
        **{f"line {name}": networks * settings.points for name in settings.names},
        **{f"plane {','.join(pair)}": networks * settings.plane_points**2 for pair in settings.planes},
    }
