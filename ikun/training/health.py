"""Failure signatures of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ikun.layer_statistics import LayerStatistics

if TYPE_CHECKING:
    from ikun.networks import Network

# What counts as a failure. A layer is dead (saturated) when this share of its neurons never (always) fires on the
# fixed batch; a gradient explodes or vanishes by its norm, or by the ratio of mean squares of first and last layer.
DEAD_SHARE = 0.99
EXPLODING_NORM, VANISHING_NORM = 1e4, 1e-10
EXPLODING_RATIO, VANISHING_RATIO = 1e8, 1e-8
# Variance of the current at initialization, in thresholds^2: few neurons are then within the surrogate's reach. Of 626
# runs that learned none began above it, of 58 that failed from too large weights 51 did (docs/findings.md, claim 9).
OVERDRIVEN_VARIANCE = 10.0


def failures(line: dict[str, Any], observed: tuple[LayerStatistics, ...], net: Network) -> list[str]:
    """The failures that an epoch shows, by name; [] for a healthy one."""
    found = []
    for name, p in net.named_parameters():
        if not bool(torch.isfinite(p).all()):
            found.append(f"NaN: {name.removeprefix('layers.')} is not finite")
    if not math.isfinite(line["loss"]) and not found:
        found.append("NaN: the loss is not finite")
    if found:
        return found
    for s in observed:
        if s.dead >= DEAD_SHARE:
            found.append(f"dead layer: {s.dead:.0%} of {s.neuron} ({s.name}) never fires")
        if s.saturated >= DEAD_SHARE:
            found.append(f"saturated layer: {s.saturated:.0%} of {s.neuron} ({s.name}) always fires")
    first, last = observed[0].gradient_square, observed[-1].gradient_square
    ratio = first / last if last > 0 else math.nan
    if line["gradient_norm"] > EXPLODING_NORM or ratio > EXPLODING_RATIO:
        found.append(f"exploding gradient: norm {line['gradient_norm']:.1e}, first to last layer {ratio:.1e}")
    if line["gradient_norm"] < VANISHING_NORM or ratio < VANISHING_RATIO:
        found.append(f"vanishing gradient: norm {line['gradient_norm']:.1e}, first to last layer {ratio:.1e}")
    return found


def overdriven(layers: Sequence[Mapping[str, Any]], threshold: float) -> list[str]:
    """The layers whose current is too large for their neurons at initialization, by name. layers: LayerStatistics as
    dicts."""
    return [
        f"overdriven layer: {s['neuron']} ({s['name']}) starts with current variance "
        f"{s['current_variance'] / threshold**2:.3g} threshold^2"
        for s in layers
        if s["current_variance"] > OVERDRIVEN_VARIANCE * threshold**2
    ]
