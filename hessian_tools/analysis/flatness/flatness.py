"""Compute standard flatness metrics for one checkpoint, each with errors, cost, and the loss that it describes.

Radii and noise scales are relative to the weights. The random numbers depend only on the seed and on the number of
parameters. Two checkpoints of one network therefore get the same noise, and the difference of their metrics has a much
smaller error than either metric.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from hessian_tools.analysis.context import AnalysisContext, AnalysisError, Factory, SmoothedFactory
from hessian_tools.analysis.flatness.context import Work
from hessian_tools.analysis.flatness.curvature import PARTS, TOP, operator_metrics, relative_metrics
from hessian_tools.analysis.flatness.loss import MAIN_MEANS, OTHER_MEANS, critical_metric, mean_metrics, search_metrics
from hessian_tools.analysis.flatness.relative import matrices
from hessian_tools.analysis.flatness.settings import FlatnessSettings
from hessian_tools.analysis.flatness.worst_case import SEARCHES
from hessian_tools.analysis.flatness.worst_case import STEPS as ASCENT
from hessian_tools.analysis.settings import PROBES, STEPS, SpectrumSettings
from hessian_tools.evaluation import differentiable
from hessian_tools.io.json import clean
from hessian_tools.io.versions import versions
from hessian_tools.nonfinite import first_not_finite
from hessian_tools.objective import Objective
from hessian_tools.operators.curvature import ggn, hessian
from hessian_tools.perturbation import accuracy, mean_loss, outputs_at
from hessian_tools.progress import Meter, Show
from hessian_tools.results.flatness import FLATNESS_SCHEMA, FlatnessResult
from hessian_tools.results.flatness import Metric as Metric
from hessian_tools.resume import Phases


@differentiable
def flatness(
    objective: Objective,
    settings: FlatnessSettings | None = None,
    *,
    smoothed: SmoothedFactory | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Show | None = None,
    phases: Phases | None = None,
) -> FlatnessResult:
    """Compute all flatness metrics of an objective.

    Args:
        objective: The loss, its data and its weights.
        settings: Settings of the analysis.
        smoothed: Function that makes the operator `smoothed` (`ikun.smoothed`).
        provenance: The dicts `checkpoint`, `data`, `network`, `training` and `activity` of the result.
        progress: Progress callback.
        phases: Storage of finished metrics and products, to resume an interrupted run.

    Returns:
        The metrics. A metric that cannot be computed has a note with the reason.

    Raises:
        AnalysisError: If the loss is not finite.
        ValueError: If the memory does not suffice, or if `smoothed` is missing although the settings ask for it.
    """
    settings = settings or FlatnessSettings()
    if settings.smoothed and smoothed is None:
        raise ValueError("operator smoothed needs the function that makes it: set smoothed=ikun.smoothed")
    began = time.perf_counter()
    run = AnalysisContext(
        SpectrumSettings(seed=settings.seed, memory=settings.memory),
        phases or Phases(),
        Meter(_expected(objective, settings), progress),
    )
    work = Work(objective, settings, run)
    weights = objective.weights()
    kinds: dict[str, Factory] = {}
    if smoothed is not None:
        kinds = {f"smoothed {s:g}": partial(smoothed, scale=s, seed=settings.seed) for s in settings.smoothed}
    matched = list(kinds)
    kinds |= {"ggn": ggn, "hessian": hessian}
    (outputs,) = outputs_at(objective, lambda _: weights, [0])
    loss, (_, gradient) = mean_loss(objective, outputs), objective.value_and_gradient()
    if not math.isfinite(loss):
        where = first_not_finite(objective) or f"the loss is {loss}"
        raise AnalysisError(f"{where} at these weights: the analysis stops")
    found = {name: operator_metrics(work, name, factory) for name, factory in kinds.items()}
    main = {f"{name} {part}": found[name][part] for name in matched for part in PARTS}
    for parts in (PARTS[:2], PARTS[2:]):
        main |= {f"{name} {part}": found[name][part] for name in ("ggn", "hessian") for part in parts}
    main |= mean_metrics(work, MAIN_MEANS)
    rest = {name: [part for part in found[name] if part not in PARTS] for name in ("ggn", "hessian")}
    others = {f"{name} {part}": found[name][part] for name, parts in rest.items() for part in parts}
    others |= mean_metrics(work, OTHER_MEANS)
    others |= search_metrics(work)
    others |= relative_metrics(work)
    others |= critical_metric(work, gradient)
    known = {"checkpoint": {}, "data": {}, "network": {}, "training": {}, "activity": {}, **(provenance or {})}
    known["data"] = {**known["data"], "samples": objective.samples}
    return FlatnessResult(
        schema=FLATNESS_SCHEMA,
        **known,
        settings=clean(dataclasses.asdict(settings)),
        num_parameters=objective.size,
        parameters={name: p.numel() for name, p in objective.parameters.items()},
        weight_norms={name: float(p.detach().double().norm()) for name, p in objective.parameters.items()},
        loss=loss,
        accuracy=accuracy(objective, outputs),
        gradient_norm=float(gradient.norm()),
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        seed=settings.seed,
        main=main,
        others=others,
        seconds=time.perf_counter() - began + run.phases.seconds,
        versions=versions(),
    )


def _expected(objective: Objective, settings: FlatnessSettings) -> dict[str, int]:
    """Estimate the passes of every phase, for the progress bar."""
    expected: dict[str, int] = {}
    for name in (*(f"smoothed {s:g}" for s in settings.smoothed), "ggn", "hessian"):
        for kind in ("", " scaled"):
            expected[f"{name}{kind}: eigenvalues"] = 70 if name == "hessian" else 40
            expected[f"{name}{kind}: error from the data"] = TOP + 4
            expected[f"{name}{kind}: trace"] = settings.probes
    expected["ggn: density"] = PROBES * STEPS
    expected |= {mean.name: settings.draws + 1 for mean in (*MAIN_MEANS, *OTHER_MEANS)}
    expected["PAC-Bayes sigma"] = 11 * settings.draws
    expected |= dict.fromkeys(("epsilon-sharpness (Keskar)", "adaptive worst case"), ASCENT + SEARCHES + 3)
    expected |= {f"relative flatness {layer}": 50 for layer in matrices(objective)}
    return expected
