"""Compute the spectrum of one operator: symmetry, eigenpairs, density, trace and data errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hessian_tools.analysis.context import AnalysisContext, Factory, require_symmetry
from hessian_tools.analysis.operator_spectrum.eigenvalues import (
    chosen_eigenpairs,
    lambda_max,
    largest_eigenvalues,
    two_ends,
)
from hessian_tools.analysis.operator_spectrum.eigenvectors import gradient_shares, layer_shares, participation
from hessian_tools.analysis.operator_spectrum.exact_ggn import (
    all_eigenvalues_if_chosen,
    exact_density,
    exact_functions,
    exact_pairs,
    exact_trace,
)
from hessian_tools.analysis.operator_spectrum.trace import trace_forms
from hessian_tools.analysis.planning.memory import budget_of
from hessian_tools.analysis.settings import DAMPING, STEPS, SpectrumSettings
from hessian_tools.analysis.uncertainty.round_off import relative_round_off
from hessian_tools.analysis.uncertainty.sampling_error import data_errors, sample_groups, withheld
from hessian_tools.analysis.uncertainty.tolerance import GroupForms, tolerance
from hessian_tools.linalg import spectral_functions as functions
from hessian_tools.linalg.lanczos import Eigenpairs, excess, random_vector
from hessian_tools.linalg.lanczos_quadrature import quadrature, tridiagonal
from hessian_tools.linalg.spectral_density import SETTLED, DensityEstimate, default_probes, density
from hessian_tools.linalg.trace import LEAST_PROBES, estimate_forms, frobenius
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator, scaled, symmetry_error
from hessian_tools.operators.curvature import OPERATORS, CurvatureOperator
from hessian_tools.perturbation import filter_norms
from hessian_tools.results.operator_spectrum import Density, Eigenvalue, Functional, Search, Spectrum, Trace


def measure(
    run: AnalysisContext, name: str, objective: Objective, factory: Factory, gradient: Tensor, index: int
) -> tuple[Spectrum, Eigenpairs]:
    """Compute the spectrum of one operator.

    Args:
        run: Settings, progress and stored phases of the analysis.
        name: Name of the operator.
        objective: The loss, its data and its weights.
        factory: Function that makes the operator from an objective and the bytes for stored primals.
        gradient: Gradient of the objective [P].
        index: Position of the operator in the analysis. Each position has its own random streams.

    Returns:
        The spectrum and the eigenpairs.

    Raises:
        AnalysisError: If the operator is not symmetric.
        FloatingPointError: If a product is not finite.
        ValueError: If the memory does not suffice.
    """
    settings, before, size = run.settings, run.phases.products, objective.size
    # GGN and Fisher have a large null space, so their smallest eigenvalues are 0. They are computed only for the first
    # operator.
    null = index > 0 and factory is not OPERATORS["hessian"]
    top = min(settings.magnitude or settings.top, size)
    one_end = settings.method == "power" or settings.magnitude or null
    smallest = 0 if one_end else min(settings.smallest, size - top)
    steps = settings.steps or (0 if settings.accuracy else STEPS)
    steps = min(steps, size) if settings.density and settings.backend == "own" else 0
    room = budget_of(objective, settings.memory, top + smallest, steps)
    op = factory(objective, room.kept)

    def phase(part: str, compute: Callable[[Operator, torch.Generator], dict[str, Any]]) -> dict[str, Any]:
        return run.phase(f"{name}: {part}", op, lambda op: compute(op, run.generator(part, index)))

    asymmetry: float = phase("symmetry", lambda op, random: {"error": symmetry_error(op, random)})["error"]
    require_symmetry(name, asymmetry, op.dtype)
    autograd: str = run.phases.keep(f"{name}: path", lambda: {"reason": _reason(op)})["reason"]
    parts = sample_groups(objective, torch.Generator().manual_seed(0))  # the same errors for every seed
    groups = factory(objective.regrouped(parts), 0)
    forms = GroupForms(op, groups, parts)
    enough = partial(forms.enough, settings.tightest)

    def search(op: Operator, random: torch.Generator) -> dict[str, Any]:
        found = chosen_eigenpairs(objective, op, top, smallest, settings, random, room, enough, step)
        if forms.vectors is not None and not torch.equal(found.vectors, forms.vectors):
            op.products += forms.vectors.shape[1]  # made for the tolerance only
        return vars(found)

    step = run.meter.phase(f"{name}: eigenvalues")
    whole: Tensor | None = None
    if name == "ggn" and (every := all_eigenvalues_if_chosen(run, objective, phase, top, step)) is not None:
        whole, smallest = every["values"], 0
        pairs = Eigenpairs(
            **phase("eigenvalues", lambda op, random: vars(exact_pairs(op, **every, tol=settings.tightest))),
        )
    else:
        pairs = Eigenpairs(**phase("eigenvalues", search))
    exact = pairs if bool(pairs.converged.all()) else pairs.take(pairs.converged)
    copied = 0 if exact is pairs else 8 // room.basis_dtype.itemsize * len(exact.values)
    spare = max(5, room.vectors - copied)  # vectors available to a density
    spectral: DensityEstimate | None = None
    if whole is not None:
        spectral = exact_density(whole, len(pairs.values), size)
    elif settings.density and settings.backend == "own":
        step_density = run.meter.phase(f"{name}: density")
        spectral = DensityEstimate(
            **phase(
                "density",
                lambda op, random: vars(
                    _density_by_probes(op, exact, settings, random, spare, room.basis_dtype, step_density)
                ),
            )
        )
    ends = {"nodes": torch.cat([n[spectral.atoms :] for n in spectral.nodes])} if spectral else None
    ends = ends or phase(
        "second start", lambda op, random: {"nodes": _second_start(op, exact, random, spare, room.basis_dtype)}
    )
    spread = run.phase(
        f"{name}: error from the data",
        groups,
        lambda groups: data_errors(groups, pairs, exact, run.generator("data", index), forms),
    )
    if whole is not None:
        probe_trace, norm = exact_trace(whole), float(whole.norm())
    else:
        step_trace = run.meter.phase(f"{name}: trace")
        probed = phase(
            "trace",
            lambda op, random: trace_forms(
                objective, op, exact, spectral, settings, random, step_trace, spread["trace"]
            ),
        )
        offset = float(exact.values.sum()) if settings.backend == "own" else 0.0
        probe_trace = estimate_forms(probed["forms"], offset, probed.get("variance", float("nan")))
        norm = frobenius(probed["squared"], exact)
    first = int(pairs.values.argmax())
    free = lambda_max(
        run,
        f"{name}: scale-free",
        scaled(op, filter_norms(objective)),
        random_vector(op, run.generator("scale", index)),
        1e-3 if settings.tol else tolerance(float(spread["pairs"][first]), float(pairs.values[first]), 1e-3),
    )
    scales = min(settings.scaled, size)
    ranks: list[float] = []
    if scales > 1:
        step_ranks = run.meter.phase(f"{name}: scale-free ranks")
        ranks = run.phase(
            f"{name}: scale-free ranks",
            scaled(op, filter_norms(objective)),
            lambda op: {"values": largest_eigenvalues(op, scales, settings, run.generator("scale", index), step_ranks)},
        )["values"]
    known = factory in OPERATORS.values()  # another operator is random itself, or fixes its dtype
    rounding = run.phases.keep(
        f"{name}: round-off",
        lambda: {"of pairs": relative_round_off(objective, factory, pairs.vectors) if known else [0.0]},
    )["of pairs"]
    slack = torch.tensor(rounding).to(pairs.values) * pairs.values.abs().max()
    shares = spread["pairs concentration"].tolist()
    overall = spread["trace concentration"]
    errors = [withheld(e, share, overall) for e, share in zip(spread["pairs"].tolist(), shares, strict=True)]
    columns = zip(
        pairs.values.tolist(),
        (pairs.residuals + slack).tolist(),
        (error for error, _ in errors),
        pairs.converged.tolist(),
        layer_shares(objective, pairs.vectors),
        (pairs.bounds + slack).tolist(),
        gradient_shares(gradient, pairs.vectors).tolist(),
        participation(pairs.vectors).tolist(),
        shares,
        (least for _, least in errors),
        strict=True,
    )
    found = [Eigenvalue(*column) for column in columns]
    upper, lower = two_ends(found, top, settings)
    lowest = min((e for e in found), key=lambda e: e.value)
    error, least = withheld(spread["trace"], overall)
    record = Spectrum(
        symmetry_error=asymmetry,
        hessian_vector_products=run.phases.products - before,
        eigenvalues=tuple(found[i] for i in upper),
        smallest_eigenvalues=tuple(found[i] for i in lower),
        trace=Trace(
            probe_trace.estimate,
            probe_trace.stderr,
            probe_trace.ci95,
            probe_trace.probes,
            error,
            overall,
            least,
        ),
        frobenius_norm=norm,
        scale_free_lambda_max=free,
        scale_free=tuple(ranks),
        density=_density(spectral) if settings.density else None,
        search=_search(pairs, size, ends["nodes"], spectral),
        gradient_share=sum(found[i].gradient for i in upper if found[i].converged),
        autograd=autograd,
        vectors=_vectors(pairs, [*upper, *lower], op) if settings.vectors else None,
        **(
            _functions(name, spectral, size, found[upper[0]], lowest, settings)
            if whole is None
            else exact_functions(whole, size, settings.damping)
        ),
    )
    return record, pairs


def _density_by_probes(
    op: Operator,
    exact: Eigenpairs,
    settings: SpectrumSettings,
    generator: torch.Generator,
    vectors: int,
    basis_dtype: torch.dtype,
    progress: Callable[[int, int, float], None],
) -> DensityEstimate:
    """Estimate the density with the probes and steps of the settings, and at most so many vectors in memory."""
    counts: dict[str, Any] = {"probes": settings.probes, "steps": settings.steps}
    if settings.accuracy is None:
        probes = settings.probes or default_probes(op.shape[0])
        counts = {"probes": probes, "steps": min(settings.steps or STEPS, vectors)}
        counts["settled"] = 0.0 if settings.steps else SETTLED
    return density(
        op,
        **counts,
        accuracy=settings.accuracy,
        generator=generator,
        deflate=exact,
        max_vectors=vectors,
        basis_dtype=basis_dtype,
        progress=progress,
    )


def _reason(op: Operator) -> str:
    """Return why the products of an operator are computed by autograd, or ""."""
    if getattr(op, "path", "") == "" and isinstance(op, CurvatureOperator):  # it made no product yet
        op @ torch.zeros(op.shape[0], dtype=op.dtype, device=op.device)
    return str(getattr(op, "reason", ""))


def _second_start(
    op: Operator, exact: Eigenpairs, generator: torch.Generator, room: int, basis_dtype: torch.dtype
) -> Tensor:
    """Ritz values [m] on the complement of the converged eigenvectors, from another random start vector."""
    if exact.values.numel() == op.shape[0]:
        return torch.empty(0, dtype=torch.float64)
    alpha, beta = tridiagonal(op, random_vector(op, generator), min(STEPS, room), exact.vectors, basis_dtype)
    nodes, _ = quadrature(alpha, beta)
    return nodes


def _search(pairs: Eigenpairs, size: int, nodes: Tensor, spectral: DensityEstimate | None) -> Search:
    """Summarize the evidence that no eigenvalue was missed."""
    nan = float("nan")
    return Search(
        steps=pairs.steps,
        excess=excess(pairs, size),
        starts=spectral.probes if spectral else 1,
        start_steps=spectral.steps if spectral else len(nodes),
        largest=float(nodes.max()) if len(nodes) else nan,
        smallest=float(nodes.min()) if len(nodes) else nan,
    )


def _functions(
    name: str,
    spectral: DensityEstimate | None,
    size: int,
    highest: Eigenvalue,
    lowest: Eigenvalue,
    settings: SpectrumSettings,
) -> dict[str, Any]:
    """Effective dimension and log determinant, if they are defined, and the share of the negative eigenvalues."""
    if spectral is None or spectral.probes < LEAST_PROBES:
        return {}
    found: dict[str, Functional | None] = {}
    definite = name in ("ggn", "fisher")
    if not definite:
        found["negative_share"] = functions.negative_share(spectral, size)
    damping = settings.damping or (DAMPING * highest.value if definite else 0.0)
    slack = 0.0 if definite else lowest.residual
    if damping > 0:
        with contextlib.suppress(ValueError):  # not positive definite: left out, with a warning
            found["effective_dimension"] = functions.effective_dimension(spectral, size, damping, slack)
            found["log_determinant"] = functions.log_determinant(spectral, size, damping, slack)
    return found


def _vectors(pairs: Eigenpairs, order: Sequence[int], op: Operator) -> Any:
    """Return the eigenvectors [P, k] in the given order and in the dtype of the operator."""
    return torch.stack([pairs.vectors[:, i].to(op.dtype) for i in order], 1).cpu().numpy()


def _density(spectral: DensityEstimate | None) -> Density | None:
    """Convert a density estimate to plain numbers."""
    if spectral is None:
        return None
    nodes, weights = (tuple(tuple(t.tolist()) for t in part) for part in (spectral.nodes, spectral.weights))
    return Density(nodes, weights, spectral.probes, spectral.steps, spectral.atoms, spectral.accuracy)
