"""Analyse the curvature of an objective: eigenvalues, spectral density and trace, each with its error."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.analysis.context import AnalysisContext, AnalysisError, Factory, SmoothedFactory
from hessian_tools.analysis.flatness.average_sharpness import average_sharpness
from hessian_tools.analysis.flatness.settings import RADIUS
from hessian_tools.analysis.operator_spectrum.eigenvalues import lambda_max
from hessian_tools.analysis.operator_spectrum.exact_ggn import exact_by_default
from hessian_tools.analysis.operator_spectrum.measure import measure
from hessian_tools.analysis.operator_spectrum.measured_diagonal import measured_diagonal
from hessian_tools.analysis.operator_spectrum.step_traces import step_forms, step_traces
from hessian_tools.analysis.planning.estimate import estimate_time, measure_costs
from hessian_tools.analysis.planning.time_budget import fit
from hessian_tools.analysis.settings import STEPS, SpectrumSettings
from hessian_tools.analysis.uncertainty.sample_curve import samples_curve
from hessian_tools.analysis.uncertainty.sampling_error import withheld
from hessian_tools.analysis.uncertainty.tolerance import tolerance
from hessian_tools.analysis.warnings import warnings_of
from hessian_tools.evaluation import differentiable
from hessian_tools.io.errors import ObjectiveError
from hessian_tools.io.json import clean
from hessian_tools.io.versions import versions
from hessian_tools.linalg.lanczos import random_vector
from hessian_tools.linalg.spectral_density import default_probes
from hessian_tools.nonfinite import first_not_finite
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator
from hessian_tools.operators.curvature import OPERATORS
from hessian_tools.perturbation import class_count, count_correct
from hessian_tools.progress import Meter, Show
from hessian_tools.results.operator_spectrum import Spectrum
from hessian_tools.results.spectrum import SPECTRUM_SCHEMA, LossRise, SamplePoint, SpectrumResult, StepTrace
from hessian_tools.results.spectrum_rows import layer_of
from hessian_tools.resume import Phases


@differentiable
def spectrum(
    objective: Objective,
    settings: SpectrumSettings | None = None,
    *,
    variants: Mapping[str, Objective] | None = None,
    relaxed: Objective | None = None,
    smoothed: SmoothedFactory | None = None,
    over_time: Objective | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Show | None = None,
    phases: Phases | None = None,
) -> SpectrumResult:
    """Compute eigenvalues, spectral density and trace of the curvature of an objective, with errors.

    Args:
        objective: The loss, its data and its weights.
        settings: Settings of the analysis.
        variants: Objectives with the same parameters under another convention (slope of the surrogate, tie rule), by
            label. lambda_max of the first operator is computed for each.
        relaxed: Objective of the relaxed network, for the operator `relaxed`.
        smoothed: Function that makes the operator `smoothed` (`ikun.smoothed`).
        over_time: For the traces per time step, the objective with outputs over time [N, T, ...] and a loss that is a
            mean over steps (`hessian_tools.analysis.operator_spectrum.step_traces`).
        provenance: The dicts `checkpoint`, `data`, `network`, `training` and `activity` of the result.
        progress: Progress callback.
        phases: Storage of finished phases and products, to resume an interrupted run.

    Returns:
        The spectra, with the conditions under which they were measured.

    Raises:
        AnalysisError: If an operator is not symmetric, or if a number is not finite. The message names the operator or
            the layer.
        ValueError: If the settings do not fit the objective, an argument that an operator needs is missing, or the
            memory does not suffice.
    """
    settings = settings or SpectrumSettings()
    if settings.samples_curve and max(settings.samples_curve) > objective.samples:
        raise ValueError(
            f"samples_curve needs {max(settings.samples_curve)} samples, but the objective has {objective.samples}"
        )
    if settings.per_step and over_time is None:
        raise ValueError("per_step needs the objective with outputs over time: set over_time")
    began, weights = time.perf_counter(), objective.weights()
    phases, cuts, asked = phases or Phases(), [], dataclasses.asdict(settings)
    if settings.time is not None:
        fitted = phases.keep("cut to the time", partial(_fitted, objective, settings, variants or {}))
        settings, cuts = SpectrumSettings(**fitted["settings"]), fitted["cuts"]
        variants = variants if fitted["variants"] else None
    meter = Meter(planned_products(settings, variants or (), objective.size), progress)
    run = AnalysisContext(settings, phases, meter, smoothed)
    sources: dict[str, Objective] = {}
    for name in settings.operators:
        source = relaxed if name == "relaxed" else objective
        if source is None:
            raise ValueError("operator relaxed needs the objective of the relaxed network: set relaxed")
        if name == "smoothed" and smoothed is None:
            raise ValueError("operator smoothed needs the function that makes it: set smoothed=ikun.smoothed")
        sources[name] = source
    try:
        loss, gradient = objective.value_and_gradient()
        if not (np.isfinite(loss) and torch.isfinite(gradient).all()):
            raise FloatingPointError(f"the loss ({loss}) or its gradient is not finite")
        found = _spectra(run, sources, gradient, variants or {})
        steps = _steps(run, over_time) if settings.per_step and over_time is not None else ()
    except FloatingPointError as error:
        where = first_not_finite(objective) or str(error)
        raise AnalysisError(f"{where} at these weights: the analysis stops") from None
    spectra, blocks, sensitivity = found
    curve: tuple[SamplePoint, ...] = ()
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
    labels = [class_count(y) for y in objective.targets]
    if classes := max((n for n in labels if n is not None), default=None):
        known["data"]["classes"] = classes
    result = SpectrumResult(
        schema=SPECTRUM_SCHEMA,
        **known,
        settings=clean(_recorded(settings, cuts, asked)),
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
        loss_rise=_loss_rise(objective, run),
        steps=steps,
        warnings=(),
        seconds=time.perf_counter() - began + run.phases.seconds,
        versions=versions(),
    )
    if not torch.equal(weights, objective.weights()):
        raise ObjectiveError("a forward pass changes the network's parameters: a Hessian needs fixed weights")
    return dataclasses.replace(result, warnings=warnings_of(result))


def _fitted(objective: Objective, settings: SpectrumSettings, variants: Mapping[str, Objective]) -> dict[str, Any]:
    """Return what of an analysis fits its time, as plain values."""
    limit = settings.time
    assert limit is not None
    if "ggn" in settings.operators and exact_by_default(objective, settings):
        settings = dataclasses.replace(settings, exact=True)  # not by fewer probes, which would take longer
    costs = measure_costs(objective, settings)

    def seconds(chosen: SpectrumSettings, with_variants: bool) -> float:
        expected = planned_products(chosen, variants if with_variants else (), objective.size)
        return estimate_time(objective, chosen, expected, costs).seconds

    found = fit(settings, limit, seconds)
    return {"settings": dataclasses.asdict(found.settings), "variants": found.variants, "cuts": list(found.cuts)}


def _recorded(settings: SpectrumSettings, cuts: list[str], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as a result keeps them: those that were used, what was left out, and what was asked for there."""
    used = dataclasses.asdict(settings)
    changed = {name: value for name, value in asked.items() if value != used[name]}
    return {**used, "cuts": cuts, "asked": changed} if cuts else used


