"""Flatness metrics from products with a curvature operator: ends and trace of its spectrum, and relative metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from hessian_tools.analysis.context import AnalysisError, Factory, require_symmetry
from hessian_tools.analysis.flatness.context import Work
from hessian_tools.analysis.flatness.relative import fisher_rao, matrices, relative_flatness
from hessian_tools.analysis.planning.memory import budget
from hessian_tools.analysis.settings import DAMPING, PROBES, STEPS
from hessian_tools.analysis.uncertainty.sampling_error import data_errors, grouped, withheld
from hessian_tools.linalg import spectral_functions as functions
from hessian_tools.linalg.lanczos import Eigenpairs, eigenpairs
from hessian_tools.linalg.spectral_density import SETTLED, DensityEstimate, density
from hessian_tools.linalg.trace import estimate_forms, form_variance, probe_moments
from hessian_tools.operators.base import Operator, symmetry_error
from hessian_tools.operators.curvature import CurvatureOperator, fisher, hessian
from hessian_tools.perturbation import filter_norms
from hessian_tools.results.flatness import MATCHED, SURROGATE, Metric

TOP, SMALLEST, TOL = 10, 5, 1e-4  # eigenpairs that the traces deflate (the smallest for the Hessian only), tolerance
SPECTRAL, FUNCTIONALS = ("lambda_1/lambda_5", "||.||_F"), ("effective dimension", "log det")
PARTS = ("lambda_max", "trace", "lambda_max scaled", "trace scaled")  # metrics of every operator in the first table


class _Scaled(Operator):
    """The operator D A D, for a curvature operator A and D [P], with its forms for each batch."""

    def __init__(self, op: CurvatureOperator, scale: Tensor) -> None:
        super().__init__(op.shape[0], op.dtype, op.device)
        self._op, self._scale = op, scale.to(op.device, torch.float64)[:, None]

    def _apply(self, block: Tensor) -> Tensor:
        d = self._scale.to(self.dtype)
        return d * (self._op @ (d * block))

    def batch_forms(self, *blocks: Tensor) -> tuple[list[Tensor], Tensor]:
        self.products += sum(v.shape[1] for v in blocks)
        return self._op.batch_forms(*(self._scale * v for v in blocks))


def operator_metrics(work: Work, name: str, factory: Factory) -> dict[str, Metric]:
    """Compute the metrics of one operator.

    If a metric cannot be computed (unsupported network, product not finite, operator not symmetric), its note gives the
    reason.

    Args:
        work: Objective, settings, progress and stored phases.
        name: Name of the operator.
        factory: Function that makes the operator from an objective and the bytes for stored primals.

    Returns:
        Metrics by name, those of the first table first.

    Raises:
        ValueError: If the memory does not suffice.
    """
    objective, run = work.objective, work.run
    top = min(TOP, objective.size)
    ends = top, min(SMALLEST, objective.size - top) if name == "hessian" else 0
    divided = budget(run.settings.memory * 2**30, objective.size, sum(ends), STEPS if name == "ggn" else 0)
    room, kept = divided.vectors, divided.kept
    valid = MATCHED if name.startswith("smoothed") else SURROGATE
    random, scale = run.generator(f"{name}: symmetry", 0), filter_norms(objective)
    found: dict[str, Metric] = {}
    try:
        op = factory(objective, kept)
        groups = factory(grouped(objective, run.generator("groups", 0)), 0)
        error: float = run.phase(f"{name}: symmetry", op, lambda op: {"error": symmetry_error(op, random)})["error"]
        require_symmetry(name, error, op.dtype)
        pairs, squared = _ends_and_trace(work, name, op, groups, "", ends, room, valid, found)
        _ends_and_trace(work, name, _Scaled(op, scale), _Scaled(groups, scale), " scaled", ends, room, valid, found)
        if valid == SURROGATE:
            found |= _spectral(pairs, squared)
        if name == "ggn":
            found |= _functionals(work, op, pairs, room)
    except (AnalysisError, ValueError, FloatingPointError) as refusal:
        missing = (*PARTS, *(SPECTRAL if valid == SURROGATE else ()), *(FUNCTIONALS if name == "ggn" else ()))
        found = {part: Metric(valid=valid, note=str(refusal)) for part in missing} | found
    return found


def _ends_and_trace(
    work: Work,
    name: str,
    op: CurvatureOperator | _Scaled,
    groups: CurvatureOperator | _Scaled,
    kind: str,
    ends: tuple[int, int],
    room: int,
    valid: str,
    found: dict[str, Metric],
) -> tuple[Eigenpairs, Tensor]:
    """Add lambda_max and trace, each with both errors, to `found`.

    Returns the eigenpairs and ||Az||^2 of the probes.
    """
    run = work.run
    before = run.phases.products

    def phase(
        part: str, op: Operator, compute: Callable[[Operator, torch.Generator], dict[str, Any]]
    ) -> dict[str, Any]:
        title = f"{name}{kind}: {part}"
        return run.phase(title, op, lambda op: compute(op, run.generator(title, 0)))

    step = run.meter.phase(f"{name}{kind}: eigenvalues")
    pairs = Eigenpairs(
        **phase(
            "eigenvalues",
            op,
            lambda op, random: vars(eigenpairs(op, *ends, generator=random, tol=TOL, max_basis=room, progress=step)),
        )
    )
    exact = pairs if bool(pairs.converged.all()) else pairs.take(pairs.converged)
    spread = phase(
        "error from the data",
        groups,
        lambda groups, random: data_errors(cast(CurvatureOperator, groups), pairs, exact, random),
    )
    products = run.phases.products - before
    report = work.report(f"{name}{kind}: trace")

    def forms(op: Operator, random: torch.Generator) -> dict[str, Any]:
        rows, entries = [], torch.zeros(op.shape[0], dtype=torch.float64)
        for done in range(0, work.settings.probes, 4):
            *row, some = probe_moments(op, min(4, work.settings.probes - done), random, exact)
            rows.append(torch.stack(row))
            entries += some
            report(done + rows[-1].shape[1], work.settings.probes)
        both = torch.cat(rows, 1)
        return {"forms": both[0], "squared": both[1], "variance": form_variance(both[1], entries)}

    probed = phase("trace", op, forms)
    value, residual = float(pairs.values[0]), float(pairs.residuals[0])
    note = "" if bool(pairs.converged[0]) else "not converged: an eigenvalue lies within the interval"
    if pairs.norm == 0:
        note = "the operator is zero: no surrogate gradient reaches these weights"
    overall = spread["trace concentration"]
    error, least = withheld(float(spread["pairs"][0]), float(spread["pairs concentration"][0]), overall)
    found[f"lambda_max{kind}"] = Metric(
        value,
        ci95=(value - residual, value + residual),
        data_stderr=error,
        over="residual",
        valid=valid,
        products=products,
        note=note,
        data_stderr_least=least,
    )
    trace = estimate_forms(probed["forms"], float(exact.values.sum()), probed.get("variance", math.nan))
    error, least = withheld(spread["trace"], overall)
    found[f"trace{kind}"] = Metric(
        trace.estimate,
        trace.stderr,
        trace.ci95,
        error,
        "probes",
        valid,
        products=work.settings.probes,
        data_stderr_least=least,
    )
    return pairs, probed["squared"]


def _spectral(pairs: Eigenpairs, squared: Tensor) -> dict[str, Metric]:
    """Return lambda_1 / lambda_5 and the Frobenius norm, from numbers that are known already."""
    ratio = Metric(note="there is no fifth eigenvalue above 0")
    if len(pairs.values) >= 5 and float(pairs.values[4] - pairs.residuals[4]) > 0:
        (first, fifth), (r, s) = pairs.values[[0, 4]].tolist(), pairs.residuals[[0, 4]].tolist()
        ratio = Metric(first / fifth, ci95=((first - r) / (fifth + s), (first + r) / (fifth - s)), over="residual")
    square = estimate_forms(squared, float(pairs.values[pairs.converged].square().sum()))
    norm, low, high = (math.sqrt(max(x, 0.0)) for x in (square.estimate, *square.ci95))  # NaN stays NaN
    frobenius = Metric(norm, square.stderr / (2 * norm) if norm else 0.0, (low, high), over="probes")
    meanings = "ratio of the first to the fifth eigenvalue", "Frobenius norm"
    return {
        part: dataclasses.replace(metric, valid=SURROGATE, meaning=meaning)
        for part, metric, meaning in zip(SPECTRAL, (ratio, frobenius), meanings, strict=True)
    }


def _functionals(work: Work, op: CurvatureOperator, pairs: Eigenpairs, room: int) -> dict[str, Metric]:
    """Return effective dimension and log determinant of the GGN, from one spectral density."""
    run, size, given = work.run, work.objective.size, work.settings.damping
    exact = pairs if bool(pairs.converged.all()) else pairs.take(pairs.converged)
    spare = room - (0 if exact is pairs else len(exact.values))
    z = given or DAMPING * float(pairs.values[0])
    of = f"z = {z:.3g}" if given else f"z = {z:.3g}, {DAMPING:.0%} of lambda_max"
    title, before = "ggn: density", run.phases.products
    step = run.meter.phase(title)

    def compute(op: Operator) -> dict[str, Any]:
        steps: dict[str, Any] = {"steps": min(STEPS, spare), "settled": SETTLED, "max_vectors": spare}
        return vars(
            density(op, probes=PROBES, **steps, generator=run.generator(title, 0), deflate=exact, progress=step)
        )

    spectral = DensityEstimate(**run.phase(title, op, compute))
    functionals = functions.effective_dimension, functions.log_determinant
    meanings = f"sum l / (l + z), {of}", f"log det(A + z I), {of}"
    found: dict[str, Metric] = {}
    for name, function, meaning in zip(FUNCTIONALS, functionals, meanings, strict=True):
        try:
            if not z > 0:
                raise ValueError("lambda_max is not positive")
            f = function(spectral, size, z)
            parts = {"z": z, "quadrature error": f.quadrature_error}
            metric = Metric(f.estimate, f.stderr, f.ci95, over="probes", parts=parts)
        except ValueError as error:
            metric = Metric(note=str(error))
        products = 0 if found else run.phases.products - before
        found[name] = dataclasses.replace(metric, valid=SURROGATE, meaning=meaning, products=products)
    return found


def relative_metrics(work: Work) -> dict[str, Metric]:
    """Compute the Fisher-Rao norm, and the relative flatness of every weight matrix.

    Args:
        work: Objective, settings, progress and stored phases.

    Returns:
        Metrics by name.
    """
    objective, seed = work.objective, work.settings.seed
    name = "Fisher-Rao norm"
    found = {
        name: work.measure(
            name,
            lambda op: Metric(fisher_rao(op, objective.weights())),
            SURROGATE,
            "sqrt(w'Fw), F the empirical Fisher matrix",
            fisher(objective, 0),
        )
    }

    def flat(op: Operator, layer: str) -> Metric:
        e = relative_flatness(op, objective, layer, seed=seed)
        return Metric(e.estimate, e.stderr, e.ci95, over="probes")

    op = hessian(objective, work.run.settings.memory * 2**30 / 2)
    for layer in matrices(objective):
        name = f"relative flatness {layer}"
        found[name] = work.measure(
            name, partial(flat, layer=layer), SURROGATE, "sum over rows s, t of <w_s, w_t> tr H_st", op
        )
    return found
