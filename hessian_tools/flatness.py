"""The field's flatness metrics at one set of weights: each with its errors, its cost, and what it may be said of.

Every radius and noise scale is relative to the weights, and all draws depend on the seed and the number of parameters
alone: two checkpoints of one network meet the same noise, and their difference is known far better than either value.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hessian_tools import results
from hessian_tools.compare import CONDITIONS
from hessian_tools.data_error import GROUPS, standard_error
from hessian_tools.diagnosis import first_not_finite
from hessian_tools.flatness_curvature import PARTS, TOP, operator_metrics, relative_metrics
from hessian_tools.flatness_loss import MAIN_MEANS, OTHER_MEANS, critical_metric, mean_metrics, search_metrics
from hessian_tools.flatness_metric import FlatnessSettings as FlatnessSettings
from hessian_tools.flatness_metric import Metric as Metric
from hessian_tools.flatness_metric import Work
from hessian_tools.forward import accuracy, mean_loss, outputs_at
from hessian_tools.measure import AnalysisError, Factory, Run
from hessian_tools.objective import Objective
from hessian_tools.operators import ggn, hessian
from hessian_tools.phases import Phases
from hessian_tools.progress import Meter, Show
from hessian_tools.relative import matrices
from hessian_tools.settings import PROBES, STEPS, Settings, versions
from hessian_tools.smoothed import smoothed
from hessian_tools.trace import estimate
from hessian_tools.worst_case import SEARCHES
from hessian_tools.worst_case import STEPS as ASCENT

SCHEMA = "ikun-hessian/flatness/1"


@dataclass(frozen=True)
class Difference:
    """One checkpoint's metric less another's: ci95 over common draws, data_stderr over common samples."""

    value: float
    ci95: tuple[float, float]
    data_stderr: float


@dataclass(frozen=True)
class FlatnessResult:
    """Everything that `flatness` measured, and what it was measured on. main: the metrics that can carry a claim,
    others: the rest, both in the order of the screen."""

    schema: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    activity: dict[str, Any]
    settings: dict[str, Any]
    num_parameters: int
    parameters: dict[str, int]
    weight_norms: dict[str, float]
    loss: float
    accuracy: float
    gradient_norm: float
    dtype: str
    device: str
    seed: int
    main: dict[str, Metric]
    others: dict[str, Metric]
    seconds: float
    versions: dict[str, str]

    @property
    def metrics(self) -> dict[str, Metric]:
        return {**self.main, **self.others}


def flatness(
    objective: Objective,
    settings: FlatnessSettings | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: Show | None = None,
    phases: Phases | None = None,
) -> FlatnessResult:
    """Every flatness metric of an objective.

    provenance: the dicts checkpoint, data, network, training, activity of the result. phases: where finished metrics
    and products are kept. A metric that cannot be had has a note that says why. Raises AnalysisError for a loss that is
    not finite, ValueError for memory that does not suffice.
    """
    settings = settings or FlatnessSettings()
    began = time.perf_counter()
    run = Run(
        Settings(seed=settings.seed, memory=settings.memory),
        phases or Phases(),
        Meter(_expected(objective, settings), progress),
    )
    work = Work(objective, settings, run)
    weights = objective.weights()
    kinds: dict[str, Factory] = {
        f"smoothed {s:g}": partial(smoothed, scale=s, seed=settings.seed) for s in settings.smoothed
    }
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
        schema=SCHEMA,
        **known,
        settings=results.clean(dataclasses.asdict(settings)),
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
    """A first guess of the passes of every phase, for the progress bar."""
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


# --- several checkpoints

ALWAYS = ("timesteps", "coding", "output", "readout")  # what every metric depends on, with all of the data


def incomparable(found: Sequence[FlatnessResult]) -> str:
    """Why these results may not stand side by side at all: other data, loss, T or settings; "" where they may."""
    for part, key, meaning in CONDITIONS:
        if part == "data" or key in ALWAYS:
            values = dict.fromkeys(str(getattr(r, part).get(key)) for r in found)
            if len(values) > 1:
                return f"the {meaning} differs: {', '.join(v if len(v) <= 40 else v[:12] + '…' for v in values)}"
    for name in found[0].settings:
        if name != "memory" and any(r.settings.get(name) != found[0].settings[name] for r in found):
            return f"the setting {name} differs"
    return ""


def unlike(found: Sequence[FlatnessResult]) -> list[str]:
    """What differs in the networks such that curvatures of the surrogate are not comparable."""
    return [
        meaning
        for part, key, meaning in CONDITIONS
        if part == "network" and key not in ALWAYS and len({str(r.network.get(key)) for r in found}) > 1
    ]


def differences(first: FlatnessResult, other: FlatnessResult) -> dict[str, Difference]:
    """other - first, of every metric that is a mean over draws: the same draws and samples in both.

    Empty for networks of different sizes, which meet different noise. Raises ValueError for incomparable results.
    """
    if why := incomparable((first, other)):
        raise ValueError(f"no differences: {why}")
    found: dict[str, Difference] = {}
    if first.parameters != other.parameters:
        return found
    samples = first.data["samples"]
    parts = torch.arange(samples).tensor_split(min(GROUPS, samples))  # as in Metric.groups
    counts = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    for name, metric in first.metrics.items():
        beside = other.metrics.get(name)
        if beside is None or not (metric.pairs and beside.pairs):
            continue
        pairs = estimate(_array(beside.pairs) - _array(metric.pairs))
        groups = _array(beside.groups) - _array(metric.groups)
        data = float(standard_error(groups[:, None], counts))
        found[name] = Difference(pairs.estimate, pairs.ci95, data)
    return found


def _array(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
