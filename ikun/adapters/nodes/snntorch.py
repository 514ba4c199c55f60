"""snnTorch's neurons as nodes of the traced graph: Leaky, Lapicque, RLeaky, Synaptic and RSynaptic.

    i = alpha i + x + V s       only Synaptic and RSynaptic; otherwise i = x + V s
    h = beta m + i - r theta    r = spike_grad(m - theta), without derivatives (reset by subtraction)
    s = spike_grad(h - theta)

The potential m that is handed on is h: the reset takes place at the next step. With `reset_delay=False` it also takes
place at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.engine.nodes import valued
from hessian_tools.engine.tape import State, run_step
from ikun.adapters.nodes.replacement import (
    LibraryNode,
    Plan,
    UnfitError,
    library_class,
    library_surrogate,
    surrogate_plan,
)
from ikun.nodes.autograd import neurons
from ikun.nodes.passes import ScanSpec
from ikun.nodes.recurrent import recurrent_neurons

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
        kind, own = self.plan.more, vars(self)["_buffers"]
        names = STATES[kind.name]
        before = {name: own[name] for name in names}
        before.update({k: s for k, s in [*zip(names, args, strict=False), *kwargs.items()] if s is not None})
        state = tuple(s if s.shape == input_.shape else None for s in before.values())  # None: at rest
        y, after = run_step(self, input_, state)
        for name, value in zip(names, after, strict=True):
            setattr(self, name, value)
        handed = [value for name, value in zip(names, after, strict=True) if name != "spk"]
        m: Any = self
        return (y, *handed) if m.output or not m.init_hidden else y

    def _heard_step(self, x: Tensor, state: State) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """Run the library's step. Returns the arguments and spikes of the reset and of the neuron, and the state."""
        names = STATES[self.plan.more.name]
        for name, value in zip(names, state, strict=True):
            setattr(self, name, torch.zeros_like(x) if value is None else value)
        _, calls = self.heard(x)
        m = vars(self)["_buffers"]
        return calls, {name: m[name] for name in names}

    def advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        spec, kind, own = self.plan.spec, self.plan.more, self
        names = STATES[kind.name]
        before: Any = {n: torch.zeros_like(x) if s is None else s for n, s in zip(names, state, strict=True)}
        ((_, r), (z, spikes)), after = self._heard_step(x, state)
        m: Any = own
        current = x + m.recurrent(before["spk"]) if "spk" in names else x
        found: dict[str, Tensor] = {}
        if "syn" in names:
            current = found["syn"] = valued(lambda: after["syn"], m.alpha.clamp(0, 1) * before["syn"] + current)
        start = before["mem"]
        if kind.reset == "zero":
            start = (1 - r) * start
            current = current if kind.name == "Leaky" else (1 - r) * current
        if kind.fixed:
            y, h = neurons(current[None], spec, start, None, self.plan.jet, (spikes[None], z[None], after["mem"][None]))
        else:
            h = m.beta.clamp(0, 1) * start + current
            h = h - r * m.threshold if kind.reset == "subtract" else h
            y, _ = neurons((h - m.threshold)[None], spec, None, None, self.plan.jet, (spikes[None], z[None], z[None]))
        y = y[0]
        if kind.at_once and kind.reset != "none":
            h = h - (y - r) * (m.threshold if kind.reset == "subtract" else h)
        found["mem"] = h if kind.fixed and not kind.at_once else valued(lambda: after["mem"], h)
        found["spk"] = y
        return y, tuple(found[name] for name in names)

    def over_time(self, x: Tensor, steps: int, state: State) -> Tensor:
        kind, names, own = self.plan.more, STATES[self.plan.more.name], self
        m: Any = own
        dense = (
            names == ("spk", "mem")
            and type(m.recurrent) is nn.Linear
            and kind.reset != "zero"
            and state == (None,) * len(state)
        )
        if not kind.fixed or kind.at_once or ("spk" in names and not dense):
            return super().over_time(x, steps, state)
        before: Any = dict(zip(names, state, strict=True))
        resets: list[Tensor] = []
        zs: list[Tensor] = []
        spikes: list[Tensor] = []
        now = state
        for t in range(steps):
            ((_, r), (z, y)), after = self._heard_step(x[t if len(x) > 1 else 0], now)
            now = tuple(after[name] for name in names)
            for found, value in zip((resets, zs, spikes), (r, z, y), strict=True):
                found.append(value)
        if "syn" in names:
            i, currents = torch.zeros_like(x[0]) if before["syn"] is None else before["syn"], []
            for t in range(steps):
                i = m.alpha.clamp(0, 1) * i + x[t if len(x) > 1 else 0]
                currents.append(i)
            x = torch.stack(currents)
        start, z, y = before["mem"], torch.stack(zs), torch.stack(spikes)
        spec = replace(self.plan.spec, steps=steps, ends=start is not None and start.requires_grad)
        if dense:
            x = x if m.recurrent.bias is None else x + m.recurrent.bias
            return recurrent_neurons(x, m.recurrent.weight, spec, y, z, self.plan.jet)
        if kind.reset == "zero":  # the potential that is handed on is kept from zero by 1 - r, without derivatives
            spec, start = replace(spec, reset="hard"), None if start is None else (1 - resets[0]) * start
            z = torch.where(y > 0, z, z.clamp_max(-torch.finfo(z.dtype).tiny))  # the library does not fire at 0
            x = x if kind.name == "Leaky" else (1 - torch.stack(resets)) * x
        return neurons(x, replace(spec, static=len(x) < steps), start, None, self.plan.jet, (y, z, z))[0]


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
