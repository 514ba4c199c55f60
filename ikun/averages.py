"""What the smoothed operator takes from perturbed networks: averaged derivatives of the neurons, and their responses.

`ikun.smoothed_operator` explains the terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ikun.nodes.passes import ScanSpec, encode_spec, pass_of
from ikun.nodes.recording import NeuronCall, Recording, groups_of

SHARE = 0.5  # width of the smoothing Gaussian, relative to the standard deviation of the current
CELLS = 8  # cells of the quadrature over the shift, per draw; the cells of different draws are staggered
REACH = 3.5  # largest shift, in standard deviations of the smoothing Gaussian
FLOOR = 1e-3  # smallest standard deviation, in thresholds; without noise a neuron would have no derivative


@dataclass(frozen=True)
class CallPlan:
    """What the calls of a network's neurons are.

    Attributes:
        groups: The calls of the same neurons, in order of time.
        static: Those of `groups` with one step, or whose input depends on no spikes and is the same at all steps.
        last: The calls of the output neurons. Empty if the outputs are no mean rates of spiking neurons.
        factor: The outputs divided by the mean rates of the output neurons.
        closing: Whether the output neurons read a linear map of spikes.
    """

    groups: list[list[int]]
    static: list[list[int]]
    last: list[int]
    factor: float = 1.0
    closing: bool = False

    @staticmethod
    def of(outputs: Tensor, calls: list[NeuronCall]) -> CallPlan:
        """Find out from the recorded calls."""
        groups = groups_of(calls)
        static = [group for group in groups if _static(group, calls) and _as_recorded(group, calls)]
        last = next(group for group in groups if len(calls) - 1 in group)
        spikes = torch.cat([calls[i].y for i in last])
        if outputs.dim() != 2 or spikes.shape[1:] != outputs.shape or not _as_recorded(last, calls):
            return CallPlan(groups, static, [])
        rates, steps = spikes.mean(0), len(spikes)
        for factor in (1.0, float(steps)):
            if torch.allclose(outputs, factor * rates, rtol=1e-4, atol=1e-6):
                reads = [calls[i].readout for i in last]
                weights = {id(r.weight) for r in reads if r is not None and r.spikes}
                return CallPlan(
                    groups, static, last, factor, len(weights) == 1 and all(r is not None and r.spikes for r in reads)
                )
        return CallPlan(groups, static, [])


class Noisy:
    """Averages over the perturbed networks of one batch."""

    def __init__(self, plan: CallPlan, base: Recording) -> None:
        self.plan, self.base, self.count = plan, base, 0
        self.means = [torch.zeros_like(call.z) for call in base.calls]
        self.squares = [torch.zeros_like(mean) for mean in self.means]
        self.alone = [torch.zeros_like(share) for share in base.alone]
        self.currents: dict[int, list[Tensor]] = {group[0]: [] for group in [*plan.static, plan.last] if group}

    def add(self, seen: Recording, index: int, draws: int) -> None:
        """Add a perturbed network."""
        self.count += 1
        for i, call in enumerate(seen.calls):
            step = call.z - self.means[i]  # Welford's algorithm
            self.means[i] += step / self.count
            self.squares[i] += step * (call.z - self.means[i])
        for share, own in zip(self.alone, seen.alone, strict=True):
            share += own / draws
        for group in self.plan.groups:
            if group[0] in self.currents:
                current = torch.cat([seen.calls[i].x.flatten(1) for i in group])
                self.currents[group[0]].append(current[:1].clone() if group in self.plan.static else current)

    def fire(self, group: list[int], current: Tensor) -> Tensor:
        """Return the spikes [T, M] of the neurons of a group for other currents [T or 1, M]."""
        return fired([self.base.calls[i] for i in group], current)

    def slopes(self) -> dict[str, Tensor]:
        """Return f1_k, f2_k, c_k and c2_k [T, M] of every call k (see `averaged_slopes`)."""
        arrays: dict[str, Tensor] = {}
        for group in self.plan.groups:
            if group in self.plan.static:
                floor = floor_of(self.base.calls[group[0]])
                found = responses(partial(self.fire, group), self.currents[group[0]], floor)[:2]
                sizes = [self.base.calls[i].steps for i in group]
                for i, one, two in zip(group, *(part.split(sizes) for part in found), strict=True):
                    call = self.base.calls[i]
                    gain = call.spec.gain if call.gain is None else call.gain
                    arrays[f"f1_{i}"], arrays[f"f2_{i}"] = one / gain, two / gain**2
                    arrays[f"c_{i}"] = arrays[f"c2_{i}"] = torch.zeros_like(one)
                continue
            for i in group:
                call = self.base.calls[i]
                spread = (self.squares[i] / (self.count - 1)).sqrt().clamp_min(floor_of(call))
                slopes = averaged_slopes(call, self.means[i], spread)
                arrays.update({f"{name}_{i}": t for name, t in zip(("f1", "f2", "c", "c2"), slopes, strict=True)})
        return arrays


def fired(calls: list[NeuronCall], current: Tensor) -> Tensor:
    """Return the spikes [T, M] of neurons for other currents [T or 1, M] than those of their calls."""
    first, steps = calls[0], sum(call.steps for call in calls)
    spec = replace(first.spec, steps=steps, static=len(current) < steps)
    if first.later:
        return _delayed(current.expand(steps, -1), spec, first.later)
    start = None if first.v0 is None else first.v0.reshape(1, -1)
    found: Tensor = pass_of("spikes")(current.contiguous(), start, first.gain, encode_spec(spec))[0]
    return found


def _as_recorded(group: list[int], calls: list[NeuronCall]) -> bool:
    """Whether `fired` gives the recorded spikes of neurons, up to what rounding may change."""
    own = [calls[i] for i in group]
    current = torch.cat([call.x.expand(call.steps, *call.x.shape[1:]).flatten(1) for call in own])
    differs = fired(own, current) != torch.cat([call.y.flatten(1) for call in own])
    return float(differs.double().mean()) < 1e-3


def _static(group: list[int], calls: list[NeuronCall]) -> bool:
    """Whether there is one step, or the input of neurons depends on no spikes and is the same at all steps."""
    if sum(calls[i].steps for i in group) == 1:
        return True
    first = calls[group[0]].x[:1]
    slack = 1e-5 * float(first.abs().max())
    return all(not calls[i].behind and bool((calls[i].x - first).abs().max() <= slack) for i in group)


def floor_of(call: NeuronCall) -> float:
    return FLOOR * (call.spec.threshold or 1.0)


def averaged_slopes(call: NeuronCall, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return two derivatives of the mean spike and of the mean potential for a normally distributed h - threshold.

        E s' = N(0; mean, spread^2) h'
        E v' = (P(silent) - (threshold - v_reset) N(0; mean, spread^2)) h'

    The second derivatives are those of these two factors by the mean. The result is s', s'', v', v'' by h [T, M].

    because h = threshold where a spike appears or disappears. P(silent) is evaluated at the network's own weights. A
    detached reset is treated like one that is not detached.

    Args:
        call: The neurons.
        mean: Mean of h - threshold [T, M].
        spread: Standard deviation of h - threshold [T, M].
    """
    s = call.spec
    f1 = torch.exp(-0.5 * (mean / spread).square()) / (spread * math.sqrt(2 * math.pi))
    f2 = -mean / spread.square() * f1
    if s.reset == "soft":
        reset = s.threshold / s.decay if call.later == "subtract" and s.decay else s.threshold
        reset = 0.0 if call.later == "none" else reset
        return f1, f2, 1 - reset * f1, -reset * f2
    height = s.threshold - s.v_reset
    return f1, f2, (call.z < 0).to(f1) - height * f1, -f1 - height * f2


