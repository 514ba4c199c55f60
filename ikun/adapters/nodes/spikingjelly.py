"""SpikingJelly's IF, LIF and PLIF neurons as nodes of the traced graph.

These are IFNode, LIFNode and ParametricLIFNode, SimpleIFNode and SimpleLIFNode, and of version 0.0.0.0.12
MultiStepIFNode, MultiStepLIFNode and MultiStepParametricLIFNode.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.engine.tape import run_step
from ikun.adapters.libraries.spikingjelly import takes_time
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

KINDS = ("IF", "LIF", "ParametricLIF")
NAMES = {f"{prefix}{kind}Node": kind for kind in KINDS for prefix in ("", "Simple", "MultiStep")}
STEPS = {
    "forward", "single_step_forward", "multi_step_forward", "single_step_functional_forward",
    "multi_step_functional_forward", "neuronal_charge", "neuronal_fire", "neuronal_reset", "apply_hard_reset",
    "apply_soft_reset", "materialize_states",
}  # fmt: skip


class SpikingJellyNode(LibraryNode):
    """The forward pass of one step [N, ...] or of all steps [T, N, ...]."""

    v: Any

    def forward(self, x: Tensor) -> Tensor:
        timed = takes_time(self)
        start = _start(self.v, x[0] if timed else x, self.plan.spec.v_reset)
        if timed:
            y, self.v = self._run(x, start, [x], len(x))
        else:
            y, (self.v,) = run_step(self, x, (start,))
        return y

    def advance(self, x: Tensor, state: tuple[Tensor | None, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        y, end = self._run(x[None], state[0], [x], 1)
        return y[0], (end,)

    def over_time(self, x: Tensor, steps: int, state: tuple[Tensor | None, ...]) -> Tensor:
        return self._run(x, state[0], list(x) if len(x) == steps else [x[0]] * steps, steps)[0]

    def _run(self, x: Tensor, start: Tensor | None, calls: list[Tensor], steps: int) -> tuple[Tensor, Tensor]:
        """Return spikes and last potential for x [T or 1, N, ...]. calls: the inputs of the library's own calls."""
        plan, values = self.plan, None
        if not plan.exact:
            self.v = plan.spec.v_reset if start is None else start
            z, spikes = (torch.stack(p) for p in zip(*(pair for c in calls for pair in self.heard(c)[1]), strict=True))
            h = z + plan.spec.threshold
            hard = plan.spec.reset == "hard"
            v = torch.where(spikes > 0, plan.spec.v_reset, h) if hard else h - plan.spec.threshold * spikes
            last = self.v.detach()[None]
            values = spikes, z, torch.cat([v[:-1], last]) if len(v) > 1 else last
        w = self._parameters.get("w")
        gain = None if w is None else w.sigmoid()
        if gain is not None and not self.decay_input:
            x = x / gain
        return neurons(x, replace(plan.spec, steps=steps, static=len(x) < steps), start, gain, plan.jet, values)


def _start(v: Any, x: Tensor, rest: float) -> Tensor | None:
    """Return the potential before the first step; None at rest."""
    if isinstance(v, Tensor):
        return v if v.shape == x.shape else None
    return None if float(v) == rest else torch.full_like(x, float(v))


def spikingjelly_node(module: nn.Module) -> tuple[type[LibraryNode], Plan]:
    """Return the node of a neuron.

    Raises:
        UnfitError: If its equations are not those of the kernels.
    """
    own = library_class(module, NAMES, STEPS)
    m: Any = module
    kind, threshold, reset = NAMES[own], m.v_threshold, m.v_reset
    if not isinstance(threshold, int | float) or not isinstance(reset, int | float | None):
        raise UnfitError("its threshold or reset is a tensor")
    if getattr(m, "store_v_seq", False) or getattr(m, "_neuron_precision", None) is not None:
        raise UnfitError("it stores its potentials" if m.store_v_seq else "it has a precision of its own")
    rate = 1.0 if kind == "IF" else None if kind == "ParametricLIF" else 1 / float(m.tau)
    decays = kind == "IF" or getattr(m, "decay_input", True)
    surrogate = surrogate_plan(library_surrogate(module))
    fires = bool(library_surrogate(module)(torch.zeros(1)))
    if not fires and reset is not None:
        raise UnfitError("its surrogate does not fire at the threshold")
    rest = 0.0 if reset is None else float(reset)
    spec = ScanSpec(
        surrogate=surrogate["surrogate"], decay=1.0 if kind == "IF" or rate is None else 1 - rate,
        gain=rate if decays and rate is not None else 1.0, threshold=float(threshold), v_reset=rest,
        reset="soft" if reset is None else "hard", detach_reset=bool(m.detach_reset),
    )  # fmt: skip
    # The kernels round as the library does where nothing is rounded before the only sum.
    dyadic = rate is not None and math.frexp(rate)[0] == 0.5 and not decays and rest == 0
    return SpikingJellyNode, Plan(spec, surrogate["jet"], exact=fires and (kind == "IF" or dyadic))
