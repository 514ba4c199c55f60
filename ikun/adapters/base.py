"""The interface between `adapt` and each library. No library is imported: its classes are recognized by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools import nested
from hessian_tools.checks import ObjectiveError
from hessian_tools.evaluation import twice_differentiable
from hessian_tools.io.errors import ParameterError
from ikun.surrogate_check import Spike, first_line

FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


class AdapterError(ParameterError):
    """A model or file that cannot be adapted. The message is one line that says what to do."""


def run_forward(call: Callable[[Any], Tensor], x: Any) -> Tensor:
    """Return call(x). An error in the network becomes an AdapterError with one line."""
    try:
        with twice_differentiable():
            return call(x)
    except (AdapterError, ObjectiveError):
        raise
    except FAILURES as error:
        shapes = ", ".join(str(list(t.shape)) for t in nested.tensors(x))
        raise AdapterError(f"the network fails on inputs of shape {shapes}: {first_line(error)}") from error


@dataclass(frozen=True)
class Slot:
    """A place where a neuron keeps its surrogate.

    Attributes:
        name: Path of the attribute in the network.
        neuron: The module that has the attribute.
        function: The surrogate.
        put: Replaces the surrogate.
        label: The class and constants of the surrogate, in words.
        constants: Whether the neuron calls the surrogate with more arguments than x, such as a width.
    """

    name: str
    neuron: nn.Module
    function: Spike
    put: Callable[[Any], None]
    label: str
    constants: bool = False


@dataclass(frozen=True)
class Library:
    """How to handle the networks of one library. Every function takes a network or a module of it.

    Attributes:
        package: Name of the library's top-level package.
        clear: Clears the state of the network without writing into tensors that an autograd graph may hold.
        prepare: Switches the network to torch's own operations, if the library has other backends.
        slots: Yields the places of the surrogates.
        neurons: Returns the spiking modules, which must stay in training mode.
        by_step: Whether one call of the network is one time step.
        takes_time: Whether the input of a neuron has time as its first axis.
        time_first: Whether a network that takes all steps in one call has inputs [T, N, ...] instead of [N, T, ...].
    """

    package: str
    clear: Callable[[nn.Module], None]
    prepare: Callable[[nn.Module], None]
    slots: Callable[[nn.Module], Iterator[Slot]]
    neurons: Callable[[nn.Module], list[nn.Module]]
    by_step: Callable[[nn.Module], bool]
    takes_time: Callable[[nn.Module], bool]
    time_first: bool = True


def nothing(model: nn.Module) -> None:
    """Do nothing, for a library that has no state or no other backends."""


def origins(module: nn.Module) -> set[str]:
    """Return the top-level packages of the module's class and of its base classes."""
    return {c.__module__.partition(".")[0] for c in type(module).__mro__}


def bases(module: nn.Module) -> set[str]:
    """Return the names of the module's class and of its base classes."""
    return {c.__name__ for c in type(module).__mro__}


SURROGATES = ("surrogate_function", "spike_grad")  # the names in SpikingJelly and snnTorch


def attribute_slots(model: nn.Module) -> Iterator[Slot]:
    """Yield the attributes named in SURROGATES, and all attributes that are the `apply` of an autograd function."""
    for path, module in model.named_modules():
        for name, value in [*vars(module).items(), *module._modules.items()]:
            if (name in SURROGATES and callable(value)) or _is_function(value):
                many = _is_function(value) and arguments(value.__self__) != 1
                yield Slot(f"{path}.{name}".strip("."), module, value, _setter(module, name), _label(value), many)


def _is_function(value: Any) -> bool:
    """Whether a value is the `apply` of an autograd function."""
    owner = getattr(value, "__self__", None) if isinstance(value, MethodType) else None
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def arguments(function: Any) -> int:
    """Return the number of arguments of an autograd function, of either style."""
    own_context = function.setup_context is torch.autograd.Function.setup_context
    return len(inspect.signature(function.forward).parameters) - own_context


def _setter(module: nn.Module, name: str) -> Callable[[Spike], None]:
    """Return a function that replaces the attribute `name` of the module."""

    def put(spike: Spike) -> None:
        delattr(module, name)  # torch refuses to register a module under the name of an attribute
        setattr(module, name, spike)

    return put


def _label(value: Any) -> str:
    """Describe a surrogate by its class or function and its constants."""
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
