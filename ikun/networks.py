"""Spiking networks by name: the CSNN of arXiv 2411.18250 and an MLP of any depth.

A `Spec` says everything that is needed to build one; checkpoints store it. Layers are named conv1, norm1, spike1,
pool1, ..., fc1, so that parameters can be chosen by pattern ('conv*', 'fc1.weight').
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ikun import spikes
from ikun.data import CODINGS
from ikun.neurons import KINDS, RESETS, Dynamics, Neuron
from ikun.surrogates import Surrogate

if TYPE_CHECKING:
    from hessian_tools.layers import Segment

MODELS = ("csnn", "mlp")
NORMS = ("none", "bn")
TIES = ("first", "last")


@dataclass(frozen=True)
class Spec:
    """A network: its architecture, its neurons and its input coding.

    input_shape is (channels, height, width). `channels` is the CSNN's width, `hidden` the MLP's layer sizes.
    `ties` says which of several equal entries a max-pooling window selects, in row-major order.
    Raises ValueError, naming the field, for anything that cannot be built.
    """

    model: str = "csnn"
    input_shape: tuple[int, int, int] = (1, 8, 8)
    classes: int = 10
    channels: int = 16
    hidden: tuple[int, ...] = (128, 128)
    norm: str = "bn"
    neuron: str = "if"
    tau: float = 2.0
    threshold: float = 1.0
    v_reset: float = 0.0
    reset: str = "hard"
    detach_reset: bool = False
    surrogate: str = "atan:2"
    timesteps: int = 4
    coding: str = "direct"
    ties: str = "first"
    relaxed: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("model", MODELS),
            ("norm", NORMS),
            ("neuron", KINDS),
            ("reset", RESETS),
            ("coding", CODINGS),
            ("ties", TIES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not '{getattr(self, name)}'")
        Surrogate.parse(self.surrogate)
        for name, top in (("classes", 100_000), ("channels", 4096), ("timesteps", 10_000)):
            if not 1 <= getattr(self, name) <= top:
                raise ValueError(f"{name} must lie between 1 and {top}, not {getattr(self, name)}")
        if len(self.input_shape) != 3 or not all(1 <= n <= 4096 for n in self.input_shape):
            raise ValueError(f"input_shape must be (channels, height, width), not {self.input_shape}")
        if self.model == "csnn" and min(self.input_shape[1:]) < 4:
            raise ValueError(
                f"the CSNN pools twice: images of {self.input_shape[1:]} are too small, 4 x 4 is the least"
            )
        if len(self.hidden) > 1000 or not all(1 <= n <= 1_000_000 for n in self.hidden):
            raise ValueError(f"hidden sizes must lie between 1 and 1,000,000, not {self.hidden}")
        if not self.tau > 1:
            raise ValueError(f"tau must exceed 1, not {self.tau}")
        if not self.threshold > self.v_reset:
            raise ValueError(f"the threshold ({self.threshold}) must exceed the reset potential ({self.v_reset})")
        if not all(math.isfinite(v) for v in (self.tau, self.threshold, self.v_reset)):
            raise ValueError(f"tau, threshold and v_reset must be finite, not {self.tau, self.threshold, self.v_reset}")

    @staticmethod
    def from_dict(values: dict[str, object]) -> Spec:
        """From a checkpoint's plain dict. Raises ValueError for missing, unknown or mistyped fields."""
        kinds = {"str": str, "int": int, "float": (int, float), "bool": bool}
        expected = {f.name: str(f.type) for f in fields(Spec)}
        if set(values) != set(expected):
            raise ValueError(f"network description has wrong fields: {sorted(set(values) ^ set(expected))}")
        clean: dict[str, object] = {}
        for name, value in values.items():
            if expected[name].startswith("tuple"):
                if not isinstance(value, list | tuple) or not all(type(n) is int for n in value):
                    raise ValueError(f"network description: {name} must be a list of integers")
                clean[name] = tuple(value)
            elif not isinstance(value, kinds[expected[name]]) or (  # type: ignore[arg-type]
                isinstance(value, bool) and expected[name] != "bool"
            ):
                raise ValueError(f"network description: {name} must be {expected[name]}")
            else:
                clean[name] = value
        return Spec(**clean)  # type: ignore[arg-type]


class MaxPool(nn.Module):
    """2 x 2 max-pooling over the last two axes with a frozen tie rule.

    Spikes tie in most windows, where the maximum has no derivative; the entry selected at the current values, first
    (or last) in row-major order, is the one that carries all derivatives.
    """

    def __init__(self, ties: str = "first") -> None:
        super().__init__()
        self.ties = ties

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        x = x[..., : 2 * height, : 2 * width]
        entries = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]  # row-major order of the window
        if self.ties == "last":
            entries.reverse()
        best = entries[0]
        for entry in entries[1:]:  # torch.where passes derivatives to the selected entry alone
            best = torch.where(entry.detach() > best.detach(), entry, best)
        return best


LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.Flatten, Neuron, MaxPool)


