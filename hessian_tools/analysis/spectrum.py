"""The main analysis: one objective in, one SpectrumResult out, every number with its error."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.analysis.context import AnalysisContext, AnalysisError, Factory, SmoothedFactory
from hessian_tools.analysis.operator_spectrum import lambda_max, measure
from hessian_tools.analysis.sample_curve import samples_curve
from hessian_tools.analysis.settings import PROBES, STEPS, SpectrumSettings
from hessian_tools.analysis.warnings import warnings_of
from hessian_tools.io.json import clean
from hessian_tools.io.versions import versions
from hessian_tools.linalg.lanczos import random_vector
from hessian_tools.nonfinite import first_not_finite
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator
from hessian_tools.operators.curvature import OPERATORS
from hessian_tools.progress import Meter, Show
from hessian_tools.results import spectrum as results
from hessian_tools.resume import Phases


def spectrum(
    objective: Objective,
    settings: SpectrumSettings | None = None,
    *,
    variants: Mapping[str, Objective] | None = None,
    relaxed: Objective | None = None,
    smoothed: SmoothedFactory | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Show | None = None,
    phases: Phases | None = None,
) -> results.SpectrumResult:
    """Eigenvalues, density and trace of an objective's curvature, with errors.

    variants: objectives with the same parameters under another convention (surrogate slope, tie rule); lambda_max of
    the first operator is measured on each. relaxed: the objective of the relaxed network, for operator `relaxed`.
    smoothed: makes operator `smoothed` (ikun.smoothed).
    provenance: the dicts checkpoint, data, network, training, activity of the result. phases: where finished phases
    and products are kept. Raises AnalysisError if an operator is not symmetric (then it is the Hessian of nothing) or
    a number is not finite, naming the layer, ValueError for settings that do not fit.
    """
    settings = settings or SpectrumSettings()
    if settings.samples_curve and max(settings.samples_curve) > objective.samples:
        raise ValueError(
            f"the samples curve goes to {max(settings.samples_curve)}: at most {objective.samples} are here"
        )
    began = time.perf_counter()
    run = AnalysisContext(settings, phases or Phases(), Meter(_expected(settings, variants or {}), progress), smoothed)
    sources: dict[str, Objective] = {}
    for name in settings.operators:
        source = relaxed if name == "relaxed" else objective
        if source is None:
            raise ValueError("operator relaxed needs the relaxed network's objective")
        if name == "smoothed" and smoothed is None:
            raise ValueError("operator smoothed needs the function that makes it: smoothed=ikun.smoothed")
        sources[name] = source
    try:
        loss, gradient = objective.value_and_gradient()
        if not (np.isfinite(loss) and torch.isfinite(gradient).all()):
            raise FloatingPointError(f"the loss ({loss}) or its gradient is not finite")
        found = _spectra(run, sources, gradient, variants or {})
    except FloatingPointError as error:
        where = first_not_finite(objective) or str(error)
        raise AnalysisError(f"{where} at these weights: the analysis stops") from None
    spectra, blocks, sensitivity = found
    curve: tuple[results.SamplePoint, ...] = ()
    if settings.samples_curve:
        name, source = next(iter(sources.items()))
        curve = samples_curve(
            source,
            settings.samples_curve,
            settings.resamples,
            operator=_factory(name, run),
            seed=settings.seed,
            memory=settings.memory * 2**30,
            run=run.phase,
        )
    known = {"checkpoint": {}, "data": {}, "network": {}, "training": {}, "activity": {}, **(provenance or {})}
    known["data"] = {**known["data"], "samples": objective.samples}
    result = results.SpectrumResult(
        schema=results.SPECTRUM_SCHEMA,
        **known,
        settings=clean(dataclasses.asdict(settings)),
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
        samples_curve=curve,
        warnings=(),
        seconds=time.perf_counter() - began + run.phases.seconds,
        versions=versions(),
    )
    return dataclasses.replace(result, warnings=warnings_of(result))


def _spectra(
    run: AnalysisContext, sources: Mapping[str, Objective], gradient: Tensor, variants: Mapping[str, Objective]
) -> tuple[dict[str, results.Spectrum], dict[str, results.Spectrum], dict[str, float]]:
    """(spectrum of every operator, of every layer's block of the first, lambda_max of its variants)."""
    spectra: dict[str, results.Spectrum] = {}
    blocks: dict[str, results.Spectrum] = {}
    sensitivity: dict[str, float] = {}
    for index, (name, source) in enumerate(sources.items()):
        slope = source.value_and_gradient()[1] if name == "relaxed" else gradient
        spectra[name], pairs = measure(run, name, source, _factory(name, run), slope, index)
        if index == 0 and run.settings.per_layer:
            parts = dict(zip(source.parameters, source.split(slope), strict=True))
            for i, (layer, part) in enumerate(layer_objectives(source).items(), 100):  # random streams of their own
                own = part.flatten([parts[name] for name in part.parameters])
                blocks[layer], _ = measure(run, f"{name} of {layer}", part, _factory(name, run), own, i)
        if index == 0 and pairs.norm > 0:
            for i, (label, variant) in enumerate(variants.items()):
                op = _factory(name, run)(variant, run.settings.memory * 2**30)
                start = _near(pairs.vectors[:, 0], op, run.generator("variant", i))
                sensitivity[label] = lambda_max(run, f"{name}: {label}", op, start)
    return spectra, blocks, sensitivity


def _factory(name: str, run: AnalysisContext) -> Factory:
    if name == "smoothed":
        assert run.smoothed is not None  # see spectrum
        return partial(run.smoothed, scale=run.settings.noise, seed=run.settings.seed)
    return OPERATORS["hessian" if name == "relaxed" else name]


def _near(v: Tensor, op: Operator, generator: torch.Generator) -> Tensor:
    """A start vector close to a known eigenvector, with something of every other direction in it."""
    noise = random_vector(op, generator)
    start: Tensor = v + 0.3 * noise / noise.norm()
    return start


def layer_objectives(objective: Objective) -> dict[str, Objective]:
    """One objective a layer (weights, biases and the like of one module), all other parameters held constant."""
    names: dict[str, list[str]] = {}
    for name in objective.parameters:
        names.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return {
        layer: dataclasses.replace(objective, parameters={name: objective.parameters[name] for name in own})
        for layer, own in names.items()
    }


def _expected(settings: SpectrumSettings, variants: Mapping[str, Objective]) -> dict[str, int]:
    """A first guess of the products of every phase, for the progress bar; each corrects its own as it runs."""
    expected: dict[str, int] = {}
    probes, steps = settings.probes or PROBES, settings.steps or STEPS
    for name in settings.operators:
        expected[f"{name}: eigenvalues"] = 20 + 5 * (settings.top + settings.smallest)
        expected[f"{name}: density"] = probes * steps if settings.density else 0
        expected[f"{name}: trace"] = max(0, settings.trace_probes - probes * settings.density)
        expected[f"{name}: scale-free"] = 25
    for label in variants:
        expected[f"{settings.operators[0]}: {label}"] = 25
    return expected


@torch.no_grad()
def _accuracy(objective: Objective) -> float:
    """Share of samples whose largest output is the target class; NaN where targets are no classes."""
    y = objective.targets[0]
    if y.is_floating_point() or y.dim() != 1 or objective.outputs(objective.first_inputs(1)).dim() != 2:
        return float("nan")
    right = torch.zeros((), dtype=torch.float64, device=objective.device)
    for (x, y), _ in objective.weighted_batches():
        right += (objective.outputs(x).argmax(1) == y).sum()
    return float(objective.summed(right)) / objective.samples
