"""The path of a training run in a plane in weight space, with the loss over that plane (Li et al. 2018, section 7).

The plane goes through the last snapshot. It is spanned by the first two principal components of the snapshots, or by
two chosen directions. Random directions show almost nothing of a path: in high dimension, they are nearly orthogonal to
it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessian_tools.analysis.context import AnalysisError
from hessian_tools.analysis.landscape import LandscapeSettings, LandscapeWork, find_directions, true_and_relaxed
from hessian_tools.evaluation import differentiable
from hessian_tools.io.json import clean
from hessian_tools.io.versions import versions
from hessian_tools.objective import Objective
from hessian_tools.perturbation import accuracy, mean_loss, outputs_at
from hessian_tools.progress import Meter, Show
from hessian_tools.results.training_path import TRAINING_PATH_SCHEMA, Snapshot, TrainingPath
from hessian_tools.resume import Phases

PRINCIPAL = ("pc1", "pc2")
MARGIN = 0.2  # of the path's extent, on every side of it
NARROW = 0.25  # a side of the plane is at least this part of the other one


@dataclass(frozen=True)
class SavedWeights:
    """A snapshot of a training run.

    Attributes:
        name: Name, such as that of its file.
        weights: Weights [P], float64 on the CPU.
        loss: True loss.
        accuracy: Accuracy; NaN if the targets are not class labels.
        epoch: Epoch after which it was saved; None if unknown.
        sha256: SHA-256 of its file; "" if unknown.
    """

    name: str
    weights: Tensor
    loss: float
    accuracy: float
    epoch: int | None = None
    sha256: str = ""


@dataclass(frozen=True)
class TrainingPathSettings:
    """Settings of `training_path`. Every field is stored with the result.

    Attributes:
        directions: Directions that span the plane: ("pc1", "pc2"), or two directions of `LandscapeSettings` at the last
            snapshot.
        points: Number of grid points along each axis.
        snapshots: Name and SHA-256 of every snapshot, so that a result of other snapshots is not taken for this one.
        seed: Random seed.
        memory: Memory in GiB.
    """

    directions: tuple[str, str] = PRINCIPAL
    points: int = 21
    snapshots: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    memory: float = 4.0

    def __post_init__(self) -> None:
        if self.points < 3:
            raise ValueError(f"plane points must be at least 3, not {self.points}")
        if self.directions != PRINCIPAL:
            if set(self.directions) & set(PRINCIPAL):
                raise ValueError("principal components come in one pair: pc1,pc2")
            LandscapeSettings(directions=(), planes=(self.directions,))  # checks the names


def saved_weights(objective: Objective, name: str, epoch: int | None = None, sha256: str = "") -> SavedWeights:
    """Take a snapshot of the weights of an objective, with its loss and accuracy.

    Args:
        objective: The true loss at the snapshot.
        name: Name of the snapshot.
        epoch: Epoch after which it was saved.
        sha256: SHA-256 of its file.
    """
    w = objective.weights().double()
    outputs = next(iter(outputs_at(objective, lambda _: w, [0])))
    return SavedWeights(name, w.cpu(), mean_loss(objective, outputs), accuracy(objective, outputs), epoch, sha256)


def principal_components(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the principal components of snapshots.

    Args:
        weights: Weights of the snapshots [n, P], float64.

    Returns:
        Components as columns [P, k] with the largest variance first, and the share of each in the variance [k]. Only
        components with variance above round-off are returned. The first snapshot has positive coordinates relative to
        the last one.
    """
    centred = weights - weights.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # [n, n]: P is much larger than n
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    size = float((weights**2).sum())
    kept = int((values > 1e-12 * max(float(values[0]), 1e-12 * size)).sum())
    components = centred.T @ vectors[:, :kept]
    components /= components.norm(dim=0)
    start = (weights[0] - weights[-1]) @ components
    components = torch.where(start < 0, -components, components)
    return components, values[:kept] / values.sum()


