"""Compute the spectrum of one operator: symmetry, eigenpairs, density, trace and data errors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessian_tools.analysis.context import AnalysisContext, Factory, require_symmetry
from hessian_tools.analysis.eigenvectors import gradient_shares, layer_shares, participation
from hessian_tools.analysis.exact_ggn import (
    all_eigenvalues,
    exact_by_default,
    exact_density,
    exact_functions,
    exact_pairs,
    exact_trace,
)
from hessian_tools.analysis.planning.memory import Budget, budget, budget_of
from hessian_tools.analysis.pyhessian import pyhessian_eigenpairs, pyhessian_trace
from hessian_tools.analysis.settings import STEPS, SpectrumSettings
from hessian_tools.analysis.uncertainty.round_off import relative_round_off
from hessian_tools.analysis.uncertainty.sampling_error import data_errors, grouped, withheld
from hessian_tools.linalg import spectral_functions as functions
from hessian_tools.linalg.lanczos import Eigenpairs, eigenpairs, excess, random_vector
from hessian_tools.linalg.lanczos_quadrature import quadrature, tridiagonal
from hessian_tools.linalg.power_iteration import power_iteration
from hessian_tools.linalg.spectral_density import SETTLED, DensityEstimate, default_probes, density
from hessian_tools.linalg.trace import LEAST_PROBES, estimate_forms, form_variance, frobenius, probe_moments
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator, scaled, symmetry_error
from hessian_tools.operators.curvature import OPERATORS, CurvatureOperator
from hessian_tools.operators.gram import GramError
from hessian_tools.perturbation import filter_norms
from hessian_tools.results.spectrum import Density, Eigenvalue, Functional, Search, Spectrum, Trace

ENOUGH = 0.3  # error of the probes relative to that from the data, which then grows by 4%
FIRST, LEAST = 8, 12  # probes of a trace from which the number of further ones follows, and fewest in all


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
    step = run.meter.phase(f"{name}: eigenvalues")
    whole: Tensor | None = None
    if name == "ggn" and (every := _all_eigenvalues(run, objective, phase, top, step)) is not None:
        whole, smallest = every["values"], 0
        pairs = Eigenpairs(
            **phase("eigenvalues", lambda op, random: vars(exact_pairs(op, **every, tol=settings.tol))),
        )
    else:
        pairs = Eigenpairs(
            **phase(
                "eigenvalues",
                lambda op, random: vars(_pairs(objective, op, top, smallest, settings, random, room, step)),
            )
        )
    exact = pairs if bool(pairs.converged.all()) else pairs.take(pairs.converged)
    copied = 0 if exact is pairs else 8 // room.basis_dtype.itemsize * len(exact.values)
    spare = max(5, room.vectors - copied)  # vectors available to a density
    spectral: DensityEstimate | None = None
    if whole is not None:
        spectral = exact_density(whole, len(pairs.values), size)
    elif settings.density and settings.backend == "own":
        step_density = run.meter.phase(f"{name}: density")
        counts: dict[str, Any] = {"probes": settings.probes, "steps": settings.steps}
        if settings.accuracy is None:
            counts = {"probes": settings.probes or default_probes(size), "steps": min(settings.steps or STEPS, spare)}
            counts["settled"] = 0.0 if settings.steps else SETTLED
        spectral = DensityEstimate(
            **phase(
                "density",
                lambda op, random: vars(
                    density(
                        op,
                        **counts,
                        accuracy=settings.accuracy,
                        generator=random,
                        deflate=exact,
                        max_vectors=spare,
                        basis_dtype=room.basis_dtype,
                        progress=step_density,
                    )
                ),
            )
        )
    ends = {"nodes": torch.cat([n[spectral.atoms :] for n in spectral.nodes])} if spectral else None
    ends = ends or phase(
        "second start", lambda op, random: {"nodes": _second_start(op, exact, random, spare, room.basis_dtype)}
    )
    groups = factory(grouped(objective, torch.Generator().manual_seed(0)), 0)  # the same errors for every seed
    spread = run.phase(
        f"{name}: error from the data",
        groups,
        lambda groups: data_errors(groups, pairs, exact, run.generator("data", index)),
    )
    if whole is not None:
        probe_trace, norm = exact_trace(whole), float(whole.norm())
    else:
        step_trace = run.meter.phase(f"{name}: trace")
        probed = phase(
            "trace",
            lambda op, random: _trace_forms(
                objective, op, exact, spectral, settings, random, step_trace, ENOUGH * spread["trace"]
            ),
        )
        offset = float(exact.values.sum()) if settings.backend == "own" else 0.0
        probe_trace = estimate_forms(probed["forms"], offset, probed.get("variance", float("nan")))
        norm = frobenius(probed["squared"], exact)
    free = lambda_max(
        run,
        f"{name}: scale-free",
        scaled(op, filter_norms(objective)),
        random_vector(op, run.generator("scale", index)),
    )
    scales = min(settings.scaled, size)
    ranks: list[float] = []
    if scales > 1:
        step_ranks = run.meter.phase(f"{name}: scale-free ranks")
        ranks = run.phase(
            f"{name}: scale-free ranks",
            scaled(op, filter_norms(objective)),
            lambda op: {"values": _largest(op, scales, settings, run.generator("scale", index), step_ranks)},
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
    upper, lower = _two_ends(found, top, settings)
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


def _all_eigenvalues(
    run: AnalysisContext,
    objective: Objective,
    phase: Callable[..., dict[str, Any]],
    top: int,
    progress: Callable[[int, int, float], None],
) -> dict[str, Tensor] | None:
    """Return all eigenvalues of the GGN and eigenvectors of the largest; None if they are not to be computed so."""
    settings = run.settings
    given = bool(settings.exact) and settings.time is None
    try:
        if not (settings.exact or exact_by_default(objective, settings)):
            return None
        return phase("all eigenvalues", lambda op, random: all_eigenvalues(objective, top, progress))
    except (GramError, RuntimeError):  # torch raises the second, for want of memory or in networks not foreseen here
        if given:
            raise
        return None


def _pairs(
    objective: Objective,
    op: Operator,
    top: int,
    smallest: int,
    settings: SpectrumSettings,
    generator: torch.Generator,
    room: Budget,
    progress: Callable[[int, int, float], None],
) -> Eigenpairs:
    """Compute the eigenpairs with the method and the backend of the settings."""
    if settings.backend == "pyhessian":
        return pyhessian_eigenpairs(objective, op, top, tol=settings.tol, seed=settings.seed)
    if settings.method == "power":
        return power_iteration(op, top, generator=generator, tol=settings.tol, progress=progress)
    return eigenpairs(
        op,
        0 if settings.magnitude else top,
        smallest,
        magnitude=top if settings.magnitude else 0,
        generator=generator,
        tol=settings.tol,
        max_products=settings.max_products,
        max_basis=room.vectors,
        basis_dtype=room.basis_dtype,
        progress=progress,
    )


def _reason(op: Operator) -> str:
    """Return why the products of an operator are computed by autograd, or ""."""
    if getattr(op, "path", "") == "" and isinstance(op, CurvatureOperator):  # it made no product yet
        op @ torch.zeros(op.shape[0], dtype=op.dtype, device=op.device)
    return str(getattr(op, "reason", ""))


def _two_ends(found: Sequence[Eigenvalue], top: int, settings: SpectrumSettings) -> tuple[list[int], list[int]]:
    """Return the indices of the largest eigenvalues, descending, and of the smallest, ascending.

    Eigenvalues that were found by magnitude are split by sign, unless all are negative.
    """
    order = sorted(range(len(found)), key=lambda i: -found[i].value)
    upper = [i for i in order if i < top]
    lower = [i for i in reversed(order) if i >= top]
    if (settings.magnitude or settings.method == "power") and found[upper[0]].value >= 0:
        lower = [i for i in reversed(upper) if found[i].value < 0]
        upper = [i for i in upper if found[i].value >= 0]
    return upper, lower


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
    damping = settings.damping or (0.01 * highest.value if definite else 0.0)
    slack = 0.0 if definite else lowest.residual
    if damping > 0:
        with contextlib.suppress(ValueError):  # not positive definite: left out, with a warning
            found["effective_dimension"] = functions.effective_dimension(spectral, size, damping, slack)
            found["log_determinant"] = functions.log_determinant(spectral, size, damping, slack)
    return found


def _trace_forms(
    objective: Objective,
    op: Operator,
    exact: Eigenpairs,
    spectral: DensityEstimate | None,
    settings: SpectrumSettings,
    generator: torch.Generator,
    progress: Callable[[int, int, float], None],
    enough: float,
) -> dict[str, Any]:
    """Return z'Az (forms) and ||Az||^2 (squared) of probes, including those of the density.

    "variance" is that of z'Az (see `form_variance`), from the probes that are not those of the density. From the first
    `FIRST` of them follows how many give the standard error `enough` (NaN: not known); at most `trace_probes` are made.
    """
    if settings.backend == "pyhessian":  # its own estimator, without deflation
        forms = pyhessian_trace(objective, seed=settings.seed)
        op.products += len(forms)
        return {"forms": forms, "squared": torch.full((1,), torch.nan)}
    quadratic, squared, entries, own = [], [], torch.zeros(op.shape[0], dtype=torch.float64), torch.empty(0)
    if spectral is not None:
        quadratic.append(spectral.quadratic)
        squared.append(spectral.squared)
    given = sum(len(q) for q in quadratic)
    missing = first = max(0, settings.trace_probes - given)
    while missing > 0:
        if len(own) == FIRST and enough > 0:
            needed = max(LEAST, math.ceil(form_variance(own, entries) / enough**2))
            missing = min(missing, max(0, needed - given - FIRST))
            if not missing:
                break
        count = min(missing, 4)
        q, s, e = probe_moments(op, count, generator, exact)
        quadratic.append(q)
        squared.append(s)
        entries += e
        own = torch.cat([own, s])
        missing -= count
        progress(first - missing, first, float("nan"))
    variance = form_variance(own, entries)
    return {"forms": torch.cat(quadratic), "squared": torch.cat(squared), "variance": variance}


def lambda_max(run: AnalysisContext, name: str, op: Operator, start: Tensor) -> float:
    """Compute the largest eigenvalue of an operator, with a tolerance of 1e-3 of its norm.

    Args:
        run: Settings, progress and stored phases of the analysis.
        name: Name of the phase.
        op: The operator.
        start: Start vector [P].

    Returns:
        The eigenvalue; NaN if it did not converge in 100 products.
    """
    room = budget(run.settings.memory * 2**30, op.shape[0], 1, dtype=op.dtype)
    step = run.meter.phase(name)

    def compute(op: Operator) -> dict[str, Any]:
        pairs = eigenpairs(
            op,
            1,
            generator=torch.Generator(),
            tol=1e-3,
            max_products=100,
            max_basis=min(100, room.vectors),
            basis_dtype=room.basis_dtype,
            start=start,
            progress=step,
        )
        return {"value": float(pairs.values[0]) if bool(pairs.converged[0]) else float("nan")}

    value: float = run.phase(name, op, compute)["value"]
    return value


def _largest(
    op: Operator,
    count: int,
    settings: SpectrumSettings,
    generator: torch.Generator,
    progress: Callable[[int, int, float], None],
) -> list[float]:
    """Return the largest eigenvalues that converged, in descending order."""
    room = budget(settings.memory * 2**30, op.shape[0], count, dtype=op.dtype)
    found = eigenpairs(
        op,
        count,
        generator=generator,
        tol=settings.tol,
        max_products=settings.max_products,
        max_basis=room.vectors,
        basis_dtype=room.basis_dtype,
        progress=progress,
    )
    return sorted(found.values[found.converged].tolist(), reverse=True)


def _vectors(pairs: Eigenpairs, order: Sequence[int], op: Operator) -> Any:
    """Return the eigenvectors [P, k] in the given order and in the dtype of the operator."""
    return torch.stack([pairs.vectors[:, i].to(op.dtype) for i in order], 1).cpu().numpy()


def _density(spectral: DensityEstimate | None) -> Density | None:
    """Convert a density estimate to plain numbers."""
    if spectral is None:
        return None
    nodes, weights = (tuple(tuple(t.tolist()) for t in part) for part in (spectral.nodes, spectral.weights))
    return Density(nodes, weights, spectral.probes, spectral.steps, spectral.atoms, spectral.accuracy)
