"""The spectrum as a function of the number of samples.

On average, lambda_max is larger on few samples than on many, because it is a convex function of the matrix (Jensen's
inequality). The curve shows how many samples it takes to converge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hessian_tools.linalg.lanczos import eigenpairs, least_basis
from hessian_tools.linalg.trace import probe_forms
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator
from hessian_tools.results.spectrum import SamplePoint
from hessian_tools.seeding import stream

Compute = Callable[[Operator], dict[str, Any]]
TOLERANCE, PRODUCTS = 1e-3, 100  # of the eigenpairs; the spread over the subsets is far larger than this tolerance


def _plainly(name: str, op: Operator, compute: Compute) -> dict[str, Any]:
    """Run a computation without storing its result."""
    return compute(op)


def samples_curve(
    objective: Objective,
    counts: Sequence[int],
    resamples: int,
    *,
    operator: Callable[[Objective, float], Operator],
    seed: int,
    top: int = 5,
    trace_probes: int = 8,
    memory: float = 4 * 2**30,
    run: Callable[[str, Operator, Compute], dict[str, Any]] = _plainly,
) -> tuple[SamplePoint, ...]:
    """Compute the largest eigenvalues and the trace on subsets of n samples, for several n.

    The trace is the sum of the converged eigenvalues, plus a probe estimate for the rest.

    Args:
        objective: The loss, its data and its weights.
        counts: Sizes n of the subsets, in increasing order.
        resamples: Number of subsets of each size (see `subsets`).
        operator: Function that makes the operator from an objective and the bytes for stored primals.
        seed: Random seed.
        top: Number of eigenvalues.
        trace_probes: Number of probes for the trace.
        memory: Bytes for the Lanczos basis and stored primals.
        run: Function that runs one named computation on an operator, for example `AnalysisContext.phase`.

    Returns:
        One point for each n. Eigenvalues that did not converge are NaN.

    Raises:
        ValueError: If the counts do not increase from at least 1 to at most N, or if another number is below 1.
    """
    if min(resamples, top, trace_probes) < 1:
        raise ValueError(f"resamples, top and trace_probes must be at least 1, not {resamples}, {top}, {trace_probes}")
    total, previous = objective.samples, 0
    for n in counts:
        if not previous < n <= total:
            raise ValueError(f"sample counts must increase from at least 1 to at most {total}, not {list(counts)}")
        previous = n
    top = min(top, objective.size)
    basis = max(least_basis(top), min(PRODUCTS, int(memory / 2 / 8 / objective.size)))
    points = []
    for n in counts:
        found = []
        parts = subsets(total, n, resamples, stream(seed, n))
        for i, part in enumerate(_restricted(objective, parts)):
            compute = partial(
                _measure,
                top=top,
                basis=basis,
                start=stream(seed, n, i, 0),
                probes=trace_probes,
                draws=stream(seed, n, i, 1),
            )
            found.append(run(f"{n} samples, subset {i + 1} of {len(parts)}", operator(part, memory / 2), compute))
        values = tuple(tuple(f["values"].tolist()) for f in found)
        points.append(SamplePoint(n, n * len(parts) <= total, values, tuple(f["trace"] for f in found)))
    return tuple(points)


def subsets(total: int, n: int, resamples: int, generator: torch.Generator) -> list[Tensor]:
    """Draw subsets of n of the indices 0, ..., total - 1.

    The subsets are disjoint blocks of one random permutation if there are enough indices. Otherwise each is drawn
    independently, without replacement. Over such overlapping subsets, the spread of an estimate is too small by a
    factor of about sqrt(1 - n / total).

    Args:
        total: Number of indices.
        n: Size of each subset.
        resamples: Number of subsets. For n = total there is only one.
        generator: Random stream.

    Returns:
        The subsets, each [n].
    """
    resamples = 1 if n == total else resamples
    if n * resamples <= total:
        return list(torch.randperm(total, generator=generator)[: n * resamples].split(n))
    return [torch.randperm(total, generator=generator)[:n] for _ in range(resamples)]


def _restricted(objective: Objective, parts: Sequence[Tensor]) -> Iterator[Objective]:
    """Yield the objective on each set of samples, in batches no larger than its largest batch."""
    together = objective.rebatched(objective.samples)
    for part in parts:
        yield together.regrouped(part.split(max(objective.sizes)))


def _measure(
    op: Operator, top: int, basis: int, start: torch.Generator, probes: int, draws: torch.Generator
) -> dict[str, Any]:
    """Compute eigenvalues and trace on one subset."""
    pairs = eigenpairs(op, top, generator=start, tol=TOLERANCE, max_products=max(PRODUCTS, top), max_basis=basis)
    exact = pairs.take(pairs.converged)
    forms, _ = probe_forms(op, probes, draws, exact)
    values = pairs.values.masked_fill(~pairs.converged, torch.nan)
    return {"values": values, "trace": float(exact.values.sum() + forms.mean())}