def _delayed(current: Tensor, spec: ScanSpec, reset: str) -> Tensor:
    """Return the spikes [T, M] of neurons that are reset at the next step: "subtract", "zero" or "none"."""
    h, s, spikes = torch.zeros_like(current[0]), torch.zeros_like(current[0]), []
    for x in current:
        before = h * (1 - s) if reset == "zero" else h
        h = spec.decay * before + spec.gain * x
        h = h - spec.threshold * s if reset == "subtract" else h
        s = (h >= spec.threshold).to(x)
        spikes.append(s)
    return torch.stack(spikes)


def shifts(draws: int, index: int) -> Iterator[tuple[float, float, float]]:
    """Yield (u, w1, w2) for the cells of one draw.

    u is a shift in standard deviations. w1 and w2 are its weights in the first and second derivative, at 0, of the mean
    over a standard normal shift. They are the integrals of -phi' and phi'' over the cell, so a function that is
    constant in each cell is integrated exactly.
    """
    width = 2 * REACH / CELLS
    first = width * ((index + 0.5) / draws - 0.5) - REACH
    edges = [first + width * (k + 0.5) for k in range(CELLS)]  # outer cells are infinite: a constant gives 0
    ones = [0.0, *(_normal(u) for u in edges), 0.0]
    twos = [0.0, *(u * _normal(u) for u in edges), 0.0]
    for k in range(CELLS + 1):
        yield first + width * k, ones[k] - ones[k + 1], twos[k] - twos[k + 1]


def _normal(u: float) -> float:
    """Return the standard normal density at u."""
    return math.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


def responses(
    fire: Callable[[Tensor], Tensor], currents: list[Tensor], floor: float = FLOOR
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate E fire(current + a) with respect to the constant a.

    Args:
        fire: Maps currents to spikes or to functions of spikes.
        currents: The currents of the draws, [T, M] or [1, M] each.
        floor: Smallest standard deviation of a current.

    Returns:
        The first derivative, the second derivative, and the width of the smoothing Gaussian [1, M].
    """
    mean = torch.stack(currents).mean(0)
    variance = sum((c - mean).square() for c in currents) / (len(currents) - 1)
    width = SHARE * cast(Tensor, variance).sqrt().mean(0, keepdim=True).clamp_min(floor)
    first = second = torch.zeros(())
    for index, current in enumerate(currents):
        shrunk = mean + math.sqrt(1 - SHARE**2) * (current - mean)
        for u, one, two in shifts(len(currents), index):
            fired = fire(shrunk + u * width)
            first, second = first + one * fired, second + two * fired
    return first / len(currents) / width, second / len(currents) / width.square(), width


def moments_of(
    rates: Callable[[Tensor], Tensor], currents: list[Tensor], mean: Tensor, floor: float = FLOOR
) -> tuple[Tensor, Tensor, Tensor]:
    """Return E r', E r'' and the second derivative of E (r - mean)^2 by a constant current, each [N, K]."""
    both, curved_rates, _ = responses(
        lambda current: torch.stack([(r := rates(current)).flatten(), (r - mean).square().flatten()]), currents, floor
    )
    return both[0].view_as(mean), curved_rates[0].view_as(mean), curved_rates[1].view_as(mean)
