"""Sinabs' LIF and IAF layers with single spikes as nodes of the traced graph.

i = alpha_syn (i + x)                  only with tau_syn; otherwise i = x
h = alpha v + (1 - alpha) i            norm_input; otherwise h = alpha v + i
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.engine.nodes import valued
from ikun.adapters.libraries.sinabs import SpikeFunction
from ikun.adapters.nodes.replacement import LibraryNode, Plan, UnfitError, library_class, surrogate_plan
from ikun.nodes.autograd import neurons
from ikun.nodes.passes import ScanSpec

NAMES = ("LIF", "IAF", "LIFRecurrent", "IAFRecurrent", "ExpLeak", "ALIF")
STEPS = {"forward", "alpha_mem_calculated", "alpha_syn_calculated"}


class SinabsNode(LibraryNode):
    """The forward pass of all steps [N, T, ...], or of [N T, ...] in a layer that splits it."""

    def surrogate(self) -> Any:
        return vars(self)["spike_fn"]

    def forward(self, input_data: Tensor) -> Tensor:
        own: Any = self
        if hasattr(self, "squeeze_forward"):
            x = input_data.reshape(own.batch_size, own.num_timesteps, *input_data.shape[1:])
        else:
            x = input_data
        spec, shape = self.plan.spec, (len(x), *x.shape[2:])
        before = {name: t if t is not None and t.shape == shape else None for name, t in self._buffers.items()}
        out, calls = self.heard(input_data)
        z, y = (torch.stack(parts) for parts in zip(*calls, strict=True))
        h = z + spec.threshold
        v = torch.where(y > 0, torch.zeros_like(h), h) if spec.reset == "hard" else h - spec.threshold * y
        currents = x.transpose(0, 1)
        if (alpha := own.alpha_syn_calculated) is not None:
            i: Any = before["i_syn"]
            found = []
            for current in currents:
                i = alpha * (current if i is None else i + current)
                found.append(i)
            after = self.get_buffer("i_syn")
            self._buffers["i_syn"] = valued(lambda: after, i)
            currents = torch.stack(found)
        gain = None
        if self.plan.more:
            gain = 1 - own.alpha_mem_calculated
            currents = currents if own.norm_input else currents / gain
        spikes, end = neurons(currents.contiguous(), spec, before["v_mem"], gain, self.plan.jet, (y, z, v))
        last = self.get_buffer("v_mem")
        self._buffers["v_mem"] = valued(lambda: last, end)
        return spikes.transpose(0, 1).reshape(out.shape)


def sinabs_node(module: nn.Module) -> tuple[type[LibraryNode], Plan]:
    """Return the node of a neuron.

    Raises:
        UnfitError: If its equations are not those of the kernels.
    """
    m: Any = module
    name = library_class(module, NAMES, ())
    if name not in ("LIF", "IAF") or not type(module).__module__.startswith("sinabs."):
        raise UnfitError("its equations are not those of the kernels")
    function: SpikeFunction = m.spike_fn
    if getattr(function.own, "__name__", "") != "SingleSpike":
        raise UnfitError("it fires several spikes in a step")
    if function.jet is None:
        raise UnfitError("its surrogate is not a step at 0")
    if m.min_v_mem is not None or m.record_states:
        raise UnfitError("its potential is bounded, or recorded")
    if m.spike_threshold.requires_grad or m.spike_threshold.numel() != 1:
        raise UnfitError("its threshold is learned, or differs between neurons")
    reset, threshold = type(m.reset_fn).__name__, float(m.spike_threshold)
    if (reset, getattr(m.reset_fn, "subtract_value", getattr(m.reset_fn, "reset_value", None))) not in (
        ("MembraneSubtract", None), ("MembraneReset", 0.0),
    ):  # fmt: skip
        raise UnfitError("its reset is not that of the kernels")
    leaks = name == "LIF"
    if leaks and m.alpha_mem_calculated.numel() != 1:
        raise UnfitError("its time constants differ between neurons")
    surrogate = surrogate_plan(function.jet)
    hard = reset == "MembraneReset"
    spec = ScanSpec(surrogate["surrogate"], 1.0, 1.0, threshold, 0.0, "hard" if hard else "soft", detach_reset=hard)
    return SinabsNode, Plan(spec, surrogate["jet"], more=leaks)
