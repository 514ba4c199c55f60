"""Balance the forward and the backward gain of every layer, measured on a batch.

Let v_l be the variance of the input current of the neurons of layer l, and q_l the squared norm of a gradient with
respect to this current. The forward gain of layer l is F_l = v_l / v_(l-1), the backward gain is B_l = q_(l-1) / q_l.
Both are proportional to Var W_l. Without a norm, for a chain of dense layers with fan in fi,

    F_l = fi Var W_l E[x^2] / v_(l-1),    B_l = fi Var W_l M_(l-1),

where x is the layer's input and M_(l-1) is the mean square of the gradient that passes through the neurons before it:
E[f'(h - threshold)^2] for a single time step, and more with a membrane that integrates over time. F_l = 1 and B_l = 1
are two conditions for one variance. The rule takes the variance for which F_l B_l = 1, the geometric mean of both:

    Var W_l = sqrt(v_(l-1) / (E[x^2] M_(l-1))) / fi.

The products F_2 ... F_L and B_2 ... B_L over all layers are then reciprocal to each other. In a deep chain v_l tends to
the value at which both conditions hold, E[x^2] = v M. The first layer has v_1 = (threshold - rest)^2.

Source: the two conditions are those of Glorot & Bengio 2010 and He et al. 2015, here with the surrogate derivative in
the backward pass. That both hold at one variance of the current corresponds to the critical initialization of
Schoenholz et al. 2017 (arXiv 1611.01232). The combination, and its measurement through all time steps, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from ikun.initializers.probe import Arguments, Probe, Stage, entering, evaluating, forward
from ikun.initializers.rules import Solution, normal
from ikun.layer_statistics import batch_norm_by_batch, fans
from ikun.neurons import Neuron

TOLERANCE = 0.1  # of log(F B); single spikes flip from sweep to sweep, so that less is not always reached
SWEEPS = 30


@dataclass(frozen=True)
class Gains:
    """What one forward and one backward pass measure at the neurons of every layer.

    Attributes:
        variances: v, the variance of the input current over time steps, samples and units.
        gradients: q, the squared norm of the gradient with respect to the input current.
    """

    variances: tuple[float, ...]
    gradients: tuple[float, ...]

    @property
    def forward(self) -> tuple[float, ...]:
        """F of the second layer, the third, and so on."""
        return tuple(b / a for a, b in zip(self.variances, self.variances[1:], strict=False))

    @property
    def backward(self) -> tuple[float, ...]:
        """B of the second layer, the third, and so on."""
        return tuple(a / b for a, b in zip(self.gradients, self.gradients[1:], strict=False))


def two_sided(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Scale normal weights so that the forward and the backward gain of every layer multiply to 1.

    The layers are first scaled one by one to a current of variance (threshold - rest)^2. Then all layers but the first
    are rescaled together, by half a step in the logarithm, until |log(F B)| < TOLERANCE in every layer, at most SWEEPS
    times. Layers before a norm, whose scale changes neither gain, get the variance 1 / fi.

    Args:
        probe: The module and the batch.
        generator: Source of random numbers.

    Returns:
        The solutions of the layers. A layer has converged if |log(F B)| < TOLERANCE.

    Raises:
        ValueError: If a layer is recurrent, or a current does not vary, or a gradient is zero or not finite.
    """
    groups = probe.groups()
    for s in (s for group in groups for s in group if s.recurrent):
        raise ValueError(f"the two_sided rule has no solution for the recurrent layer {s.name}: choose gradient_stable")
    for group in groups:
        draw_unit_current(probe, group, generator)
    start = generator.get_state()
    passes, errors = 0, [0.0] * len(groups)
    for passes in range(SWEEPS + 1):
        generator.set_state(start)  # the same gradient at the last layer in every sweep
        gains = measure_gains(probe, groups, generator)
        products = (f * b for f, b in zip(gains.forward, gains.backward, strict=True))
        errors = [0.0, *(math.log(p) for p in products)]
        errors = [0.0 if _normed(group) else e for group, e in zip(groups, errors, strict=True)]
        if passes == SWEEPS or all(abs(e) < TOLERANCE for e in errors):
            break
        for group, e in zip(groups, errors, strict=True):
            _scale(group, math.exp(-e / 4))  # F B is proportional to the square of the variance
    return [
        Solution(s.name, float(s.weights.weight.double().square().mean()), nan, nan, passes, abs(e) < TOLERANCE)
        for group, e in zip(groups, errors, strict=True)
        for s in group
    ]


