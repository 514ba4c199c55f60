"""SpikingJelly (Fang et al. 2023), 0.0.0.0.14 to 2.0: state in `MemoryModule`s, surrogates in `surrogate_function`."""

from __future__ import annotations

import copy

from torch import nn

from ikun.adapters.base import Library, attribute_slots, bases, origins


def _clear(model: nn.Module) -> None:
    """functional.reset_net. Its reset() may write into the state's tensors, which a graph may hold: new ones first."""
    for module in model.modules():
        if "MemoryModule" in bases(module):
            memory, start = vars(module)["_memories"], vars(module)["_memories_rv"]
            memory.update({name: copy.deepcopy(start[name]) for name in memory})
        if callable(reset := getattr(module, "reset", None)):
            reset()


def _prepare(model: nn.Module) -> None:
    """CuPy's and Triton's kernels have a backward pass of their own, which cannot be differentiated."""
    for module in model.modules():
        if isinstance(getattr(module, "backend", None), str) and "spikingjelly" in origins(module):
            setattr(module, "backend", "torch")  # noqa: B010


def _neurons(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if callable(getattr(m, "surrogate_function", None))]


def _takes_time(module: nn.Module) -> bool:
    return getattr(module, "step_mode", "m" if "MultiStepModule" in bases(module) else "s") == "m"


SPIKINGJELLY = Library(
    package="spikingjelly",
    clear=_clear,
    prepare=_prepare,
    slots=attribute_slots,
    neurons=_neurons,
    by_step=lambda model: not any(_takes_time(m) for m in model.modules()),
    takes_time=_takes_time,
)
