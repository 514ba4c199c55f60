"""Curvature products of long sequences in O(sqrt(T)) memory, by checkpointing over time.

A chain of `hessian_tools.chain.second_order` holds all T steps of every layer. Here T is divided into about sqrt(T)
segments, and only one of them is held at a time. A product makes two sweeps over the segments:

- Forward: value and tangent. The neuron states v and v' at the segment boundaries are kept.
- Backward, when the outputs (means over time) and with them go' are known: value and tangent again from the boundary,
  then the adjoint and its tangent, which pass gv and gv' to the previous segment.

That is one more value and one more tangent than a product without kept primals. The forward sweep computes the states
that the backward sweep needs, so nothing is kept between products. If the input repeats over time, the layers before
the first neurons do not depend on time and are computed once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hessian_tools.chain.layers import Carry, Layer, Segment, Tangents, Want, add
from hessian_tools.chain.second_order import Chain, Swept, chain_of, layers_at
from hessian_tools.engine.linearized import Linearized, output_form

if TYPE_CHECKING:
    from hessian_tools.objective import Batch, Objective


SHORTEST = 16  # least number of steps for which segments pay off


class Source:
    """The time-independent layers, as the chain of a segment sees them.

    It provides their tangent, and sums their adjoints over the segments.
    """

    parameters: tuple[Tensor, ...] = ()

    def __init__(self) -> None:
        self.dx: Tensor | None = None
        self.g: Tensor | None = None
        self.dg: Tensor | None = None

    def adjoint(self, g: Tensor, want: Want, keep: bool) -> tuple[None, Tangents]:
        """Add gy to the sum of adjoints."""
        self.g = add(self.g, g)
        return None, ()

    def tangent(self, dx: Tensor | None, dp: Tangents) -> Tensor:
        """Return the tangent of the time-independent layers."""
        assert self.dx is not None
        return self.dx

    def adjoint_tangent(self, dg: Tensor, dx: Tensor | None, dp: Tangents, want: Want) -> tuple[None, Tangents]:
        """Add gy' to the sum of tangents of the adjoint."""
        self.dg = add(self.dg, dg)
        return None, ()


class Sweeps:
    """A forward and a backward sweep over the segments of one batch.

    Args:
        objective: The objective.
        x: Inputs of the batch.
        length: Number of steps in a segment. The last segment can be shorter.
        v: The vector [P] for the tangents. None computes no tangents.
    """

    def __init__(self, objective: Objective, x: Tensor, length: int, v: Tensor | None = None) -> None:
        self.objective, self.x, self.v = objective, x, v
        steps = _steps(objective)
        self.spans = list(pairwise([*range(0, steps, length), steps]))
        self.carries: defaultdict[nn.Module, Carry] = defaultdict(Carry)
        self.starts: list[dict[nn.Module, Carry]] = []  # the states at the beginning of every segment
        self.live: tuple[Chain, Swept | None] | None = None  # the current segment
        self.behind: tuple[int, Tensor] | None = None  # number of time-independent layers, and their output
        self.head: tuple[Chain, Swept | None] | None = None  # the chain of these layers, if one of them has a parameter
        self.source = Source()
        self.unused = 0  # number of layers after them, before the first one with a parameter

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Run the forward sweep and return the outputs and o' (None without a vector)."""
        outputs: Tensor | None = None
        do: Tensor | None = None
        for i in range(len(self.spans)):
            self.starts.append({module: Carry(c.value, c.tangent) for module, c in self.carries.items()})
            part = self._run(i, self.v)
            outputs = add(outputs, part)
            do = add(do, self.live[1][0] if self.live and self.live[1] else None)
        assert outputs is not None
        return outputs, do

    def backward(self, g: Tensor, dg: Tensor | None = None) -> Tensor:
        """Run the backward sweep.

        Args:
            g: go, of the shape of the outputs.
            dg: go', for a tangent.

        Returns:
            The gradient [P], or its tangent if `dg` is given.
        """
        total = torch.zeros_like(self.objective.weights())
        while self.starts:
            i, start = len(self.starts) - 1, self.starts.pop()
            if self.live is None:
                for module, carry in self.carries.items():
                    before = start.get(module, Carry())
                    carry.value, carry.tangent = before.value, before.tangent
                self._run(i, None if dg is None else self.v)
            total += _backward(self.live, g, dg)
            self.live = None
        if self.head is not None:
            assert self.source.g is not None
            total += _backward(self.head, self.source.g, self.source.dg)
        return total

    def _run(self, i: int, v: Tensor | None) -> Tensor:
        """Compute segment i from the states in the carries, keep it as `live`, and return its part of the outputs."""
        self.live = None  # free its memory before the next is built
        found = layers_at(self.objective.model, self.x, Segment(*self.spans[i], self.carries), behind=self.behind)
        assert found is not None
        layers = [layer for _, layer in found[1]]
        if self.behind is None:
            layers = self._begin(found[1])
        chain = Chain(self.objective, [self.source, *layers] if self.head else layers[self.unused :])
        self.live = chain, None if v is None else chain.tangent(v)
        return found[0]

    def _begin(self, found: list[tuple[Tensor, Layer]]) -> list[Layer]:
        """Set up what all segments share, and return the time-dependent layers."""
        layers = [layer for _, layer in found]
        used = chain_of(self.objective, layers)
        assert used is not None
        first = len(layers) - len(used.layers)
        count = next((i for i, layer in enumerate(layers) if getattr(layer, "repeats", False)), 0)
        self.behind, self.unused = (count, found[count][0]) if count else None, max(0, first - count)
        if first < count:
            head = Chain(self.objective, layers[first:count])
            self.head = head, None if self.v is None else head.tangent(self.v)
            self.source.dx = self.head[1][0] if self.head[1] else None
        return layers[count:]