class Network(nn.Module):
    """Images [N, C, H, W] (repeated for T steps) or coded input [N, T, C, H, W] -> mean firing rates [N, classes]."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        channels, height, width = spec.input_shape
        if spec.model == "csnn":
            self._conv(1, channels)
            self._conv(2, spec.channels)
            self.add_module("flatten", nn.Flatten())
            hidden: tuple[int, ...] = (spec.channels * 16,)
            inputs = spec.channels * (height // 4) * (width // 4)
        else:
            self.add_module("flatten", nn.Flatten())
            inputs, hidden = channels * height * width, spec.hidden
        sizes = (*hidden, spec.classes)
        first = sum(isinstance(m, Neuron) for m in self.children()) + 1
        for i, size in enumerate(sizes, 1):
            self.add_module(f"fc{i}", nn.Linear(inputs, size, bias=False))
            if spec.model == "mlp" and spec.norm == "bn" and i < len(sizes):
                self.add_module(f"norm{i}", nn.BatchNorm1d(size))
            self.add_module(f"spike{first + i - 1}", self._neuron())
            inputs = size

    def _conv(self, i: int, inputs: int) -> None:
        self.add_module(f"conv{i}", nn.Conv2d(inputs, self.spec.channels, 3, padding=1, bias=False))
        if self.spec.norm == "bn":
            self.add_module(f"norm{i}", nn.BatchNorm2d(self.spec.channels))
        self.add_module(f"spike{i}", self._neuron())
        self.add_module(f"pool{i}", MaxPool(self.spec.ties))

    def _neuron(self) -> Neuron:
        spec = self.spec
        dynamics = Dynamics(
            Surrogate.parse(spec.surrogate), spec.threshold, spec.v_reset, spec.reset, spec.detach_reset, spec.relaxed
        )
        return Neuron(spec.neuron, dynamics, spec.tau)

    def forward(self, x: Tensor, once: bool = False) -> Tensor:
        """once: the result is to be differentiated once at most, so that the fast scans of fused.py can be used."""
        steps, layers = self.spec.timesteps, list(self.children())
        static = x.dim() == 4  # a repeated image: everything before the first neuron is computed once, not T times
        if not static:
            if x.dim() != 5 or x.shape[1] != steps:
                raise ValueError(f"input must be [N, C, H, W] or [N, {steps}, C, H, W], not {list(x.shape)}")
            x = x.transpose(0, 1)
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, Neuron) and once:
                pool = following if isinstance(following, MaxPool) else None
                x = spikes.fire(layer, steps, pool, x[None] if static else x)
                static = False
            elif isinstance(layer, Neuron):
                x = layer(x.expand(steps, *x.shape) if static else x)
                static = False
            elif isinstance(layer, MaxPool) and once:
                continue
            elif static or isinstance(layer, MaxPool):
                x = layer(x)
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, (steps, -1))
        return x.mean(0)

    def value(self, x: Tensor) -> Tensor:
        """forward(x) where no derivative is wanted, as fast as it goes."""
        return self.forward(x, once=True)

    @property
    def second_order_steps(self) -> int:
        return self.spec.timesteps

    def second_order_chain(self, x: Tensor, segment: Segment | None = None) -> tuple[Tensor, list[Any]] | None:
        """The layers of forward(x), as hessian_tools.second_order wants them, on [N, ...] or time first, [T N, ...];
        with a segment, for its steps alone.

        None for a network that has been changed since it was built.
        """
        total, static, layers = self.spec.timesteps, x.dim() == 4, list(self.children())
        first, last = (0, total) if segment is None else (segment.first, segment.last)
        steps = last - first
        if type(self) is not Network or any(type(m) not in LAYERS for m in layers):
            return None
        items: list[Any] = []
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, Neuron):
                pool = following if isinstance(following, MaxPool) else None
                carry = None if segment is None else segment.carries[layer]
                items.append(partial(spikes.linearize, layer, steps, static, pool, carry=carry))
                static = False
            elif not isinstance(layer, MaxPool):
                items.append(layer)
        items.append(partial(spikes.time_mean, steps, total))
        return x if x.dim() == 4 else x[:, first:last].transpose(0, 1).flatten(0, 1), items

    def stages(self) -> Iterator[tuple[str, nn.Conv2d | nn.Linear, nn.Module | None, str, Neuron]]:
        """(layer name, weights, norm or None, neuron name, neuron) of every weight layer, in order."""
        weights: tuple[str, nn.Conv2d | nn.Linear] | None = None
        norm: nn.Module | None = None
        for name, layer in self.named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                weights, norm = (name, layer), None
            elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                norm = layer
            elif isinstance(layer, Neuron) and weights is not None:
                yield (*weights, norm, name, layer)


def mean_square(rates: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples and classes of (rate - one-hot)^2; rates [N, K], labels [N]."""
    # not F.mse_loss: forward-over-reverse through it fails in PyTorch 2.13
    return (rates - F.one_hot(labels, rates.shape[1]).to(rates.dtype)).square().mean()


def cross_entropy(rates: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the rates [N, K] taken as logits, mean over samples (SpikingJelly's convention)."""
    return F.cross_entropy(rates, labels)


LOSSES = {"mse": mean_square, "ce": cross_entropy}
