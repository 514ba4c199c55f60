"""The passes of ikun's own neurons, called directly."""

from __future__ import annotations

import torch
from torch import Tensor

from ikun.layers import MaxPool
from ikun.neurons import Neuron
from ikun.nodes import passes
from ikun.nodes.layer import spec_of


def value(neuron: Neuron, steps: int, pool: MaxPool | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return spikes [T, ...], z [T, M], the selected entries [T, Q] and u [T, M] (both empty where not used)."""
    gain = neuron.rates()[1] if neuron.kind == "plif" else None
    assert not isinstance(gain, float)
    spec = passes.encode_spec(spec_of(neuron, x, steps, pool))
    y, z, _, index, u = passes.spikes(x.flatten(1), None, gain, spec)
    tail = x.shape[1:] if pool is None else (*x.shape[1:-2], x.shape[-2] // 2, x.shape[-1] // 2)
    return y.view(steps, *tail), z, index, u


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two results are equal to the last bit, of the same dtype."""
    return a.dtype == b.dtype and torch.equal(a, b)
