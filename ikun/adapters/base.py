"""What an adapter has to know of a library, without importing it: classes are known by the module they come from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ikun.surrogate_check import Spike


class AdapterError(ValueError):
    """A model or file that cannot be adapted: one line, with what to do about it."""


@dataclass(frozen=True)
class Slot:
    """Where a neuron keeps its surrogate. put: replaces it. label: its class, in words."""

    name: str
    neuron: nn.Module
    function: Spike
    put: Callable[[Spike], None]
    label: str


@dataclass(frozen=True)
class Library:
    """package: its top-level module. clear: forget the state (of modules whose state is in no graph). prepare: leave
    torch as the only backend. slots: the surrogates. neurons: the spiking modules, which must stay in training mode.
    by_step: whether one call of the network is one step of time. takes_time: whether a neuron's input starts with an
    axis of time.
    """

    package: str
    clear: Callable[[nn.Module], None]
    prepare: Callable[[nn.Module], None]
    slots: Callable[[nn.Module], Iterator[Slot]]
    neurons: Callable[[nn.Module], list[nn.Module]]
    by_step: Callable[[nn.Module], bool]
    takes_time: Callable[[nn.Module], bool]


def nothing(model: nn.Module) -> None:
    """A library without state or backends of its own."""


def origins(module: nn.Module) -> set[str]:
    """Top-level packages of the module's class and of its bases."""
    return {c.__module__.partition(".")[0] for c in type(module).__mro__}


def bases(module: nn.Module) -> set[str]:
    """Names of the module's class and of its bases."""
    return {c.__name__ for c in type(module).__mro__}


SURROGATES = ("surrogate_function", "spike_grad")  # as SpikingJelly and snnTorch call them


def attribute_slots(model: nn.Module) -> Iterator[Slot]:
    """Attributes with those names, and any attribute that is the `apply` of an autograd function."""
    for path, module in model.named_modules():
        for name, value in [*vars(module).items(), *module._modules.items()]:
            if (name in SURROGATES and callable(value)) or _is_function(value):
                yield Slot(f"{path}.{name}".strip("."), module, value, _setter(module, name), _label(value))


def _is_function(value: Any) -> bool:
    owner = getattr(value, "__self__", None) if isinstance(value, MethodType) else None
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def _setter(module: nn.Module, name: str) -> Callable[[Spike], None]:
    def put(spike: Spike) -> None:
        delattr(module, name)  # a plain attribute must go before a module can take its name
        setattr(module, name, spike)

    return put


def _label(value: Any) -> str:
    if isinstance(value, nn.Module):
        return str(value).partition("\n")[0]
    if _is_function(value):
        return str(value.__self__.__name__)
    constants = inspect.getclosurevars(value).nonlocals if isinstance(value, FunctionType) else {}
    name = str(getattr(value, "__qualname__", type(value).__name__)).removesuffix(".<locals>.inner")
    return f"{name}({', '.join(f'{key}={constant}' for key, constant in constants.items())})" if constants else name


PLAIN = Library(
    package="torch",
    clear=nothing,
    prepare=nothing,
    slots=attribute_slots,
    neurons=lambda model: [slot.neuron for slot in attribute_slots(model)],
    by_step=lambda model: True,
    takes_time=lambda module: False,
)
