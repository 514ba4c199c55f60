"""Norse (Pehle & Pedersen 2021): the state is an argument, and the parameters `p` choose the surrogate by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

from ikun.adapters.base import Library, Slot, bases, nothing
from ikun.surrogate_check import Spike

WITH_TIME = {"SNN", "SNNRecurrent", "Lift"}  # their input is [T, N, ...]; that of cells is [N, ...]


def _neurons(model: nn.Module) -> list[nn.Module]:
    """Return the modules that have a step function and parameters."""
    return [m for m in model.modules() if isinstance(getattr(m, "activation", None), FunctionType) and hasattr(m, "p")]


def _slots(model: nn.Module) -> Iterator[Slot]:
    """Yield the slot of every neuron whose step function calls `threshold(x, method, alpha)`."""
    for path, module in model.named_modules():
        if module not in _neurons(model) or (threshold := _found(module.activation)) is None:
            continue
        p = _with_method(module.p)
        if p is None:
            continue

        def function(x: Any, threshold: Any = threshold, p: Any = p) -> Any:
            return threshold(x, p.method, p.alpha)

        def put(spike: Spike, module: nn.Module = module) -> None:
            vars(module)["activation"] = _rebound(vars(module)["activation"], spike)

        yield Slot(f"{path}.activation".strip("."), module, function, put, f"{p.method}, alpha {float(p.alpha):g}")


@dataclass(frozen=True)
class Threshold:
    """A function `threshold` of Norse that calls a given surrogate."""

    spike: Spike

    def __call__(self, x: Any, method: Any, alpha: Any) -> Any:
        return self.spike(x)


def surrogate_in(step: FunctionType) -> Spike | None:
    """Return the surrogate that replaces `threshold` in a step function, directly or in functions that it calls."""
    if isinstance(found := step.__globals__.get("threshold"), Threshold) and "threshold" in step.__code__.co_names:
        return found.spike
    return next((inner for f in _called(step).values() if (inner := surrogate_in(f)) is not None), None)


def _called(step: FunctionType) -> dict[str, FunctionType]:
    """Return the functions of Norse that a step function calls by name."""
    named = {name: step.__globals__.get(name) for name in step.__code__.co_names}
    return {name: f for name, f in named.items() if isinstance(f, FunctionType) and f.__module__.startswith("norse.")}


def _found(step: FunctionType) -> FunctionType | None:
    """Return the function `threshold` that a step function calls, directly or through other functions of Norse."""
    for name, function in _called(step).items():
        if name == "threshold":
            return function
        if inner := _found(function):
            return inner
    return None


def _rebound(step: FunctionType, spike: Spike) -> FunctionType:
    """Copy a step function with another `threshold`, also in the functions that it calls."""
    others: dict[str, Any] = {
        name: Threshold(spike) if name == "threshold" else _rebound(function, spike)
        for name, function in _called(step).items()
    }
    scope = {**step.__globals__, **others}
    again = FunctionType(step.__code__, scope, step.__name__, step.__defaults__, step.__closure__)
    again.__kwdefaults__ = step.__kwdefaults__
    again.__module__ = step.__module__
    return again


def _with_method(p: Any) -> Any:
    """Return the parameters that name the surrogate, which some neurons nest in other parameters."""
    if hasattr(p, "method"):
        return p
    inner = [_with_method(value) for value in p] if isinstance(p, tuple) else []
    return next((value for value in inner if value is not None), None)


def norse_takes_time(module: nn.Module) -> bool:
    return bool(WITH_TIME & bases(module))


NORSE = Library(
    package="norse",
    clear=nothing,
    prepare=nothing,
    slots=_slots,
    neurons=_neurons,
    by_step=lambda model: not any(norse_takes_time(m) for m in model.modules()),
    takes_time=norse_takes_time,
)