def _loss_rise(objective: Objective, run: AnalysisContext) -> LossRise | None:
    """Return how much weight noise raises the loss itself; None if that was not asked for or does not exist."""
    if not run.settings.draws:
        return None
    name = "loss under weight noise"
    report = run.meter.phase(name)
    try:
        found = average_sharpness(
            objective,
            RADIUS,
            kind="elementwise",
            draws=run.settings.draws,
            seed=run.settings.seed,
            progress=lambda done, most: report(done, most, float("nan")),
        )
    except ValueError:  # all weights are zero, or targets that are not of one shape
        return None
    finally:
        run.meter.finish(name, run.settings.draws)
    if not np.isfinite(found.value):
        return None
    error, least = withheld(found.data_stderr, found.concentration)
    return LossRise(found.value, found.stderr, error, RADIUS, found.draws, least)


def _spectra(
    run: AnalysisContext, sources: Mapping[str, Objective], gradient: Tensor, variants: Mapping[str, Objective]
) -> tuple[dict[str, Spectrum], dict[str, Spectrum], dict[str, float]]:
    """Return the spectrum of every operator, that of every layer block of the first, and lambda_max of its variants."""
    spectra: dict[str, Spectrum] = {}
    blocks: dict[str, Spectrum] = {}
    sensitivity: dict[str, float] = {}
    for index, (name, source) in enumerate(sources.items()):
        slope = source.value_and_gradient()[1] if name == "relaxed" else gradient
        spectra[name], pairs = measure(run, name, source, _factory(name, run), slope, index)
        if run.settings.diagonal:
            found = measured_diagonal(run, name, source, _factory(name, run), pairs, index)
            spectra[name] = dataclasses.replace(spectra[name], diagonal=found)
        if index == 0 and run.settings.per_layer:
            parts = dict(zip(source.parameters, source.split(slope), strict=True))
            for i, (layer, part) in enumerate(layer_objectives(source).items(), 100):  # own random streams
                own = part.flatten([parts[name] for name in part.parameters])
                blocks[layer], _ = measure(run, f"{name} of {layer}", part, _factory(name, run), own, i)
        if index == 0 and pairs.norm > 0:
            e = spectra[name].eigenvalues[0]
            error = e.data_stderr if np.isfinite(e.data_stderr) else e.data_stderr_least
            tol = 1e-3 if run.settings.tol else tolerance(error, e.value, 1e-3)
            for i, (label, variant) in enumerate(variants.items()):
                op = _factory(name, run)(variant, run.settings.memory * 2**30)
                start = _near(pairs.vectors[:, 0], op, run.generator("variant", i))
                sensitivity[label] = lambda_max(run, f"{name}: {label}", op, start, tol)
        del pairs  # up to gigabytes, which the next operator needs
    return spectra, blocks, sensitivity


