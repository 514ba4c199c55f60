"""Spiking neurons as a module, in place of another library's neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ikun.nodes.autograd import Slopes, neurons
from ikun.nodes.passes import Spec
from ikun.nodes.rewriting import TRACING


class SpikingNode(nn.Module):
    """A layer of IF, LIF or PLIF neurons that can be differentiated twice. It keeps its potential between calls.

    Args:
        spec: The parameters of the neurons.
        takes_time: Whether the inputs are [T, N, ...] instead of [N, ...].
        gain: Returns the learned gain [], or None.
        jet: The function z -> (f'(z), f''(z)), instead of those of `spec.surrogate`.
    """

    tracing = TRACING

    def __init__(
        self,
        spec: Spec,
        takes_time: bool,
        gain: Callable[[], Tensor] | None = None,
        jet: Slopes | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.takes_time, self.gain, self.jet = spec, takes_time, gain, jet
        self.v: Tensor | None = None

    def reset(self) -> None:
        """Return to the potential at rest."""
        self.v = None

    def forward(self, x: Tensor) -> Any:
        gain = None if self.gain is None else self.gain()
        if self.takes_time:
            y, self.v = neurons(x, self.spec, self.v, gain, self.jet)
            return y
        y, self.v = neurons(x[None], self.spec, self.v, gain, self.jet)
        return y[0]
