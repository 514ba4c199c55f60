"""Every measure of one network that may tell how well it generalizes. All are oriented so that more means sharper."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ikun_hessian.experiments.generalization.settings import GeneralizationSettings

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from hessian_tools.linalg.lanczos import Eigenpairs
    from hessian_tools.objective import Objective
    from hessian_tools.operators.base import Operator

PRIMARY = "PAC-Bayes sharpness"
SPIKING, SURROGATE, CONTROL = "spiking loss", "surrogate curvature", "control"
TOL, SEED = 1e-3, 0  # relative tolerance of eigenvalues; seed of all draws, the same for all networks
_MEMORY = 2**28  # bytes for the kept values of an operator
RHO, STEPS, SEARCHES = 0.01, 10, 50  # radius relative to the weights, gradients and forward passes of the worst case


@dataclass(frozen=True)
class SharpnessMeasure:
    """A measure.

    Attributes:
        name: Its name.
        group: What it describes: SPIKING, SURROGATE or CONTROL.
        short: Its name in figures.
    """

    name: str
    group: str
    short: str


def _curvature(operator: str, group: str, short: str) -> list[SharpnessMeasure]:
    parts = (("lambda_max", "$\\lambda_{max}$"), ("trace", "trace"))
    return [
        SharpnessMeasure(f"{operator} {part}{scaled}", group, f"{short} {symbol}{scaled}")
        for scaled in ("", " scaled")
        for part, symbol in parts
    ]


MEASURES = (
    SharpnessMeasure(PRIMARY, SPIKING, "PAC-Bayes $1/\\sigma^2$"),
    SharpnessMeasure("adaptive average sharpness", SPIKING, "adaptive average"),
    SharpnessMeasure("LPF", SPIKING, "LPF"),
    SharpnessMeasure("SAM sharpness", SPIKING, "SAM"),
    SharpnessMeasure("adaptive worst case", SPIKING, "adaptive worst case"),
    SharpnessMeasure("critical sharpness", SPIKING, "critical sharpness"),
    *_curvature("smoothed", SPIKING, "smoothed"),
    SharpnessMeasure("true trace scaled", SPIKING, "true trace scaled"),
    SharpnessMeasure("true along GGN", SPIKING, "true along GGN"),
    SharpnessMeasure("true along GGN scaled", SPIKING, "true along GGN scaled"),
    *_curvature("ggn", SURROGATE, "GGN"),
    *_curvature("hessian", SURROGATE, "Hessian"),
    SharpnessMeasure("Fisher-Rao norm", SURROGATE, "Fisher-Rao"),
    SharpnessMeasure("relative flatness", SURROGATE, "relative flatness"),
    SharpnessMeasure("training loss", CONTROL, "training loss"),
    SharpnessMeasure("learning rate", CONTROL, "learning rate"),
    SharpnessMeasure("weight norm", CONTROL, "weight norm"),
    SharpnessMeasure("distance from initialization", CONTROL, "distance from start"),
    SharpnessMeasure("random number", CONTROL, "random number"),
)
NAMES = tuple(m.name for m in MEASURES)


def measured_sharpness(
    objective: Objective, settings: GeneralizationSettings, *, true: bool = True
) -> dict[str, float]:
    """Compute all measures but the controls.

    PAC-Bayes sharpness is 1 / sigma^2, where sigma is the weight noise, relative to the root mean square of each
    filter, that costs 10% accuracy (`hessian_tools.pac_bayes_sigma`). "Scaled" curvature is that of D A D with D the
    norm of each weight's filter; for "true trace scaled" D is its root mean square. "true" is the smoothed loss's own
    curvature, "along GGN" that along the first eigenvector u of the GGN, or along D u for the first eigenvector of the
    scaled GGN. Relative flatness is the sum over all layers. The others are those of `hessian_tools.flatness`.

    Args:
        objective: The loss, its data and its weights.
        settings: Numbers of samples, draws and probes.
        true: Whether to measure the smoothed loss's own curvature too, which takes a third of the time.

    Returns:
        Measures by name; NaN where a measure does not exist for this network.
    """
    import hessian_tools as ht

    w, scale = objective.weights(), ht.filter_norms(objective)
    found: dict[str, float] = {}
    tops: dict[str, Tensor] = {}
    for name, op in _operators(objective, settings.noise).items():
        for kind, of in ((" scaled", ht.scaled(op, scale)), ("", op)):
            try:
                pairs = _first(of)
                trace = ht.trace(of, probes=settings.probes, generator=_generator(1), deflate=pairs).estimate
            except (ValueError, FloatingPointError):  # not finite, or a network without this operator
                continue
            found |= {f"{name} lambda_max{kind}": float(pairs.values[0]), f"{name} trace{kind}": trace}
            tops |= {f"{name}{kind}": pairs.vectors[:, 0]}
    draws: dict[str, Any] = {"draws": settings.draws, "seed": SEED}
    length = float(w.norm())
    hessian = ht.hessian(objective, _MEMORY)
    values: dict[str, Callable[[], float]] = {
        PRIMARY: lambda: ht.pac_bayes_sigma(objective, **draws).sharpness.value,
        "adaptive average sharpness": lambda: ht.average_sharpness(objective, kind="elementwise", **draws).value,
        "LPF": lambda: ht.smoothed_loss(objective, **draws).value,
        "SAM sharpness": lambda: ht.sam_sharpness(objective, RHO * length).value,
        "adaptive worst case": lambda: ht.worst_case(objective, RHO, steps=STEPS, searches=SEARCHES, seed=SEED).value,
        "critical sharpness": lambda: ht.critical_sharpness(objective, objective.value_and_gradient()[1]).value,
        "Fisher-Rao norm": lambda: ht.fisher_rao(ht.fisher(objective, 0), w),
        "relative flatness": lambda: sum(
            ht.relative_flatness(hessian, objective, name, probes=10, deflate=4, seed=SEED).estimate
            for name, p in objective.parameters.items()
            if p.dim() > 1
        ),
    }
    if true and settings.observations:
        few: dict[str, Any] = {"observations": settings.observations, "seed": SEED + 1}
        values["true trace scaled"] = lambda: ht.true_trace(objective, settings.noise, **few).value
        if "ggn" in tops:
            along = {"": tops["ggn"], " scaled": tops["ggn scaled"] * scale.double()}
            for kind, v in along.items():
                values[f"true along GGN{kind}"] = partial(_along, objective, v, settings.noise, few)
    for name, compute in values.items():
        try:
            found[name] = float(compute())
        except (ValueError, FloatingPointError):
            found[name] = math.nan
    return {name: value if math.isfinite(value) else math.nan for name, value in found.items()}


def _operators(objective: Objective, noise: float) -> dict[str, Operator]:
    import hessian_tools as ht
    from ikun.smoothed_operator import smoothed

    return {
        "ggn": ht.ggn(objective, _MEMORY),
        "hessian": ht.hessian(objective, _MEMORY),
        "smoothed": smoothed(objective, _MEMORY, scale=noise, seed=SEED),
    }


def _first(op: Operator) -> Eigenpairs:
    import hessian_tools as ht

    return ht.eigenpairs(op, 1, 0, generator=_generator(0), tol=TOL, max_products=200)


def _generator(stream: int) -> Generator:
    import torch

    return torch.Generator().manual_seed(stream)


def _along(objective: Objective, v: Tensor, noise: float, few: dict[str, Any]) -> float:
    """Return the curvature of the smoothed loss along one direction [P]."""
    import hessian_tools as ht

    return ht.true_forms(objective, v, noise, **few)[0].value
