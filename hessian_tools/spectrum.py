"""The main analysis: one objective in, one SpectrumResult out, every number with its error."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools import results
from hessian_tools.density import Density, density, rademacher
from hessian_tools.lanczos import Eigenpairs, eigenpairs, orthogonalize, random_vector
from hessian_tools.objective import Objective
from hessian_tools.operators import OPERATORS, CurvatureOperator, Operator, scaled, symmetry_error
from hessian_tools.phases import Phases
from hessian_tools.power import power_iteration
from hessian_tools.reference import pyhessian_eigenpairs
from hessian_tools.report import warnings_of
from hessian_tools.trace import Estimate, estimate, frobenius, probe_forms

Progress = Callable[[str, int, int], None]  # (phase, products done, products at most)

SYMMETRY_LIMIT = {torch.float32: 1e-4, torch.float64: 1e-10}
GROUPS = 32  # batches over which the spread of v'Hv is taken, for the error from the data


class AnalysisError(RuntimeError):
    """The computation failed: an operator that is no Hessian, or numbers that are not finite."""


@dataclass(frozen=True)
class Settings:
    """What `spectrum` computes; every field is stored with the result."""

    operators: tuple[str, ...] = ("hessian", "ggn")
    top: int = 10
    smallest: int = 5
    method: str = "lanczos"
    backend: str = "own"
    density: bool = True
    steps: int = 60
    probes: int = 4
    trace_probes: int = 32
    tol: float = 1e-4
    seed: int = 0
    memory: float = 4.0
    max_products: int = 1000
    per_layer: bool = False

    def __post_init__(self) -> None:
        if any(name.startswith(("fd", "finite")) for name in self.operators):
            raise ValueError(
                "finite differences of the surrogate gradient are no Hessian: spikes stay frozen in them and the "
                "matrix is not symmetric; use hessian (the surrogate's 2-jet) or relaxed"
            )
        if unknown := set(self.operators) - {*OPERATORS, "relaxed"}:
            raise ValueError(
                f"unknown operator {', '.join(sorted(unknown))}: choose from {', '.join(OPERATORS)}, relaxed"
            )
        if not self.operators:
            raise ValueError("no operator chosen")
        if self.top < 1 or self.smallest < 0 or self.steps < 1 or self.probes < 1 or self.trace_probes < 2:
            raise ValueError("top, steps and probes must be at least 1, trace_probes at least 2, smallest at least 0")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol must lie between 0 and 1, not {self.tol}")
        if self.method not in ("lanczos", "power") or self.backend not in ("own", "pyhessian"):
            raise ValueError("method is lanczos or power, backend is own or pyhessian")
        if self.backend == "pyhessian" and (self.method != "power" or self.operators != ("hessian",)):
            raise ValueError("backend pyhessian is a reference for method power and operator hessian alone")


def spectrum(
    objective: Objective,
    settings: Settings | None = None,
    *,
    variants: Mapping[str, Objective] | None = None,
    relaxed: Objective | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    phases: Phases | None = None,
) -> results.SpectrumResult:
    """Eigenvalues, density and trace of an objective's curvature, with errors.

    variants: objectives with the same parameters under another convention (surrogate slope, tie rule); lambda_max of
    the first operator is measured on each. relaxed: the objective of the relaxed network, for operator `relaxed`.
    provenance: the dicts checkpoint, data, network, training, activity of the result. phases: where finished phases
    are kept. Raises AnalysisError if an operator is not symmetric (then it is the Hessian of nothing) or a number is
    not finite, ValueError for settings that do not fit.
    """
    settings = settings or Settings()
    began = time.perf_counter()
    report = progress or (lambda phase, done, total: None)
    phases = phases or Phases()
    report("loss and gradient", 0, 1)
    loss, gradient = objective.value_and_gradient()
    if not (np.isfinite(loss) and torch.isfinite(gradient).all()):
        raise AnalysisError(f"the loss ({loss}) or its gradient is not finite at these weights")
    spectra: dict[str, results.Spectrum] = {}
    blocks: dict[str, results.Spectrum] = {}
    sensitivity: dict[str, float] = {}
    for index, name in enumerate(settings.operators):
        source = relaxed if name == "relaxed" else objective
        if source is None:
            raise ValueError("operator relaxed needs the relaxed network's objective")
        factory = OPERATORS["hessian" if name == "relaxed" else name]
        spectra[name], pairs = _spectrum(name, source, factory, settings, index, report, phases)
        if index == 0 and settings.per_layer:
            for i, (layer, part) in enumerate(layer_objectives(source).items(), 100):  # random streams of their own
                blocks[layer], _ = _spectrum(f"{name} of {layer}", part, factory, settings, i, report, phases)
        if index == 0 and pairs.norm > 0:
            for i, (label, variant) in enumerate((variants or {}).items()):
                op = factory(variant, settings.memory * 2**30)
                start = _near(pairs.vectors[:, 0], op, _generator(settings.seed, "variant", i))
                sensitivity[label] = _top(op, start, report, phases, f"{name}: {label}")
    known = {"checkpoint": {}, "data": {}, "network": {}, "training": {}, "activity": {}, **(provenance or {})}
    known["data"] = {**known["data"], "samples": objective.samples}
    result = results.SpectrumResult(
        schema=results.SCHEMA,
        **known,
        settings={**settings.__dict__, "operators": list(settings.operators)},
        num_parameters=objective.size,
        parameters={name: p.numel() for name, p in objective.parameters.items()},
        weight_norms={name: float(p.detach().double().norm()) for name, p in objective.parameters.items()},
        loss=loss,
        accuracy=_accuracy(objective),
        gradient_norm=float(gradient.norm()),
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        seed=settings.seed,
        sensitivity=sensitivity,
        spectra=spectra,
        blocks=blocks,
        warnings=(),
        seconds=time.perf_counter() - began,
        versions=versions(),
    )
    return dataclasses.replace(result, warnings=warnings_of(result))


def _spectrum(
    name: str,
    objective: Objective,
    factory: Callable[[Objective, float], CurvatureOperator],
    settings: Settings,
    index: int,
    report: Progress,
    phases: Phases,
) -> tuple[results.Spectrum, Eigenpairs]:
    """One operator: symmetry, eigenpairs, density, trace, errors from the data, scale-free lambda_max.

    index: its place among the operators; every place has random streams of its own.
    """
    op = factory(objective, settings.memory * 2**30)
    before = phases.products

    def seeded(phase: str) -> torch.Generator:
        return _generator(settings.seed, phase, index)

    report(f"{name}: symmetry", 0, 2)
    symmetry = phases.run(f"{name}: symmetry", op, lambda: {"error": symmetry_error(op, seeded("symmetry"))})
    asymmetry = symmetry["error"]
    if not asymmetry <= SYMMETRY_LIMIT.get(op.dtype, 1e-4):
        raise AnalysisError(
            f"the {name} operator is not symmetric (|u'Hv - v'Hu| / ||Hu|| = {asymmetry:.1e}), so it is the Hessian "
            "of nothing: look for state that survives a forward, random layers, or a surrogate without f''"
        )
    # ggn and fisher have a large null space: their smallest eigenvalues are 0, sought only where they come first
    null = index > 0 and factory is not OPERATORS["hessian"]
    top = min(settings.top, op.shape[0])
    smallest = 0 if settings.method == "power" or null else min(settings.smallest, op.shape[0] - top)
    try:
        step = _phase(report, f"{name}: eigenvalues")
        pairs = Eigenpairs(
            **phases.run(
                f"{name}: eigenvalues",
                op,
                lambda: vars(_pairs(objective, op, top, smallest, settings, seeded("lanczos"), step)),
            )
        )
    except FloatingPointError as error:
        raise AnalysisError(f"{name}: {error}") from None
    exact = pairs.take(pairs.converged)
    spectral: Density | None = None
    if settings.density:
        step = _phase(report, f"{name}: density")
        counts = {"probes": settings.probes, "steps": settings.steps}
        spectral = Density(
            **phases.run(
                f"{name}: density",
                op,
                lambda: vars(density(op, **counts, generator=seeded("density"), deflate=exact, progress=step)),
            )
        )
    step = _phase(report, f"{name}: trace")
    probed = phases.run(
        f"{name}: trace", op, lambda: _trace_forms(op, exact, spectral, settings, seeded("trace"), step)
    )
    probe_trace = estimate(probed["forms"], float(exact.values.sum()))
    report(f"{name}: error from the data", 0, 1)
    groups = factory(objective.rebatched(max(1, objective.samples // GROUPS)), 0)
    spread = phases.run(f"{name}: data", groups, lambda: _data_errors(groups, pairs, exact, seeded("data")))
    free = _top(
        scaled(op, filter_norms(objective)), random_vector(op, seeded("scale")), report, phases, f"{name}: scale-free"
    )
    shares = layer_shares(objective, pairs.vectors)
    found = tuple(
        results.Eigenvalue(float(v), float(r), float(e), bool(c), s)
        for v, r, e, c, s in zip(pairs.values, pairs.residuals, spread["pairs"], pairs.converged, shares, strict=True)
    )
    record = results.Spectrum(
        symmetry_error=asymmetry,
        hessian_vector_products=phases.products - before,
        eigenvalues=tuple(sorted(found[:top], key=lambda e: -e.value)),
        smallest_eigenvalues=found[top:],
        trace=_trace(probe_trace, spread["trace"]),
        frobenius_norm=frobenius(probed["squared"], exact),
        scale_free_lambda_max=free,
        density=_density(spectral),
    )
    return record, pairs


def layer_objectives(objective: Objective) -> dict[str, Objective]:
    """One objective a layer (weights, biases and the like of one module), all other parameters held constant."""
    names: dict[str, list[str]] = {}
    for name in objective.parameters:
        names.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return {
        layer: dataclasses.replace(objective, parameters={name: objective.parameters[name] for name in own})
        for layer, own in names.items()
    }


def _pairs(
    objective: Objective,
    op: CurvatureOperator,
    top: int,
    smallest: int,
    settings: Settings,
    generator: torch.Generator,
    progress: Callable[[int, int], None],
) -> Eigenpairs:
    if settings.backend == "pyhessian":
        return pyhessian_eigenpairs(objective, op, top, tol=settings.tol, seed=settings.seed)
    if settings.method == "power":
        return power_iteration(op, top, generator=generator, tol=settings.tol, progress=progress)
    # a quarter of the memory for the basis of P-vectors in float64
    basis = int(settings.memory * 2**30 / 4 / 8 / op.shape[0])
    return eigenpairs(
        op,
        top,
        smallest,
        generator=generator,
        tol=settings.tol,
        max_products=settings.max_products,
        max_basis=min(400, basis),
        progress=progress,
    )


def _trace_forms(
    op: CurvatureOperator,
    exact: Eigenpairs,
    spectral: Density | None,
    settings: Settings,
    generator: torch.Generator,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """forms z'Az and squared ||Az||^2 over trace_probes probes; the density's probes count among them."""
    quadratic, squared = [], []
    if spectral is not None:
        quadratic.append(spectral.quadratic)
        squared.append(spectral.squared)
    missing = settings.trace_probes - sum(len(q) for q in quadratic)
    while missing > 0:
        count = min(missing, 4)
        q, s = probe_forms(op, count, generator, exact)
        quadratic.append(q)
        squared.append(s)
        missing -= count
        progress(settings.trace_probes - missing, settings.trace_probes)
    return {"forms": torch.cat(quadratic), "squared": torch.cat(squared)}


def _data_errors(
    groups: CurvatureOperator, pairs: Eigenpairs, exact: Eigenpairs, generator: torch.Generator
) -> dict[str, Any]:
    """Standard errors of the eigenvalues (pairs [k]) and of the trace, from the spread of v'H_b v over small batches.

    To first order an eigenvalue moves by v' dH v when the data change; the trace is the converged pairs' forms plus
    the mean over a few probes on their complement.
    """
    probes, _ = orthogonalize(rademacher(groups, 4, generator), exact.vectors)
    forms, counts = groups.batch_forms(torch.cat([pairs.vectors, probes], 1))
    known = pairs.converged
    traces = forms[:, : len(known)][:, known].sum(1) + forms[:, len(known) :].mean(1)
    errors = standard_error(torch.cat([forms[:, : len(known)], traces[:, None]], 1), counts)
    return {"pairs": errors[:-1], "trace": float(errors[-1])}


def standard_error(values: Tensor, counts: Tensor) -> Tensor:
    """Standard error [k] of the sample mean of n independent samples, from batch means [B, k] of counts [B] samples.

    NaN for a single batch.
    """
    total, batches = counts.sum(), len(counts)
    if batches < 2:
        return torch.full((values.shape[1],), float("nan"), dtype=torch.float64)
    mean = (counts[:, None] * values).sum(0) / total
    variance = (counts[:, None] * (values - mean).square()).sum(0) / (batches - 1)
    return (variance / total).sqrt()


def filter_norms(objective: Objective) -> Tensor:
    """[P]: for every weight, the norm of its filter (all weights into one unit); for vectors and scalars, |entry|."""
    norms = []
    for p in objective.parameters.values():
        p = p.detach()
        rows = p.reshape(p.shape[0], -1).norm(dim=1) if p.dim() > 1 else p.abs()
        norms.append(rows.reshape(rows.shape + (1,) * (p.dim() - rows.dim())).expand_as(p))
    return objective.flatten(norms)


def layer_shares(objective: Objective, vectors: Tensor) -> list[dict[str, float]]:
    """Share of every parameter in the squared norm of each column of [P, k]."""
    sizes = [p.numel() for p in objective.parameters.values()]
    masses = torch.stack([part.square().sum(0) for part in vectors.split(sizes)])
    masses = masses / masses.sum(0)
    return [dict(zip(objective.parameters, column.tolist(), strict=True)) for column in masses.unbind(1)]


def _top(op: Operator, start: Tensor, report: Progress, phases: Phases, name: str) -> float:
    """lambda_max to 1e-3 of the norm; NaN where 100 products do not suffice."""

    def compute() -> dict[str, Any]:
        pairs = eigenpairs(
            op,
            1,
            generator=torch.Generator(),
            tol=1e-3,
            max_products=100,
            max_basis=100,
            start=start,
            progress=_phase(report, name),
        )
        return {"value": float(pairs.values[0]) if bool(pairs.converged[0]) else float("nan")}

    value: float = phases.run(name, op, compute)["value"]
    return value


def _near(v: Tensor, op: CurvatureOperator, generator: torch.Generator) -> Tensor:
    """A start vector close to a known eigenvector, with something of every other direction in it."""
    noise = random_vector(op, generator)
    start: Tensor = v + 0.3 * noise / noise.norm()
    return start


def _generator(seed: int, phase: str, index: int) -> torch.Generator:
    """An independent stream for every phase of every operator."""
    words = np.random.SeedSequence([seed, index, *phase.encode()]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def _phase(report: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: report(name, done, total)


def _trace(probe: Estimate, data_stderr: float) -> results.Trace:
    return results.Trace(probe.estimate, probe.stderr, probe.ci95, probe.probes, data_stderr)


def _density(spectral: Density | None) -> results.Density | None:
    if spectral is None:
        return None
    nodes, weights = (tuple(tuple(t.tolist()) for t in part) for part in (spectral.nodes, spectral.weights))
    return results.Density(nodes, weights, spectral.probes, spectral.steps, spectral.atoms)


@torch.no_grad()
def _accuracy(objective: Objective) -> float:
    """Share of samples whose largest output is the target class; NaN where targets are no classes."""
    right = 0
    for x, y in objective.batches:
        out = objective.outputs(x)
        if y.is_floating_point() or y.dim() != 1 or out.dim() != 2:
            return float("nan")
        right += int((out.argmax(1) == y).sum())
    return right / objective.samples


def versions() -> dict[str, str]:
    """Of everything that can change a number."""
    names: Sequence[str] = ("torch", "numpy", "scipy")
    found = {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a checkout
        found["ikun-hessian"] = importlib.metadata.version("ikun-hessian")
    return found
