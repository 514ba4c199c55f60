"""Norse's neurons as nodes of the traced graph: LIF, LIFBox and IAF, as cells, over time and recurrent.

    j = i + W x + V z                  the current after a jump (LIF); j = x (LIFBox)
    h = v + dt / tau_mem (v_leak - v + j);   i <- j - dt / tau_syn j
    h = v + W x + V z                  (IAF)

The reset is hard, or soft for LIFBox with `reset_subtract`. In the recurrent LIF it has no derivative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools.engine.nodes import valued
from ikun.adapters.libraries.norse import norse_takes_time, surrogate_in
from ikun.adapters.nodes.replacement import LibraryNode, Plan, UnfitError, surrogate_plan
from ikun.adapters.two_jet import Jet
from ikun.nodes.autograd import neurons
from ikun.nodes.passes import ScanSpec

# The names of the step functions: whether they have a synaptic current, are recurrent, and leak.
STEPS = {
    "lif_feed_forward_step": (True, False, True), "lif_step": (True, True, True),
    "lif_box_feed_forward_step": (False, False, True),
    "iaf_feed_forward_step": (False, False, False), "iaf_step": (False, True, False),
}  # fmt: skip
MODULES = ("norse.torch.module.snn", "norse.torch.module.lif", "norse.torch.module.iaf", "norse.torch.module.lif_box")


@dataclass(frozen=True)
class _Kind:
    """Of a neuron.

    Attributes:
        synaptic: Whether the input jumps into a current that decays.
        recurrent: Whether it has weights of its own.
        decay: Factor of the current in a time step.
        shift: Added to the current, because the kernels decay to the potential of the reset.
    """

    synaptic: bool
    recurrent: bool
    decay: float
    shift: float


class NorseNode(LibraryNode):
    """The forward pass of one step [N, ...] or of all steps [T, N, ...]. It returns spikes and state."""

    def surrogate(self) -> Jet:
        found = surrogate_in(vars(self)["activation"])
        if not isinstance(found, Jet):
            raise UnfitError("its surrogate is learned, or is not a step at 0")
        return found

    def forward(self, input_tensor: Tensor, state: Any = None) -> Any:
        kind, own = self.plan.more, self
        timed = norse_takes_time(self)
        before: Any = own.state_fallback(input_tensor) if state is None else state  # type: ignore[operator]
        (_, after), calls = self.heard(input_tensor, state)
        steps = input_tensor if timed else input_tensor[None]
        zs, ys = (torch.stack(parts) for parts in zip(*calls, strict=True))
        zs = torch.where(ys > 0, zs, zs.clamp_max(-torch.finfo(zs.dtype).tiny))  # Norse does not fire at 0
        shape, like = zs.shape[1:], zs[0]
        i: Any = getattr(before, "i", None)
        z: Any = getattr(before, "z", None)
        v: Tensor = before.v.to(like).expand(shape)
        if not kind.recurrent:
            currents = []
            for x in steps:
                jump = i + x if kind.synaptic else x
                i = jump * kind.decay if kind.synaptic else None
                currents.append(jump)
            y, v = self._run(torch.stack(currents), zs, ys, v, after.v)
        else:
            out = []
            for t, x in enumerate(steps):
                jump = F.linear(x, self.input_weights) + F.linear(z, self.recurrent_weights)  # type: ignore[arg-type]
                jump = jump + (i if kind.synaptic else 0)
                i = jump * kind.decay if kind.synaptic else None
                z, v = self._run(jump[None], zs[t : t + 1], ys[t : t + 1], v, after.v if t == len(steps) - 1 else None)
                z = z[0]
                out.append(z)
            y = torch.stack(out)
        found = {"v": v} | ({"z": y[-1]} if kind.recurrent else {})
        if kind.synaptic:
            found["i"] = valued(lambda: after.i.to(like), i)
        y = y if timed else y[0]
        return y, after._replace(**found)

    def _run(self, x: Tensor, z: Tensor, y: Tensor, v: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        spec = self.plan.spec
        h = z + spec.threshold
        after = (
            torch.where(y > 0, torch.full_like(h, spec.v_reset), h) if spec.reset == "hard" else h - spec.threshold * y
        )
        values = after if last is None else torch.cat([after[:-1], last[None].to(after)])
        x = x + self.plan.more.shift if self.plan.more.shift else x
        return neurons(x, spec, v, None, self.plan.jet, (y, z, values))


def norse_node(module: nn.Module) -> tuple[type[LibraryNode], Plan]:
    """Return the node of a neuron.

    Raises:
        UnfitError: If its equations are not those of the kernels.
    """
    m: Any = module
    name = getattr(m.activation, "__name__", "")
    forward = type(module).forward.__module__
    if name not in STEPS or not m.activation.__module__.startswith("norse.torch.functional") or forward not in MODULES:
        raise UnfitError("its equations are not those of the kernels")
    if getattr(m, "record_states", False):
        raise UnfitError("it records its states")
    synaptic, recurrent, leaks = STEPS[name]
    jet, p = surrogate_in(m.activation), m.p
    if not isinstance(jet, Jet):
        raise UnfitError("its surrogate is learned, or is not a step at 0")
    for value in p:
        if isinstance(value, Tensor) and (
            isinstance(value, nn.Parameter) or value.grad_fn is not None or value.numel() != 1
        ):
            raise UnfitError("its parameters are learned, or differ between neurons")
    method = getattr(getattr(p, "reset_method", None), "__name__", "reset_value")
    if method not in ("reset_value", "reset_subtract"):
        raise UnfitError(f"its reset is {method}")
    soft = method == "reset_subtract"
    gain = float(m.dt * p.tau_mem_inv) if leaks else 1.0
    rest = float(p.v_leak) if leaks else 0.0
    reset = rest if soft else float(p.v_reset)
    decay = 1 - float(m.dt * p.tau_syn_inv) if synaptic else 0.0
    surrogate = surrogate_plan(jet)
    spec = ScanSpec(
        surrogate["surrogate"], 1 - gain if leaks else 1.0, gain, float(p.v_th), reset,
        "soft" if soft else "hard", name == "lif_step",
    )  # fmt: skip
    shift = rest - reset if leaks else 0.0
    return NorseNode, Plan(spec, surrogate["jet"], more=_Kind(synaptic, recurrent, decay, shift))
