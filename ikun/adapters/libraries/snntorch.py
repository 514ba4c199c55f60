"""snnTorch (Eshraghian et al. 2023): `reset_mem` clears the state, and `spike_grad` holds the surrogate."""

from __future__ import annotations

from torch import nn

from ikun.adapters.base import Library, attribute_slots, bases

WITH_TIME = {"StateLeaky", "LeakyParallel"}  # their input is [T, N, C]


def _clear(model: nn.Module) -> None:
    """Clear the state of all neurons. snntorch.utils.reset handles only direct children of the network."""
    for module in model.modules():
        if callable(reset := getattr(module, "reset_mem", None)):
            reset()


def _prepare(model: nn.Module) -> None:
    """Let the kind of reset be a number, because a traced network cannot branch on the value of a buffer."""
    for module in model.modules():
        if (value := module._buffers.get("reset_mechanism_val")) is not None:
            vars(module)["reset_mechanism_val"] = int(value)  # hides the buffer, which stays in the state dict


def _takes_time(module: nn.Module) -> bool:
    return bool(WITH_TIME & bases(module))


SNNTORCH = Library(
    package="snntorch",
    clear=_clear,
    prepare=_prepare,
    slots=attribute_slots,
    neurons=lambda model: [m for m in model.modules() if callable(getattr(m, "spike_grad", None))],
    by_step=lambda model: not any(_takes_time(m) for m in model.modules()),
    takes_time=_takes_time,
)
