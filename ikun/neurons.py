"""Integrate-and-fire neurons, computed as one scan over time.

    h[t] = decay v[t-1] + gain x[t] + (1 - decay) v_reset        membrane potential before the reset
    s[t] = step(h[t] - threshold)                                spike, with surrogate derivatives
    v[t] = h (1 - s) + v_reset s   (hard)    h - threshold s   (soft)

If the reset is detached, the s in the last line has no derivative.

The neuron models differ in decay and gain. IF: decay = gain = 1. LIF: decay = 1 - 1/tau and gain = 1/tau, so the input
is divided by tau, as with decay_input in SpikingJelly. PLIF: 1/tau = sigmoid(w) with a learned w (Fang et al. 2021). In
a recurrent layer the input current is x[t] + V s[t-1], with s[-1] = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ikun.surrogates import Surrogate, spike

NEURONS = ("if", "lif", "plif")
RESETS = ("hard", "soft")
Feedback = Callable[[Tensor], Tensor]  # s[t-1] -> V s[t-1]


@dataclass(frozen=True)
class Dynamics:
    """The parameters of a time step other than decay and gain.

    Attributes:
        surrogate: Surrogate derivative of the spike.
        threshold: The neuron fires where h >= threshold.
        v_reset: Potential at rest and after a hard reset.
        reset: "hard" or "soft", one of `RESETS`.
        detach_reset: Whether derivatives ignore the spike in the reset.
        relaxed: Whether spikes are F(h - threshold) instead of 0 or 1. See `ikun.surrogates.spike`.
    """

    surrogate: Surrogate
    threshold: float = 1.0
    v_reset: float = 0.0
    reset: str = "hard"
    detach_reset: bool = False
    relaxed: bool = False


def step(x: Tensor, v: Tensor, decay: Tensor | float, gain: Tensor | float, dynamics: Dynamics) -> tuple[Tensor, ...]:
    """Compute one time step.

    Args:
        x: Input current [...].
        v: Membrane potential after the previous step [...].
        decay: Factor of the previous potential.
        gain: Factor of the input current.
        dynamics: The other parameters of the neurons.

    Returns:
        The membrane potential before the reset, the spikes, and the potential after the reset, each [...].
    """
    h = decay * v + gain * x
    if dynamics.v_reset:
        h = h + (1 - decay) * dynamics.v_reset
    s = spike(h - dynamics.threshold, dynamics.surrogate, dynamics.relaxed)
    z = s.detach() if dynamics.detach_reset else s
    v = h - dynamics.threshold * z if dynamics.reset == "soft" else h * (1 - z) + dynamics.v_reset * z
    return h, s, v


def scan(
    x: Tensor,
    v0: Tensor,
    decay: Tensor | float,
    gain: Tensor | float,
    dynamics: Dynamics,
    feedback: Feedback | None = None,
) -> tuple[Tensor, Tensor]:
    """Run neurons over a sequence of input currents.

    The result is twice differentiable in x, v0, decay and gain.

    Args:
        x: Input currents [T, ...]. The stride over T may be 0, for an image that is repeated at every step.
        v0: Initial membrane potentials [...].
        decay: Factor of the previous potential.
        gain: Factor of the input current.
        dynamics: The other parameters of the neurons.
        feedback: In a recurrent layer, the map from s[t-1] to V s[t-1].

    Returns:
        The spikes [T, ...] and the final membrane potentials v[T] [...].
    """
    v, s, spikes = v0, torch.zeros_like(v0), []
    for current in x.unbind(0):
        _, s, v = step(current if feedback is None else current + feedback(s), v, decay, gain, dynamics)
        spikes.append(s)
    return torch.stack(spikes), v


@torch.no_grad()
def membrane(
    x: Tensor,
    v0: Tensor,
    decay: Tensor | float,
    gain: Tensor | float,
    dynamics: Dynamics,
    feedback: Feedback | None = None,
) -> Tensor:
    """Return the membrane potentials before the reset, h[t] [T, ...], without derivatives.

    The arguments are those of `scan`. E[f'(h - threshold)^2] is the average over these potentials.
    """
    v, s, potentials = v0, torch.zeros_like(v0), []
    for current in x.unbind(0):
        h, s, v = step(current if feedback is None else current + feedback(s), v, decay, gain, dynamics)
        potentials.append(h)
    return torch.stack(potentials)


class Neuron(nn.Module):
    """A layer of IF, LIF or PLIF neurons.

    Every forward pass starts from v_reset, so no state is carried from one batch to the next.

    Args:
        kind: Neuron model, one of `NEURONS`.
        dynamics: Threshold, reset and surrogate of the neurons.
        tau: Time constant in steps. It is ignored for IF neurons and is the initial value for PLIF neurons.
    """

    def __init__(self, kind: str, dynamics: Dynamics, tau: float = 2.0) -> None:
        super().__init__()
        self.kind, self.dynamics, self.tau = kind, dynamics, tau
        if kind == "plif":
            self.logit = nn.Parameter(torch.tensor(-math.log(tau - 1)))  # sigmoid(logit) = 1 / tau

    def rates(self) -> tuple[Tensor | float, Tensor | float]:
        """Return decay and gain. They are tensors that depend on the learned parameter for PLIF neurons."""
        if self.kind == "if":
            return 1.0, 1.0
        inverse = torch.sigmoid(self.logit) if self.kind == "plif" else 1 / self.tau
        return 1 - inverse, inverse

    def start(self, x: Tensor) -> Tensor:
        """Return the initial membrane potentials [N, ...] for currents x [T, N, ...]."""
        return torch.full_like(x[0], self.dynamics.v_reset)

    def forward(self, x: Tensor, feedback: Feedback | None = None) -> Tensor:
        """Return the spikes [T, N, ...] for input currents x [T, N, ...].

        Args:
            x: Input currents [T, N, ...].
            feedback: In a recurrent layer, the map from s[t-1] to V s[t-1].

        Returns:
            The spikes.
        """
        return scan(x, self.start(x), *self.rates(), self.dynamics, feedback)[0]

    def membrane(self, x: Tensor, feedback: Feedback | None = None) -> Tensor:
        """Return h[t] [T, N, ...], the potentials before the reset, for currents x. See `forward`."""
        return membrane(x, self.start(x), *self.rates(), self.dynamics, feedback)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.dynamics.reset} reset, {self.dynamics.surrogate}"
