"""Signs of failure in a training run: dead or saturated layers, exploding or vanishing gradients, NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ikun.layer_statistics import LayerStatistics

if TYPE_CHECKING:
    from ikun.networks import Network

# Thresholds. A layer is dead (saturated) if this share of its neurons never (always) fires on the fixed batch. A
# gradient explodes or vanishes by its norm, or by the ratio of the mean squared gradients of the first and last layer.
DEAD_SHARE = 0.99
EXPLODING_NORM, VANISHING_NORM = 1e4, 1e-10
EXPLODING_RATIO, VANISHING_RATIO = 1e8, 1e-8
# Largest healthy variance of the current at initialization, in units of threshold^2. Above it, few neurons are close
# enough to the threshold for the surrogate's derivative. None of 626 runs that learned started above it, and 51 of 58
# runs that failed because of too large weights did (docs/findings.md, claim 9).
OVERDRIVEN_VARIANCE = 10.0


def failures(line: dict[str, Any], observed: tuple[LayerStatistics, ...], net: Network) -> list[str]:
    """Find the signs of failure in one epoch.

    Args:
        line: The epoch's line of the training log, with "loss" and "gradient_norm".
        observed: Statistics of every layer of spiking neurons on the fixed batch, from the first layer to the last.
        net: The network after the epoch.

    Returns:
        One text per failure, which starts with its name; an empty list for a healthy epoch.
    """
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
    """Find layers whose current is too large for their neurons at initialization.

    Args:
        layers: LayerStatistics of the layers, as dicts.
        threshold: The neurons' threshold.

    Returns:
        One text per such layer.
    """
    return [
        f"overdriven layer: {s['neuron']} ({s['name']}) starts with current variance "
        f"{s['current_variance'] / threshold**2:.3g} threshold^2"
        for s in layers
        if s["current_variance"] > OVERDRIVEN_VARIANCE * threshold**2
    ]
