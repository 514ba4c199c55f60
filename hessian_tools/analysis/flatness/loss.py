"""Flatness metrics from the true loss at other weights: means over noise, and lower bounds of worst cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hessian_tools.analysis.flatness.average_sharpness import (
    draw_losses,
    over_draws,
    pac_bayes_sigma,
)
from hessian_tools.analysis.flatness.context import Work
from hessian_tools.analysis.flatness.critical_sharpness import critical_sharpness
from hessian_tools.analysis.flatness.worst_case import WorstCase, m_sharpness, sam_sharpness, worst_case
from hessian_tools.analysis.uncertainty.sampling_error import GROUPS, withheld
from hessian_tools.operators.base import Operator
from hessian_tools.results.flatness import BOUND, MIXED, TRUE, Metric
from hessian_tools.seeding import stream


@dataclass(frozen=True)
class MeanMetric:
    """A metric that is a mean of the loss over noise draws.

    Attributes:
        name: Name of the metric.
        kind: Kind of noise.
        scale: Field of the settings that holds the noise scale.
        rise: Whether the loss at the weights is subtracted.
        meaning: Formula, with placeholders for the noise scale.
    """

    name: str
    kind: str
    scale: str
    rise: bool
    meaning: str


MAIN_MEANS = (
    MeanMetric(
        "adaptive average sharpness",
        "elementwise",
        "radius",
        True,
        "E L(w + {x:g} |w| z) - L(w), z normal: each weight disturbed by {percent} of itself",
    ),
    MeanMetric(
        "LPF, the smoothed loss",
        "filter_norm",
        "sigma",
        False,
        "E L(w + {x:g} F z), F the norm of the weight's filter: noise of {percent} of that",
    ),
)
OTHER_MEANS = (
    MeanMetric("average sharpness", "isotropic", "radius", True, "E L(w + {x:g} u z) - L(w), u the rms of all weights"),
    MeanMetric(
        "filter-normalized sharpness",
        "filter",
        "radius",
        True,
        "E L(w + {x:g} u z) - L(w), u the rms of the weight's filter",
    ),
)


def mean_metrics(work: Work, means: Sequence[MeanMetric]) -> dict[str, Metric]:
    """Compute means of the loss over noise draws.

    Args:
        work: Objective, settings, progress and stored phases.
        means: The metrics to compute.

    Returns:
        Metrics by name.
    """
    found = {}
    for mean in means:
        x: float = getattr(work.settings, mean.scale)
        meaning = mean.meaning.format(x=x, percent=f"{100 * x:g}%")
        found[mean.name] = work.measure(mean.name, partial(_over_draws, work, mean, x), TRUE, meaning)
    return found


def _over_draws(work: Work, mean: MeanMetric, radius: float, _: Operator) -> Metric:
    """Compute one mean, with its means over antithetic pairs and over groups of samples."""
    objective, settings = work.objective, work.settings
    losses, at = draw_losses(
        objective,
        radius,
        kind=mean.kind,
        draws=settings.draws,
        seed=settings.seed,
        progress=work.report(mean.name),
    )
    values = losses - at if mean.rise else losses
    found = over_draws(values)
    if not math.isfinite(found.value):
        raise ValueError(f"the loss is not finite under noise of {radius:g}: use less noise")
    order = torch.randperm(len(at), generator=stream(settings.seed))
    error, least = withheld(found.data_stderr, found.concentration)
    groups = values.mean(0)[order].tensor_split(min(GROUPS, len(at)))
    return Metric(
        found.value,
        found.stderr,
        found.ci95,
        error,
        "draws",
        forwards=settings.draws + 1,
        pairs=tuple(values.mean(1).unflatten(0, (-1, 2)).mean(1).tolist()),
        groups=tuple(float(group.mean()) for group in groups),
        data_stderr_least=least,
    )


def search_metrics(work: Work) -> dict[str, Metric]:
    """Compute PAC-Bayes sigma and lower bounds of worst cases.

    Args:
        work: Objective, settings, progress and stored phases.

    Returns:
        Metrics by name.
    """
    objective, s = work.objective, work.settings
    norm = float(objective.weights().double().norm())
    m = min(s.m, objective.samples)

    def sigma(_: Operator) -> Metric:
        passes = 0

        def report(done: int, most: int) -> None:
            nonlocal passes
            passes = done
            work.report("PAC-Bayes sigma")(done, most)

        found = pac_bayes_sigma(objective, s.drop, draws=s.draws, seed=s.seed, progress=report)
        e = found.sigma
        note = ""
        if math.isnan(e.value):
            note = "the targets are not class labels"
        elif e.value in (0, math.inf):
            size = "any noise, however small," if e.value == 0 else "no noise up to 16 times u"
            note = f"{size} costs {s.drop:.0%} accuracy"
        parts = {"1/sigma^2": found.sharpness.value}
        error, least = withheld(e.data_stderr, e.concentration)
        metric = Metric(e.value, e.stderr, e.ci95, error, "draws", note=note, parts=parts, data_stderr_least=least)
        return replace(metric, forwards=passes + 1)

    def sam(_: Operator, batches: bool) -> Metric:
        found = m_sharpness(objective, s.rho * norm, m, s.seed) if batches else sam_sharpness(objective, s.rho * norm)
        if found.without_gradient == found.batches:
            raise ValueError("the surrogate gradient is zero: there is no direction to step in")
        error, least = withheld(found.stderr, found.concentration)
        return Metric(found.value, data_stderr=error, gradients=1, forwards=2, data_stderr_least=least)

    def worst(_: Operator, kind: str, rho: float) -> Metric:
        found: WorstCase = worst_case(objective, rho, kind=kind, seed=s.seed)
        unit = 100 / (1 + found.loss) if kind == "keskar" else 1.0
        parts = {"ascent": unit * found.ascent, "search": unit * found.search}
        return Metric(found.value, gradients=found.gradients, forwards=found.forwards, parts=parts)

    asked: dict[str, tuple[Callable[[Operator], Metric], str, str]] = {
        "PAC-Bayes sigma": (
            sigma,
            TRUE,
            f"noise s u z, u the filter's rms, that costs {s.drop:.0%} accuracy",
        ),
        "epsilon-sharpness (Keskar)": (
            partial(worst, kind="keskar", rho=s.epsilon),
            BOUND,
            f"|d_i| <= {s.epsilon:g} (|w_i| + 1), in % of 1 + L",
        ),
        "SAM sharpness": (
            partial(sam, batches=False),
            BOUND,
            f"one step of {s.rho:g} ||w|| along the gradient",
        ),
        "m-sharpness": (partial(sam, batches=True), BOUND, f"SAM sharpness on batches of {m} samples, mean"),
        "adaptive worst case": (
            partial(worst, kind="adaptive", rho=s.rho),
            BOUND,
            f"relative change of the weights: {100 * s.rho:g}% (rms)",
        ),
    }
    return {name: work.measure(name, compute, valid, meaning) for name, (compute, valid, meaning) in asked.items()}


def critical_metric(work: Work, gradient: Tensor) -> dict[str, Metric]:
    """Compute the critical sharpness.

    Args:
        work: Objective, settings, progress and stored phases.
        gradient: Surrogate gradient [P].

    Returns:
        The metric by its name.
    """
    name = "critical sharpness"

    def compute(_: Operator) -> Metric:
        found = critical_sharpness(work.objective, gradient, progress=work.report(name))
        note = ""
        if math.isnan(found.value):
            note = "the surrogate gradient is zero: there is no direction to step in"
        elif not 0 < found.step < math.inf:
            note = "the smallest step (2^-23 ||w||) raises the loss" if found.step == 0 else ""
            note = note or "no step up to 16 ||w|| raises the loss"
        return Metric(found.value, ci95=found.bounds, over="search", forwards=found.passes, gradients=1, note=note)

    meaning = "2 / (smallest step along -gradient that raises L, of a grid 2^(i/4))"
    return {name: work.measure(name, compute, MIXED, meaning)}