def measure_gains(probe: Probe, groups: Sequence[Sequence[Stage]], generator: torch.Generator) -> Gains:
    """Measure variances and gradients at the neurons of every layer, with one forward and one backward pass.

    The gradient at the current of the last layer is standard normal for every sample and unit, and constant over time,
    as that of a loss of mean firing rates.

    Args:
        probe: The module and the batch.
        groups: Stages that feed the same neurons, in order (see `Probe.groups`).
        generator: Source of the gradient.

    Returns:
        The measurement.

    Raises:
        ValueError: If a current does not vary, or a gradient is zero or not finite.
    """
    currents: list[list[Tensor]] = [[] for _ in groups]

    def keep(into: list[Tensor], tensor: Tensor) -> None:
        if tensor.requires_grad:
            tensor.retain_grad()
        into.append(tensor)

    with ExitStack() as stack:
        for group, into in zip(groups, currents, strict=True):
            neuron = group[0].neuron
            if neuron is not None:

                def enter(_: object, given: Arguments, named: dict[str, Tensor], into: list[Tensor] = into) -> None:
                    keep(into, entering(given, named))

                handle = neuron.register_forward_pre_hook(enter, with_kwargs=True)
            else:

                def leave(_: object, given: Arguments, output: Tensor, into: list[Tensor] = into) -> None:
                    keep(into, output)

                handle = (group[0].norm or group[0].weights).register_forward_hook(leave)
            stack.callback(handle.remove)
        stack.enter_context(evaluating(probe.module))
        for s in probe.stages:
            if s.neuron is not None:
                s.neuron.train()  # SpikingJelly's neurons have no surrogate gradient in evaluation mode
        stack.enter_context(batch_norm_by_batch(probe.module))
        stack.enter_context(torch.enable_grad())
        assert probe.x is not None
        probe.passes += 1
        forward(probe.module, probe.x)
        for group, seen in zip(groups, currents, strict=True):
            if not seen:
                raise ValueError(f"the forward pass does not call layer {group[0].name} and its neurons")
        last = currents[-1]
        neuron = groups[-1][0].neuron
        whole = isinstance(neuron, Neuron) or getattr(neuron, "step_mode", "s") == "m"  # one call for all steps
        shape = last[0].shape[1:] if whole else last[0].shape
        u = torch.randn(shape, generator=generator, dtype=last[0].dtype).to(last[0].device)
        torch.autograd.backward(last, [u.expand_as(c) for c in last], inputs=[c for seen in currents for c in seen])
    probe.reset(probe.module)
    variances, gradients = [], []
    for group, seen in zip(groups, currents, strict=True):
        values = torch.stack([c.detach().double() for c in seen])
        variances.append(_positive(group, "current", float(values.var())))
        square = sum(float(c.grad.double().square().sum()) for c in seen if c.grad is not None)
        gradients.append(_positive(group, "gradient", square))
        for c in seen:
            c.grad = None
    return Gains(tuple(variances), tuple(gradients))


def draw_unit_current(probe: Probe, group: Sequence[Stage], generator: torch.Generator) -> None:
    """Draw normal weights of a group that give a current of variance (threshold - rest)^2, or 1 without neurons.

    Layers before a norm, where the scale has no effect, get the variance 1 / fi. Raises ValueError if the current does
    not vary.
    """
    for s in group:
        normal(s.weights, generator)
        s.weights.weight.div_(math.sqrt(fans(s.weights.weight)[0]))
    if _normed(group):
        return
    model = group[0].model
    distance = 1.0 if model is None else model.dynamics.threshold - model.dynamics.v_reset
    variance = _positive(group, "current", float(probe.look(group).current.double().var()))
    _scale(group, distance**2 / variance)


def _normed(group: Sequence[Stage]) -> bool:
    """Whether a norm follows one of the layers."""
    return any(s.norm is not None for s in group)


def _scale(group: Sequence[Stage], factor: float) -> None:
    """Multiply the variance of the weights by a factor."""
    for s in group:
        s.weights.weight.mul_(math.sqrt(factor))


def _positive(group: Sequence[Stage], what: str, value: float) -> float:
    """Return the value. Raise ValueError if it is not finite and positive."""
    if not 0 < value < math.inf:
        problem = "does not vary" if what == "current" and value == 0 else "is zero" if value == 0 else "is not finite"
        raise ValueError(f"the gains of layer {group[0].name} cannot be measured: its {what} {problem}")
    return value
