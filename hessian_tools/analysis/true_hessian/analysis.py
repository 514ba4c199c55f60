"""Measure the Hessian of the smoothed loss itself: trace and extreme eigenvalues, from values of the loss only.

The smoothed loss L_s(w) = E L(w + s D z) has the Hessian H_s, and all numbers are about H = D H_s D
(`hessian_tools.results.true_hessian`). The estimates of `hessian_tools.linalg.stein` need no derivative and no
surrogate, so that they hold for every network with a forward pass. The steps, each with draws of its own:

1. The trace, from the loss at two distances along random directions.
2. A control S = U M U', if there are other operators: U are their eigenvectors, and M is a measurement of U'HU.
3. The search: the extreme eigenvectors of the sample estimate S + Cov(c - z'Sz / 2, zz'). If its first draws show that
   its noise will hide eigenvalues as large as those along U, it is given up, and its draws go to the last two steps.
4. The projection V'HV on the candidates V, which are these eigenvectors and U, again with a control: what the steps
   before say of V'HV. Its eigenvectors give the directions; entries off the diagonal that may be noise count as 0.
5. The curvature v'Hv along every one of these directions.

A direction does not depend on the draws that measure it, so that every v'Hv is unbiased for the direction v. It is a
lower bound of the largest eigenvalue of H, which it reaches if v is its eigenvector.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hessian_tools.analysis.operator_spectrum.eigenvectors import layer_shares
from hessian_tools.analysis.planning.memory import budget
from hessian_tools.analysis.true_hessian import sampling
from hessian_tools.analysis.true_hessian.sampling import Sampler, draw_mean
from hessian_tools.analysis.true_hessian.settings import PILOT, DrawPlan, TrueHessianSettings, draw_plan
from hessian_tools.analysis.true_hessian.warnings import true_hessian_warnings
from hessian_tools.evaluation import differentiable
from hessian_tools.io.errors import ObjectiveError
from hessian_tools.io.json import clean
from hessian_tools.io.versions import versions
from hessian_tools.linalg.basis import orthogonalize
from hessian_tools.linalg.lanczos import Eigenpairs, eigenpairs
from hessian_tools.linalg.stein import SteinHessian, covariances, shrunk
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator, scaled
from hessian_tools.progress import Show
from hessian_tools.results.true_hessian import (
    TRUE_HESSIAN_SCHEMA,
    EigenvectorSearch,
    GivenDirection,
    TrueEigenvalue,
    TrueHessianResult,
)
from hessian_tools.resume import Phases
from hessian_tools.seeding import stream

DEFINITE = ("ggn", "fisher")  # their smallest eigenvalues are 0
STEPS = 150  # most products of a search for eigenvectors of a sample estimate, which is itself known to few digits
CLEAR = 2.0  # standard errors from which an entry of a projection off the diagonal counts
GIVEN_TOL = 1e-3  # of the eigenvectors of other operators


@differentiable
def true_hessian(
    objective: Objective,
    settings: TrueHessianSettings | None = None,
    *,
    operators: Mapping[str, Operator] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Show | None = None,
    phases: Phases | None = None,
) -> TrueHessianResult:
    """Measure trace and extreme eigenvalues of the Hessian of the smoothed loss, with their errors.

    Args:
        objective: The loss, its data and its weights. Only forward passes are made.
        settings: Settings of the analysis.
        operators: Operators on the weights, by name, whose eigenvectors are measured too. They help to find those of
            the Hessian (see the module), and leave every estimate unbiased.
        provenance: The dicts `checkpoint`, `data`, `network` and `training` of the result.
        progress: Progress callback, with forward passes in place of products.
        phases: Storage of finished parts, to resume an interrupted run.

    Returns:
        The result.

    Raises:
        ValueError: If the loss at the weights is not finite, or all weights are zero.
        FloatingPointError: If the loss is not finite under the noise, or a product with an operator is not finite.
    """
    settings, phases, began = settings or TrueHessianSettings(), phases or Phases(), time.perf_counter()
    settings = dataclasses.replace(settings, operators=tuple(operators or ()))
    meter = _Meter(progress)
    sampler = sampling.make_sampler(
        objective, settings.noise, group=settings.group, seed=settings.seed, phases=phases, report=meter
    )
    weights = sampler.at.clone()
    given, labels = _given(sampler, settings, operators or {})
    fixed = int((sampler.unit == 0).sum())
    planned = draw_plan(settings, objective.size - fixed, given.shape[1], len(sampler.weights))
    meter.expected = dict(planned.passes)

    traces, smooth = sampling.trace_values(sampler, planned.trace)
    control, directions = _measured_control(sampler, given, labels, planned)
    pilot = None
    if planned.search > PILOT and control is not None:
        pilot = sampling.search_differences(sampler, PILOT)
    if pilot is not None and control is not None and not _worthwhile(sampler, pilot, control, planned):
        planned = draw_plan(settings, objective.size - fixed, given.shape[1], len(sampler.weights), PILOT)
        meter.expected = dict(planned.passes)
    search, expected = _search(sampler, settings, control, planned, pilot)
    found, order = _directions(sampler, given, control, expected, planned)
    forms = []
    for i, v in enumerate(found.unbind(1)):
        values = sampling.line_values(sampler, v, planned.lines, i, f"eigenvalue {i + 1}")
        forms.append(draw_mean(values))
    shares = layer_shares(objective, found) if forms else ()
    inside = (given.T @ found).square().sum(0).tolist()
    pairs = [TrueEigenvalue(*parts) for parts in zip(forms, shares, inside, strict=True)]
    if not torch.equal(weights, objective.weights()):
        raise ObjectiveError("a forward pass changes the network's parameters: a Hessian needs fixed weights")
    known = {"checkpoint": {}, "data": {}, "network": {}, "training": {}, **(provenance or {})}
    known = {name: dict(known[name]) for name in ("checkpoint", "data", "network", "training")}
    known["data"]["samples"] = objective.samples
    result = TrueHessianResult(
        schema=TRUE_HESSIAN_SCHEMA,
        **known,
        settings=clean(dataclasses.asdict(settings)),
        num_parameters=objective.size,
        parameters={name: p.numel() for name, p in objective.parameters.items()},
        fixed=fixed,
        loss=float(sampler.base @ sampler.weights),
        smoothed_loss=draw_mean(smooth),
        trace=draw_mean(traces),
        eigenvalues=tuple(pairs[:order]),
        smallest_eigenvalues=tuple(pairs[order:]),
        directions=directions,
        search=search,
        passes={name: count for name, count in planned.passes.items() if count},
        groups=len(sampler.weights),
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        seed=settings.seed,
        warnings=(),
        seconds=time.perf_counter() - began + phases.seconds,
        versions=versions(),
    )
    return dataclasses.replace(result, warnings=tuple(true_hessian_warnings(result)))


class _Meter:
    """Adds up the forward passes of all stages for the progress callback."""

    def __init__(self, show: Show | None) -> None:
        self.show, self.expected, self.done = show, dict[str, int](), dict[str, int]()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.done[stage] = done
        if self.show is not None:
            now, expected = sum(self.done.values()), sum(self.expected.values())
            self.show(stage, now, max(now, expected), math.nan)


def _given(
    sampler: Sampler, settings: TrueHessianSettings, operators: Mapping[str, Operator]
) -> tuple[Tensor, list[tuple[str, int, float, Tensor]]]:
    """Return an orthonormal basis U [P, k] of the eigenvectors of D A D, and (name, rank, eigenvalue, U'u) of each."""
    size, unit = sampler.objective.size, sampler.unit
    vectors: list[tuple[str, int, float, Tensor]] = []
    for index, (name, op) in enumerate(operators.items()):
        top = min(settings.top, size)
        low = 0 if name in DEFINITE else min(settings.smallest, size - top)
        room = budget(settings.memory * 2**30 / 4, size, top + low, dtype=op.dtype)
        search = partial(
            eigenpairs,
            largest=top,
            smallest=low,
            generator=stream(settings.seed, 4, index),
            tol=GIVEN_TOL,
            max_products=300,
            max_basis=room.vectors,
            basis_dtype=room.basis_dtype,
        )

        def compute(op: Operator, search: Callable[[Operator], Eigenpairs] = search) -> dict[str, Any]:
            found = search(op)
            return {"values": found.values, "vectors": found.vectors}

        found = sampler.phases.run(f"eigenvectors of {name}", scaled(op, unit), compute)
        ranks = [*range(1, top + 1), *range(size, size - low, -1)]
        for rank, value, v in zip(ranks, found["values"].tolist(), found["vectors"].unbind(1), strict=True):
            vectors.append((name, rank, value, torch.where(unit > 0, v, 0)))
    basis = torch.zeros(size, 0, dtype=torch.float64, device=unit.device)
    for *_, v in vectors:
        rest, _ = orthogonalize(v, basis)
        if rest.norm() > 1e-3 * v.norm() > 0:
            basis = torch.cat([basis, (rest / rest.norm())[:, None]], 1)
    return basis, [(name, rank, value, basis.T @ v) for name, rank, value, v in vectors if v.norm() > 0]


def _measured_control(
    sampler: Sampler, given: Tensor, labels: list[tuple[str, int, float, Tensor]], planned: DrawPlan
) -> tuple[tuple[Tensor, Tensor] | None, tuple[GivenDirection, ...]]:
    """Measure U'HU: return it with U as a control, and the curvature along the given directions."""
    if not planned.given:
        return None, ()
    second, y = sampling.projection(sampler, given, planned.given, 0, "given directions")
    m = sampling.entries(second, y, sampler.weights).mean(0)
    measured = []
    for name, rank, value, part in labels:
        along = y @ (part / part.norm()).cpu()
        form = draw_mean(covariances(second, along.square(), sampler.weights))
        measured.append(GivenDirection(name, rank, value, form))
    return (given, m), tuple(measured)


def _worthwhile(sampler: Sampler, pilot: Tensor, control: tuple[Tensor, Tensor], planned: DrawPlan) -> bool:
    """Return whether a search can find eigenvalues as large as those along the given directions.

    Args:
        sampler: The loss under noise.
        pilot: Second differences of the first pairs of the search.
        control: The given directions and the measured projection on them.
        planned: The plan with the search.
    """
    few = sampling.stein_hessian(sampler, pilot, control, range(len(pilot)))
    spread = float((few.residual_variances @ sampler.weights.square()).sqrt())
    noisy = int((sampler.unit > 0).sum())
    # an eigenvector is found with a squared cosine of 3/4 at half of its eigenvalue
    return 2 * spread * math.sqrt(noisy / planned.search) < float(torch.linalg.eigvalsh(control[1]).abs().max())


def _search(
    sampler: Sampler,
    settings: TrueHessianSettings,
    control: tuple[Tensor, Tensor] | None,
    planned: DrawPlan,
    pilot: Tensor | None,
) -> tuple[EigenvectorSearch | None, tuple[Tensor, Tensor] | None]:
    """Search for eigenvectors.

    Returns:
        What is known about the search, and the extreme eigenvectors V [P, n] of the sample estimate of H with a guess
        of V'HV [n, n] (`hessian_tools.linalg.stein.shrunk`).
    """
    if not planned.search:
        return None, None
    c = sampling.search_differences(sampler, planned.search, pilot)
    top, low = planned.directions
    memory = settings.memory * 2**30 / 4

    def vectors(chosen: range, name: str) -> tuple[SteinHessian, Eigenpairs]:
        op = sampling.stein_hessian(sampler, c, control, chosen, memory)
        sampler.report(name, 0, 0)

        def compute() -> dict[str, Any]:
            return vars(eigenpairs(op, top, low, generator=stream(settings.seed, 5), tol=1e-2, max_products=STEPS))

        return op, Eigenpairs(**sampler.phases.keep(name, compute))

    count = len(c)
    halves = [vectors(range(i, count, 2), f"eigenvectors of half {i + 1}")[1].vectors for i in (0, 1)]
    op, whole = vectors(range(count), "eigenvectors of all draws")
    spread = float((op.residual_variances @ sampler.weights.square()).sqrt())
    noisy = int((sampler.unit > 0).sum())
    cosines = torch.linalg.svdvals(halves[0].T @ halves[1]).square().clamp(0, 1)
    values = whole.values.tolist()
    search = EigenvectorSearch(
        draws=count,
        spread=spread,
        threshold=spread * math.sqrt(noisy / count),
        largest=max(values),
        smallest=min(values) if low else whole.low,
        agreement=tuple(cosines.tolist()),
    )
    found = torch.where((sampler.unit > 0)[:, None], whole.vectors, 0)
    return search, (found, torch.diag(shrunk(whole.values, search.threshold)))


def _directions(
    sampler: Sampler,
    given: Tensor,
    control: tuple[Tensor, Tensor] | None,
    expected: tuple[Tensor, Tensor] | None,
    planned: DrawPlan,
) -> tuple[Tensor, int]:
    """Return the eigenvectors [P, n] of a measured V'HV: the largest first, then the smallest, and how many of each.

    Args:
        sampler: The loss under noise.
        given: The given directions U [P, k], orthonormal.
        control: U and the measured U'HU; None without given directions.
        expected: Candidates and a guess of the projection on them, which serves as a control; None without a search.
        planned: The plan.
    """
    v = given
    guessed = expected or control
    if guessed is None or not planned.projection:
        return v[:, :0], 0
    found = guessed[0]
    if given.shape[1]:  # of the search only what stands out of its noise
        found = found[:, guessed[1].diagonal() != 0]
    for column in found.unbind(1):
        rest, _ = orthogonalize(column, v)
        if rest.norm() > 1e-3:
            v = torch.cat([v, (rest / rest.norm())[:, None]], 1)
    second, y = sampling.projection(sampler, v, planned.projection, 1)
    inside = v.T @ guessed[0]
    guess = (inside @ guessed[1].to(v.device) @ inside.T).cpu()
    left = second - ((y @ guess) * y).sum(2) / 2
    values = sampling.entries(left, y, sampler.weights)
    m, k = guess + values.mean(0), given.shape[1]
    if control is not None:
        m[:k, :k] = (m[:k, :k] + control[1]) / 2  # two measurements from as many draws
    # an entry that is noise would turn directions that are right
    clear = m.abs() > CLEAR * values.std(0) / len(values) ** 0.5
    m = torch.where(clear | torch.eye(len(m), dtype=torch.bool), m, 0)
    _, rotation = torch.linalg.eigh(m)
    top, low = planned.directions
    top = min(top, v.shape[1])
    low = min(low, v.shape[1] - top)
    chosen = torch.cat([rotation.flip(1)[:, :top], rotation[:, :low]], 1)
    return v @ chosen.to(v.device), top
