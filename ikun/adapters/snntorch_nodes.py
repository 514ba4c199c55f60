"""snnTorch's neurons as nodes of the traced graph: Leaky, Lapicque, RLeaky, Synaptic and RSynaptic.

    i = alpha i + x + V s       only Synaptic and RSynaptic; otherwise i = x + V s
    h = beta m + i - r theta    r = spike_grad(m - theta), without derivatives (reset by subtraction)
    s = spike_grad(h - theta)

The potential m that is handed on is h: the reset takes place at the next step. With `reset_delay=False` it also takes
place at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.engine.nodes import valued
from ikun.adapters.neuron_nodes import LibraryNode, Plan, UnfitError, library_class, library_surrogate, surrogate_plan
from ikun.nodes.autograd import neurons
from ikun.nodes.passes import ScanSpec

STATES = {
    "Leaky": ("mem",), "Lapicque": ("mem",), "RLeaky": ("spk", "mem"), "Synaptic": ("syn", "mem"),
    "RSynaptic": ("spk", "syn", "mem"),
}  # fmt: skip
STEPS = {
    "forward", "fire", "mem_reset", "state_function", "_base_state_function", "_base_sub", "_base_zero", "_base_int",
    "_base_state_reset_zero",
}  # fmt: skip
RESETS = ("subtract", "zero", "none")


@dataclass(frozen=True)
class _Kind:
    """Of a neuron.

    Attributes:
        name: Its class.
        reset: One of RESETS.
        at_once: Whether the reset also takes place at once.
        fixed: Whether beta and threshold are the same for all neurons and not learned.
    """

    name: str
    reset: str
    at_once: bool
    fixed: bool


class SnnTorchNode(LibraryNode):
    """The forward pass of one step."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        spec, kind = self.plan.spec, self.plan.more
        names, m = STATES[kind.name], vars(self)["_buffers"]
        before = {name: m[name] for name in names}
        before.update({k: s for k, s in [*zip(names, args, strict=False), *kwargs.items()] if s is not None})
        before = {k: s if s.shape == input_.shape else torch.zeros_like(input_) for k, s in before.items()}
        out, calls = self.heard(input_, *args, **kwargs)
        after = {name: m[name] for name in names}
        (_, r), (z, spikes) = calls
        own: Any = self
        current = input_ + own.recurrent(before["spk"]) if "spk" in names else input_
        found: dict[str, Tensor] = {}
        if "syn" in names:
            current = found["syn"] = valued(lambda: after["syn"], own.alpha.clamp(0, 1) * before["syn"] + current)
        start = before["mem"]
        if kind.reset == "zero":
            start = (1 - r) * start
            current = current if kind.name == "Leaky" else (1 - r) * current
        if kind.fixed:
            y, h = neurons(current[None], spec, start, None, self.plan.jet, (spikes[None], z[None], after["mem"][None]))
        else:
            h = own.beta.clamp(0, 1) * start + current
            h = h - r * own.threshold if kind.reset == "subtract" else h
            y, _ = neurons((h - own.threshold)[None], spec, None, None, self.plan.jet, (spikes[None], z[None], z[None]))
        y = y[0]
        if kind.at_once and kind.reset != "none":
            h = h - (y - r) * (own.threshold if kind.reset == "subtract" else h)
        found["mem"] = h if kind.fixed and not kind.at_once else valued(lambda: after["mem"], h)
        found["spk"] = y
        for name in names:
            setattr(self, name, found[name])
        return (y, *(found[name] for name in names if name != "spk")) if isinstance(out, tuple) else y


def snntorch_node(module: nn.Module) -> tuple[type[LibraryNode], Plan]:
    """Return the node of a neuron.

    Raises:
        UnfitError: If its equations are not those of the kernels.
    """
    name = library_class(module, STATES, STEPS)
    m: Any = module
    for setting in ("inhibition", "state_quant", "surrogate_disable"):
        if getattr(m, setting):
            raise UnfitError(f"{setting} is on")
    if "graded_spikes_factor" in m._parameters or bool((m.graded_spikes_factor != 1).any()):
        raise UnfitError("its spikes are graded")
    surrogate = surrogate_plan(library_surrogate(module))
    rates = (m.threshold, m.time_step, m.R, m.C) if name == "Lapicque" else (m.threshold, m.beta)
    reset = RESETS[int(m.reset_mechanism_val)]
    fixed = all(t.numel() == 1 and not t.requires_grad for t in rates)
    if name == "Lapicque" and not fixed:
        raise UnfitError("its threshold is learned, or its constants differ between neurons")
    spec = ScanSpec(surrogate["surrogate"], decay=0.0, threshold=0.0, reset="soft", detach_reset=True)
    fixed = fixed and (reset != "none" or name == "Lapicque")  # the kernels always reset, which a relaxed spike shows
    if fixed:
        decay, gain = float(m.beta.clamp(0, 1)), 1.0
        if name == "Lapicque":
            r, c, dt = float(m.R), float(m.C), float(m.time_step)
            decay, gain = 1 - dt / (r * c), dt / c
        spec = ScanSpec(surrogate["surrogate"], decay, gain, float(m.threshold), reset="soft", detach_reset=True)
    at_once = not getattr(m, "reset_delay", True)
    return SnnTorchNode, Plan(spec, surrogate["jet"], more=_Kind(name, reset, at_once, fixed))
