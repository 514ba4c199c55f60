"""Record the calls of torch's functions in a forward pass, so that they can be run again in another order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import _pytree as pytree

State = tuple[Tensor | None, ...]
ZEROS = {torch.zeros, torch.zeros_like, Tensor.new_zeros}
PLAIN = (bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, ModuleType)
UNBINDING = {Tensor.unbind, torch.unbind}


class UnrecordableError(Exception):
    """The calls of a forward pass do not tell what it computes."""


class Stepping(Protocol):
    """A module that runs one time step, or all of them at once.

    Attributes:
        rests_at_zero: Whether None as its state means zeros.
    """

    @property
    def rests_at_zero(self) -> bool: ...

    def advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the outputs of one step for inputs x [N, ...], and the state after it."""

    def over_time(self, x: Tensor, steps: int, state: State) -> Tensor:
        """Return the outputs [T, ...] of all steps for inputs x [T, N, ...], or [1, N, ...] if all are the same."""


@dataclass(frozen=True)
class Ref:
    """A tensor of the forward pass, by number."""

    number: int


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A call of a function.

    Attributes:
        func: The function.
        args: Its arguments, with a `Ref` for every tensor.
        kwargs: Its named arguments.
        outs: Its outputs. Outputs that are not tensors are left out.
        grad: Whether derivatives are followed.
        node: The module whose step this is, or None.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[Ref, ...]
    grad: bool
    node: Stepping | None = None

    def refs(self) -> list[Ref]:
        """Return the tensors among the arguments."""
        return [a for a in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(a, Ref)]

    def run(self, fetch: Callable[[Ref], Tensor]) -> list[Tensor]:
        """Run the call. Returns the outputs that are tensors."""
        args, kwargs = pytree.tree_map_only(Ref, fetch, (self.args, self.kwargs))
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return [t for t in pytree.tree_leaves(self.func(*args, **kwargs)) if isinstance(t, Tensor)]


@dataclass(frozen=True)
class Record:
    """The calls of a forward pass.

    Attributes:
        calls: The calls in their order.
        values: The inputs: parameters and buffers, then those of the batch.
        constants: Other tensors that the forward pass uses.
        out: The output.
        meta: A tensor without values for every `Ref`.
    """

    calls: list[RecordedCall]
    values: list[Ref]
    constants: dict[Ref, Tensor]
    out: Ref
    meta: dict[Ref, Tensor]


