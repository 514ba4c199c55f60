"""Integrate-and-fire neurons as one scan over time.

    h[t] = decay v[t-1] + gain x[t] + (1 - decay) v_reset        membrane before the reset
    s[t] = step(h[t] - threshold)                                spike, derivatives from the surrogate
    v[t] = h (1 - s) + v_reset s   (hard)    h - threshold s   (soft)

With a detached reset the s of the last line carries no derivative. IF: decay = gain = 1. LIF: decay = 1 - 1/tau,
gain = 1/tau (the input is divided by tau, as SpikingJelly's decay_input does). PLIF: 1/tau = sigmoid(w), w learned
(Fang et al. 2021). In a recurrent layer the current is x[t] + V s[t-1], with s[-1] = 0.
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
    """What a scan does at every step, apart from decay and gain."""

    surrogate: Surrogate
    threshold: float = 1.0
    v_reset: float = 0.0
    reset: str = "hard"
    detach_reset: bool = False
    relaxed: bool = False


def step(x: Tensor, v: Tensor, decay: Tensor | float, gain: Tensor | float, dynamics: Dynamics) -> tuple[Tensor, ...]:
    """One time step: current x and potential v [...] -> (h before the reset, spikes, potential after it)."""
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
    """Run neurons over currents x [T, ...] from the potentials v0 [...]; returns spikes [T, ...] and v[T] [...].

    Differentiable twice in x, v0, decay and gain. x may have stride 0 over T (a repeated image).
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
    """h[t] [T, ...] of the same scan, without derivatives: what E[f'(h - threshold)^2] is taken over."""
    v, s, potentials = v0, torch.zeros_like(v0), []
    for current in x.unbind(0):
        h, s, v = step(current if feedback is None else current + feedback(s), v, decay, gain, dynamics)
        potentials.append(h)
    return torch.stack(potentials)


class Neuron(nn.Module):
    """A layer of IF, LIF or PLIF neurons; starts every forward from v_reset, so no state leaks between batches."""

    def __init__(self, kind: str, dynamics: Dynamics, tau: float = 2.0) -> None:
        super().__init__()
        self.kind, self.dynamics, self.tau = kind, dynamics, tau
        if kind == "plif":
            self.logit = nn.Parameter(torch.tensor(-math.log(tau - 1)))  # sigmoid(logit) = 1 / tau

    def rates(self) -> tuple[Tensor | float, Tensor | float]:
        """(decay, gain)."""
        if self.kind == "if":
            return 1.0, 1.0
        inverse = torch.sigmoid(self.logit) if self.kind == "plif" else 1 / self.tau
        return 1 - inverse, inverse

    def start(self, x: Tensor) -> Tensor:
        return torch.full_like(x[0], self.dynamics.v_reset)

    def forward(self, x: Tensor, feedback: Feedback | None = None) -> Tensor:
        """Spikes [T, N, ...] for currents x [T, N, ...]; feedback: of a recurrent layer."""
        return scan(x, self.start(x), *self.rates(), self.dynamics, feedback)[0]

    def membrane(self, x: Tensor, feedback: Feedback | None = None) -> Tensor:
        return membrane(x, self.start(x), *self.rates(), self.dynamics, feedback)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.dynamics.reset} reset, {self.dynamics.surrogate}"
