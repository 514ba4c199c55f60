"""SpikingJelly (Fang et al. 2023), versions 0.0.0.0.12 to 2.0.

`MemoryModule`s hold the state, and the attribute `surrogate_function` holds the surrogate.
"""

from __future__ import annotations

import copy

from torch import nn

from ikun.adapters.base import Library, attribute_slots, bases, origins


def _clear(model: nn.Module) -> None:
    """Clear the state, as functional.reset_net does.

    reset() may write into the tensors of the state, which an autograd graph may need, so they are replaced first.
    """
    for module in model.modules():
        if "MemoryModule" in bases(module):
            memory, start = vars(module)["_memories"], vars(module)["_memories_rv"]
            memory.update({name: copy.deepcopy(start[name]) for name in memory})
        if callable(reset := getattr(module, "reset", None)):
            reset()


def _prepare(model: nn.Module) -> None:
    """Select torch as the backend. The backward passes of the CuPy and Triton kernels cannot be differentiated."""
    for module in model.modules():
        if isinstance(getattr(module, "backend", None), str) and "spikingjelly" in origins(module):
            setattr(module, "backend", "torch")  # noqa: B010


def _neurons(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if callable(getattr(m, "surrogate_function", None))]


def takes_time(module: nn.Module) -> bool:
    """Whether a module takes [T, N, ...]. Up to 0.0.0.0.12 such modules are classes of their own."""
    if any(name.startswith("MultiStep") or name == "SeqToANNContainer" for name in bases(module)):
        return getattr(module, "step_mode", "m") == "m"
    return getattr(module, "step_mode", "m" if "MultiStepModule" in bases(module) else "s") == "m"


SPIKINGJELLY = Library(
    package="spikingjelly",
    clear=_clear,
    prepare=_prepare,
    slots=attribute_slots,
    neurons=_neurons,
    by_step=lambda model: not any(takes_time(m) for m in model.modules()),
    takes_time=takes_time,
)