def _backward(live: tuple[Chain, Swept | None] | None, g: Tensor, dg: Tensor | None) -> Tensor:
    """Run the adjoint of a chain, or the tangent of its adjoint if `dg` is given."""
    assert live is not None
    chain, swept = live
    if dg is None:
        return chain.adjoint(g)
    assert swept is not None
    chain.adjoint(g, keep=True)
    return chain.adjoint_tangent(dg, *swept[1:])


def _steps(objective: Objective) -> int:
    """Return T, or 0 for a model that cannot run in segments."""
    return getattr(objective.model, "second_order_steps", 0)


def _trial(objective: Objective, samples: int, steps: int) -> tuple[Tensor, Chain] | None:
    """Return the outputs and the chain of the first steps on some samples, or None if segments are not possible."""
    if objective.reset is not None or _steps(objective) < 2:
        return None
    found = layers_at(objective.model, objective.first_inputs(samples), Segment(0, steps, defaultdict(Carry)))
    chain = None if found is None else chain_of(objective, [layer for _, layer in found[1]])
    return None if found is None or chain is None else (found[0], chain)


def possible(objective: Objective) -> bool:
    """Return whether the model can run in segments of time."""
    return _trial(objective, 1, 1) is not None


@torch.no_grad()
def bytes_per_sample(objective: Objective) -> float | None:
    """Measure on 8 samples the memory that one sample of a batch takes.

    Without segments this is the primal of the sample. With segments it is the sample's part in the peak memory of a
    product: two states at every boundary, and one segment with its tangents, about as much as the primal of two
    segments.

    Returns:
        Bytes, or None if there are fewer than SHORTEST steps or the model cannot run in segments.
    """
    trials = [_trial(objective, 8, steps) for steps in (1, 2)] if _steps(objective) >= SHORTEST else [None]
    held = []
    for trial in trials:
        if trial is None:
            return None
        outputs, chain = trial
        chain.adjoint(torch.zeros_like(outputs), keep=True)
        held.append(chain.nbytes)
    step = (held[1] - held[0]) / len(outputs)
    return step * (2 * length(objective) if objective.segmented else _steps(objective))


def length(objective: Objective) -> int:
    """Return the number of steps in a segment, the square root of T rounded up."""
    return math.ceil(math.sqrt(_steps(objective)))


def linearize_in_segments(objective: Objective, batch: Batch, kind: str) -> Linearized | None:
    """Return the curvature product of one batch, or None if the model cannot run in segments.

    Args:
        objective: The objective.
        batch: Inputs and targets.
        kind: "hessian", "ggn" or "fisher".
    """
    if not possible(objective):
        return None
    x, y = batch

    def product(v: Tensor) -> Tensor:
        sweeps = Sweeps(objective, x, length(objective), v)
        outputs, do = sweeps.forward()
        form = output_form(kind, objective.loss, outputs, y)
        if form is None or do is None:
            return torch.zeros_like(v)
        slope, curve = form
        return sweeps.backward(slope, curve(do)) if kind == "hessian" else sweeps.backward(curve(do))

    return Linearized(product, 0)


@torch.no_grad()
def value_and_gradient(objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss on one batch and its gradient [P]. The model must be able to run in segments."""
    x, y = batch
    sweeps = Sweeps(objective, x, length(objective))
    outputs, _ = sweeps.forward()
    form = output_form("hessian", objective.loss, outputs, y)
    gradient = torch.zeros_like(objective.weights()) if form is None else sweeps.backward(form[0])
    return objective.loss(outputs, y), gradient


def outputs(objective: Objective, x: Tensor) -> Tensor:
    """Return the outputs for inputs x without derivatives. The model must be able to run in segments."""
    return Sweeps(objective, x, length(objective)).forward()[0]