def _steps(run: AnalysisContext, over_time: Objective) -> tuple[StepTrace, ...]:
    """Return the trace of the GGN of every time step."""
    name = "traces per step"
    step, random = run.meter.phase(name), run.generator(name, 0)
    found = run.phases.keep(name, lambda: step_forms(over_time, run.settings.trace_probes, random, step))
    return step_traces(found)


def _factory(name: str, run: AnalysisContext) -> Factory:
    """Return the function that makes an operator."""
    if name == "smoothed":
        assert run.smoothed is not None  # checked in `spectrum`
        return partial(run.smoothed, scale=run.settings.noise, seed=run.settings.seed)
    return OPERATORS["hessian" if name == "relaxed" else name]


def _near(v: Tensor, op: Operator, generator: torch.Generator) -> Tensor:
    """Return a start vector close to a known eigenvector, with components in all other directions."""
    noise = random_vector(op, generator)
    start: Tensor = v + 0.3 * noise / noise.norm()
    return start


def layer_objectives(objective: Objective) -> dict[str, Objective]:
    """Return one objective per layer (the parameters of one module), with all other parameters held constant."""
    names: dict[str, list[str]] = {}
    for name in objective.parameters:
        names.setdefault(layer_of(name), []).append(name)
    return {
        layer: dataclasses.replace(objective, parameters={name: objective.parameters[name] for name in own})
        for layer, own in names.items()
    }


def planned_products(settings: SpectrumSettings, variants: Iterable[str], size: int) -> dict[str, int]:
    """Estimate the products of every phase. For the progress bar, each phase corrects its own estimate as it runs.

    Args:
        settings: Settings of the analysis.
        variants: Labels of the variants.
        size: Number P of parameters.
    """
    expected: dict[str, int] = {}
    probes, steps = settings.probes or default_probes(size), settings.steps or STEPS // 2
    for name in settings.operators:
        expected[f"{name}: eigenvalues"] = 20 + 5 * (settings.top + settings.smallest)
        expected[f"{name}: density"] = probes * steps if settings.density else 0
        expected[f"{name}: trace"] = max(0, settings.trace_probes - probes * settings.density)
        expected[f"{name}: scale-free"] = 25
        expected[f"{name}: scale-free ranks"] = 20 + 5 * settings.scaled if settings.scaled > 1 else 0
        expected[f"{name}: diagonal"] = settings.diagonal_probes if settings.diagonal else 0
    for label in variants:
        expected[f"{settings.operators[0]}: {label}"] = 25
    expected["loss under weight noise"] = settings.draws
    return expected


@torch.no_grad()
def _accuracy(objective: Objective) -> float:
    """Return the fraction of samples that are classified correctly; NaN if the targets are not class labels."""
    right = torch.zeros((), dtype=torch.float64, device=objective.device)
    for (x, y), _ in objective.weighted_batches():
        found = count_correct(objective.outputs(x), y)
        if found is None:
            right += torch.nan  # on every process, so that all of them reach the sum
        else:
            right += found
    return float(objective.summed(right)) / objective.samples
