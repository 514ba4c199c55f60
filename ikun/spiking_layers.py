"""Spiking neurons, with an optional max-pooling after them, computed with the scans of `ikun.kernels`.

`Spikes` is a layer of a curvature product, with value, adjoint, tangent and tangent of the adjoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessian_tools.chain.layers import Carry
from ikun.kernels import dispatch as fused
from ikun.kernels.dispatch import adjoint, adjoint_tangent, slopes, tangent
from ikun.kernels.scan import Number, Scan, reset_slope, scalar
from ikun.neurons import Neuron, step
from ikun.pooling import selection

if TYPE_CHECKING:
    from ikun.layers import MaxPool


class Spikes:
    """A layer of neurons, with an optional max-pooling after them, with the passes that a curvature product needs.

    The class implements `hessian_tools.chain.layers.Layer`. Inputs are [T N, ...] with the time axis first, or [N, ...]
    for an input that is the same at all steps. Outputs are [T N, ...]. With a carry, the T steps are a segment of a
    longer sequence, and the states of the scans are read from the carry and written to it.
    """

    def __init__(
        self,
        neuron: Neuron,
        shapes: tuple[torch.Size, torch.Size],
        z: Tensor,
        scan: Scan,
        carry: Carry | None = None,
    ) -> None:
        """Create the layer at a fixed input.

        Args:
            neuron: The neurons.
            shapes: Shapes of the layer's input and output.
            z: h - threshold [T, M], with M the number of neurons of all samples.
            scan: Derivatives of the scan.
            carry: States at the boundaries of a time segment.
        """
        self.neuron, self.shapes, self.scan, self.carry = neuron, shapes, scan, carry
        self.z: Tensor | None = z  # None after the adjoint has been kept
        self.start: Tensor | None = None  # v' before the first step, in a segment
        self.repeats = False  # whether the input is the same at all steps of all segments

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The learned decay of PLIF neurons; empty for other neurons."""
        return (self.neuron.logit,) if self.neuron.kind == "plif" else ()

    def _inputs(self, dx: Tensor | None) -> Tensor:
        """Reshape an input tangent to [T or 1, M]."""
        if dx is None:
            return torch.zeros_like(self.scan.f1[:1])
        return dx.reshape(1 if self.scan.static else len(self.scan.f1), -1)

    def _outputs(self, g: Tensor) -> Tensor:
        """Reshape an output to [T, M or Q]."""
        return g.reshape(len(self.scan.f1), -1)

    def _gain(self, dp: Sequence[Tensor | None]) -> Number:
        """Return gain' = gain (1 - gain) w' for a learned decay, else 0."""
        return self.scan.gain * self.scan.decay * scalar(dp[0]) if dp and dp[0] is not None else 0.0

    def _state(self, kind: str) -> Tensor | None:
        """Return the state of a scan from the carry, or None without a carry."""
        return None if self.carry is None else carried(self.carry, kind, torch.zeros_like(self.scan.f1[:1]))

    def tangent(self, dx: Tensor | None, dp: Sequence[Tensor | None]) -> Tensor:
        """Return y' for input tangent x' and parameter tangents p'."""
        self.start = None if self.carry is None else self.carry.tangent
        state = self._state("tangent")
        return tangent(self.scan, self._inputs(dx), self._gain(dp), state).reshape(self.shapes[1])

    def adjoint(self, g: Tensor, want: Any, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return gx and gp for gy. keep: also keep what `adjoint_tangent` needs."""
        z = None
        if keep:
            assert self.z is not None
            z, self.z = self.z, None
            self.scan.e = torch.empty_like(z)
            self.scan.gh = None if self.scan.u is None else torch.empty_like(z)
        gx, total = adjoint(self.scan, self._outputs(g), z, self._state("adjoint"))
        self.total = total
        if not self.parameters:
            return gx.reshape(self.shapes[0]), ()
        return gx.reshape(self.shapes[0]), (_like(g, self.scan.gain * self.scan.decay * total),)

    def adjoint_tangent(
        self, dg: Tensor, dx: Tensor | None, dp: Sequence[Tensor | None], want: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return gx' and gp' for gy', x' and p'."""
        dgain, state = self._gain(dp), self._state("adjoint_tangent")
        gx, total = adjoint_tangent(self.scan, self._outputs(dg), self._inputs(dx), dgain, self.start, state)
        if not self.parameters:
            return gx.reshape(self.shapes[0]), ()
        # the derivative of gain (1 - gain) dL/dgain, with gain' = gain (1 - gain) w'
        grad = self.scan.gain * self.scan.decay * total + (self.scan.decay - self.scan.gain) * dgain * self.total
        return gx.reshape(self.shapes[0]), (_like(dg, grad),)


def _like(t: Tensor, value: Number) -> Tensor:
    """Return a scalar tensor with the dtype and device of t."""
    return torch.as_tensor(value, dtype=t.dtype, device=t.device)


def carried(carry: Carry, kind: str, rest: Tensor) -> Tensor:
    """Return a state [1, M] for a scan to update in place, and store it in the carry as the state of the next segment.

    The state is a copy of that of the preceding segment, or `rest` for the first segment.
    """
    before = getattr(carry, kind)
    state = rest if before is None else before.clone()
    setattr(carry, kind, state)
    return state


def _value(
    neuron: Neuron, steps: int, pool: MaxPool | None, x: Tensor, carry: Carry | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the forward pass of neurons and pooling.

    Args:
        neuron: The neurons.
        steps: Number of time steps T.
        pool: The pooling, or None.
        x: Input currents [T or 1, N, ...].
        carry: States at the boundaries of a time segment.

    Returns:
        The spikes after pooling [T, ...], z = h - threshold [T, M], the positions of the pooled entries [T, Q] (None
        without pooling), and u [T, M] (None without a learned decay).
    """
    d, learned = neuron.dynamics, neuron.kind == "plif"
    decay, gain = neuron.rates()
    state = None if carry is None else carried(carry, "value", neuron.start(x).reshape(1, -1))
    if not d.relaxed and fused.usable(x):
        plane = None if pool is None else (x.shape[-2], x.shape[-1])
        rates = (scalar(decay), scalar(gain), scalar((1 - decay) * d.v_reset), d.threshold, d.v_reset)
        last = pool is not None and pool.ties == "last"
        found = fused.value(x.flatten(1), steps, rates, d.reset == "hard", plane, last, learned, state)
        if found is not None:
            tail = x.shape[1:] if plane is None else (*x.shape[1:-2], plane[0] // 2, plane[1] // 2)
            return found[0].view(steps, *tail), *found[1:]
    v = neuron.start(x) if state is None else state.view(x.shape[1:])
    membranes, spikes, previous = [], [], []
    for t in range(steps):
        previous.append(v)
        h, s, v = step(x[0 if len(x) == 1 else t], v, decay, gain, d)
        membranes.append(h)
        spikes.append(s)
    z, s = torch.stack(membranes).flatten(1) - d.threshold, torch.stack(spikes)
    u = (x - torch.stack(previous) + d.v_reset).flatten(1) if learned else None
    if state is not None:
        state.copy_(v.reshape(1, -1))
    return (s, z, None, u) if pool is None else (pool(s), z, selection(s, pool.ties).flatten(1), u)


def _scan(
    neuron: Neuron, pool: MaxPool | None, shape: torch.Size, z: Tensor, index: Tensor | None, u: Tensor | None
) -> Scan:
    """Return the derivatives of the scan at z, for inputs of the given shape [T or 1, N, ...]."""
    (f1, c), (decay, gain) = slopes(neuron.dynamics, z), neuron.rates()
    width, height = (1, 1) if pool is None else (shape[-1], shape[-2])
    rates, reset = (scalar(decay), scalar(gain)), reset_slope(neuron.dynamics)
    surrogate = neuron.dynamics.surrogate
    return Scan(f1, c, *rates, shape[0] == 1, index, width * height, u=u, reset=reset, width=width, surrogate=surrogate)


def linearize_neurons(
    neuron: Neuron, steps: int, static: bool, pool: MaxPool | None, x: Tensor, carry: Carry | None = None
) -> tuple[Tensor, Spikes]:
    """Run neurons and pooling at the inputs x, and return the outputs with the layer for curvature products.

    Args:
        neuron: The neurons.
        steps: Number of time steps T.
        static: Whether the input is the same at all steps.
        pool: The pooling, or None.
        x: Inputs [N, ...] if static, else [steps N, ...].
        carry: States at the boundaries of a time segment.

    Returns:
        The outputs [steps N, ...] and the layer.
    """
    timed = x[None] if static else x.unflatten(0, (steps, -1))
    y, z, index, u = _value(neuron, steps, pool, timed, carry)
    y = y.flatten(0, 1)
    layer = Spikes(neuron, (x.shape, y.shape), z, _scan(neuron, pool, timed.shape, z, index, u), carry)
    layer.repeats = static
    return y, layer