def run_step(node: Stepping, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Run one time step of a module. While a forward pass is recorded, it is one call."""
    mode = _get_current_function_mode()
    return mode.step(node, x, state) if isinstance(mode, Tape) else node.advance(x, state)


class Tape(TorchFunctionMode):
    """The mode in which calls are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []
        self.constants: dict[Ref, Tensor] = {}
        self.meta: dict[Ref, Tensor] = {}
        self.thread = threading.get_ident()
        self.inside = False
        self._refs: dict[int, Ref] = {}
        self._custom: set[Ref] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        before = [(t, t._version) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        with self._hidden():
            found = func(*args, **kwargs)
        if any(t._version != version for t, version in before):
            raise UnrecordableError("a tensor is changed in place")
        if func is Tensor.to and len(before) > 1:
            args, kwargs = (args[0], found.device, found.dtype), {}
        if func in UNBINDING and (axis := kwargs.get("dim", args[1] if len(args) > 1 else 0)) in (0, 1):
            for place, part in enumerate(found):
                self._note(Tensor.__getitem__, (args[0], (slice(None), place) if axis else place), {}, part)
        else:
            self._note(func, args, kwargs, found)
        return found

    def step(self, node: Stepping, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Record a step of a module as one call."""
        with self._hidden():
            found = node.advance(x, state)
        self._note(_Step(node), (x, state), {}, found, node)
        return found

    def apply(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of an autograd function as one call."""
        with self._hidden():
            found = function(*args, **kwargs)
        self._note(function, args, kwargs, found)
        return found

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def _note(self, func: Any, args: Any, kwargs: Any, found: Any, node: Stepping | None = None) -> None:
        outs = [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]
        if not outs or all(id(t) in self._refs for t in outs):
            return
        if any(holds_tensors(a) for a in pytree.tree_leaves((args, kwargs)) if not isinstance(a, Tensor)):
            raise UnrecordableError("an argument of a function is an object that holds tensors")
        args, kwargs = pytree.tree_map_only(Tensor, self._ref, (tuple(args), dict(kwargs)))
        if not any(isinstance(a, Ref) for a in pytree.tree_leaves((args, kwargs))):
            kwargs["dtype"] = outs[0].dtype  # torch's default is another one at other times
        refs = tuple(self._refs.get(id(t)) or self.new(t) for t in outs)
        self.calls.append(RecordedCall(func, args, kwargs, refs, torch.is_grad_enabled(), node))
        self._custom.update(ref for ref, t in zip(refs, outs, strict=True) if isinstance(t.grad_fn, BackwardCFunction))

    def new(self, t: Tensor) -> Ref:
        """Return the number of a tensor that is not known yet."""
        ref = Ref(len(self.meta))
        self.meta[ref] = t  # ids are of living tensors
        self._refs[id(t)] = ref
        return ref

    def _ref(self, t: Tensor) -> Ref:
        known = self._refs.get(id(t))
        if known is None:
            if isinstance(t, FakeTensor):
                raise UnrecordableError("a tensor comes from code that calls no function of torch")
            known = self.new(t)
            self.constants[known] = t
        if isinstance(t.grad_fn, BackwardCFunction) and known not in self._custom:
            raise UnrecordableError("an autograd function is called in a way that no mode of torch sees")
        return known

    def known(self, t: Tensor) -> Ref:
        """Return the number of an output. Raises UnrecordableError if no recorded call made it."""
        return self._ref(t)


def holds_tensors(value: Any, seen: set[int] | None = None) -> bool:
    """Return whether an object has tensors in its attributes, or a function in what it closes over.

    Run again, a recorded call would use them as they were.
    """
    if isinstance(value, Tensor):
        return True
    seen = set() if seen is None else seen
    if value is None or isinstance(value, PLAIN) or id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, MethodType):
        parts = [value.__self__, value.__func__]
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        parts = [*cells, value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
        parts += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
    return any(holds_tensors(part, seen) for part in parts)


class Inside(nn.Module):
    """Calls a function. A checkpointed part of the model runs again in the backward pass, with the traced weights."""

    def __init__(self, model: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Any:
        return self.function()


@dataclass(frozen=True)
class _Step:
    node: Stepping

    def __call__(self, x: Tensor, state: State) -> Any:
        return self.node.advance(x, state)


@contextmanager
def _applied(tape: Tape) -> Iterator[None]:
    """Let autograd functions that this thread calls be recorded, which no mode of torch sees."""
    own = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        function = own.__get__(None, cls)
        if tape.inside or threading.get_ident() != tape.thread:
            return function(*args, **kwargs)
        return tape.apply(function, args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = own  # type: ignore[method-assign]


def record(
    model: nn.Module,
    state: dict[str, Tensor],
    x: Sequence[Tensor],
    forward: Callable[[Sequence[Tensor]], Any],
    mode: FakeTensorMode | None = None,
) -> Record:
    """Record a forward pass, without values.

    Args:
        model: The model. Its state may change.
        state: Its parameters and buffers by name.
        x: The tensors of the inputs.
        forward: Runs the model on such tensors.
        mode: The mode of x if these are fake tensors.

    Raises:
        UnrecordableError: If the calls do not tell what the forward pass computes.
    """
    tape = Tape()
    with mode or FakeTensorMode(allow_non_fake_inputs=True) as fake:
        values: dict[str, Tensor] = {name: fake.from_tensor(t.detach()) for name, t in state.items()}
        for name, _ in model.named_parameters():  # so that functions with derivatives of their own are seen
            values[name].requires_grad_(values[name].is_floating_point())
        inputs = list(x) if mode else [fake.from_tensor(t.detach()) for t in x]
        refs = [tape.new(t) for t in [*values.values(), *inputs]]
        with _applied(tape), tape:
            inside = {f"model.{name}": t for name, t in values.items()}
            out = functional_call(Inside(model, lambda: forward(inputs)), inside, ())
        if not isinstance(out, Tensor):
            raise UnrecordableError("the network does not return a tensor")
        result = tape.known(out)
    return Record(tape.calls, refs, tape.constants, result, tape.meta)
