"""SpikingJelly's IF, LIF and PLIF neurons as nodes of the traced graph.

These are IFNode, LIFNode and ParametricLIFNode, SimpleIFNode and SimpleLIFNode, and of version 0.0.0.0.12
MultiStepIFNode, MultiStepLIFNode and MultiStepParametricLIFNode.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ikun.adapters.neuron_nodes import LibraryNode, Plan, UnfitError, library_class, library_surrogate, surrogate_plan
from ikun.adapters.spikingjelly import takes_time
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
        plan, timed = self.plan, takes_time(self)
        steps = x if timed else x[None]
        start = _start(self.v, steps[0], plan.spec.v_reset)
        values = None
        if not plan.exact:
            _, calls = self.heard(x)
            z, spikes = (torch.stack(parts) for parts in zip(*calls, strict=True))
            h = z + plan.spec.threshold
            hard = plan.spec.reset == "hard"
            v = torch.where(spikes > 0, plan.spec.v_reset, h) if hard else h - plan.spec.threshold * spikes
            last = self.v.detach()[None]
            values = spikes, z, torch.cat([v[:-1], last]) if len(v) > 1 else last
        w = self._parameters.get("w")
        gain = None if w is None else w.sigmoid()
        if gain is not None and not self.decay_input:
            steps = steps / gain
        y, self.v = neurons(steps, plan.spec, start, gain, plan.jet, values)
        return y if timed else y[0]


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