@differentiable
def training_path(
    objective: Objective,
    snapshots: Sequence[SavedWeights],
    settings: TrainingPathSettings | None = None,
    *,
    relaxed: Objective | None = None,
    refused: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Show | None = None,
    phases: Phases | None = None,
) -> TrainingPath:
    """Project the snapshots of a training run onto a plane, and compute the loss over the plane.

    Buffers, such as the running statistics of a BatchNorm, are those of the last snapshot everywhere in the plane. The
    loss of each snapshot itself, with its own buffers, is stored too.

    Args:
        objective: The true loss at the last snapshot.
        snapshots: The snapshots in the order of training. The last one has the weights of `objective`.
        settings: Settings of the analysis.
        relaxed: Objective of the relaxed network with the same weights.
        refused: Reason why there is no relaxed network, by name. It is stored in the result.
        provenance: The dicts `checkpoint`, `data`, `network` and `training` of the result.
        progress: Progress callback.
        phases: Storage of finished parts, to resume an interrupted run.

    Returns:
        The path and the losses. A loss that is not finite is NaN.

    Raises:
        ValueError: If there are fewer than three snapshots, if the last one has other weights than the objective, if
            the snapshots span no plane, or if a chosen direction is not available.
        AnalysisError: If the loss at the last snapshot is not finite.
    """
    settings = settings or TrainingPathSettings()
    began = time.perf_counter()
    if len(snapshots) < 3:
        raise ValueError("the path of training needs at least three snapshots of one run")
    weights = torch.stack([s.weights for s in snapshots])
    w = objective.weights().double()
    if not torch.equal(weights[-1], w.cpu()):
        raise ValueError(f"the last snapshot, {snapshots[-1].name}, has other weights than the objective")
    if not math.isfinite(snapshots[-1].loss):
        raise AnalysisError(f"the loss of {snapshots[-1].name} is {snapshots[-1].loss}: the analysis stops")
    objectives = [objective] if relaxed is None else [objective, relaxed]
    points = len(objectives) * (settings.points**2 + len(snapshots))
    work = LandscapeWork(
        LandscapeSettings(settings.directions, (), seed=settings.seed, memory=settings.memory)
        if settings.directions != PRINCIPAL
        else LandscapeSettings(memory=settings.memory),
        objectives,
        phases or Phases(),
        Meter({"plane": points}, progress),
    )
    u, v, cosine = _plane(work, weights, settings.directions)
    moved = weights - weights[-1]
    places = moved @ torch.stack([u, v], 1)
    total = float(((weights - weights.mean(0)) ** 2).sum())
    along = ((places - places.mean(0)) ** 2).sum(0) / total
    first, second = _grids(places, settings.points)
    items = [(s, t) for t in second for s in first] + [(float(s), float(t)) for s, t in places]
    here, across = u.to(w), v.to(w)
    losses, _ = work.evaluate("plane", lambda at: w + at[0] * here + at[1] * across, items)
    count = settings.points**2
    true, soft = true_and_relaxed(losses[:, :count].unflatten(1, (settings.points, settings.points)))
    off = (moved - places @ torch.stack([u, v])).norm(dim=1)
    known = {"checkpoint": {}, "data": {}, "network": {}, "training": {}, **(provenance or {})}
    known["data"] = {**known["data"], "samples": objective.samples}
    found = tuple(
        Snapshot(s.name, s.sha256, s.epoch, (float(x), float(y)), float(d), s.loss, s.accuracy, float(p))
        for s, (x, y), d, p in zip(snapshots, places, off, losses[0, count:], strict=True)
    )
    return TrainingPath(
        schema=TRAINING_PATH_SCHEMA,
        **known,
        settings=clean(dataclasses.asdict(settings)),
        num_parameters=objective.size,
        parameters={name: p.numel() for name, p in objective.parameters.items()},
        weight_norm=float(w.norm()),
        loss=snapshots[-1].loss,
        accuracy=snapshots[-1].accuracy,
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        seed=settings.seed,
        directions=settings.directions,
        explained=(float(along[0]), float(along[1])),
        cosine=cosine,
        first=first,
        second=second,
        plane_loss=tuple(map(tuple, true)),
        relaxed_loss=tuple(map(tuple, soft)),
        snapshots=found,
        refused=dict(refused or {}),
        evaluations=work.evaluations,
        seconds=time.perf_counter() - began + work.phases.seconds,
        versions=versions(),
    )


def _plane(work: LandscapeWork, weights: Tensor, names: tuple[str, str]) -> tuple[Tensor, Tensor, float]:
    """Return orthonormal directions [P] on the CPU, and the cosine of the directions asked for."""
    if names == PRINCIPAL:
        components, _ = principal_components(weights)
        if components.shape[1] < 2:
            raise ValueError("the snapshots lie on a line or at one point, so their principal components span no plane")
        return components[:, 0], components[:, 1], 0.0
    why: dict[str, str] = {}
    _, gradient = work.objectives[0].value_and_gradient()
    found, _ = find_directions(work, gradient, why)
    if why:
        raise ValueError("; ".join(f"direction {name} is not available: {reason}" for name, reason in why.items()))
    u, v = (found[name].vector.double().cpu() for name in names)
    cosine = float(u @ v)
    v = v - cosine * u
    if float(v.norm()) < 1e-6:
        raise ValueError(f"the directions {names[0]} and {names[1]} are parallel, so they span no plane")
    return u, v / v.norm(), cosine


def _grids(places: Tensor, points: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the grids of both axes. They hold the path with a margin, and no side is much shorter than the other."""
    low, high = places.min(0).values, places.max(0).values
    half = (high - low) / 2
    if not half.max() > 0:
        raise ValueError("the snapshots do not move along these directions")
    half = torch.maximum(half, NARROW * half.max()) * (1 + 2 * MARGIN)
    steps = torch.linspace(-1, 1, points, dtype=torch.float64)
    first, second = (((high + low) / 2)[k] + half[k] * steps for k in (0, 1))
    return tuple(first.tolist()), tuple(second.tolist())
