"""Any torch network made ready for `make_objective`: state, time, outputs, modes and surrogates.

What could make its Hessian wrong is tried before anything is computed: a state that is not cleared, randomness, an
output of unexpected shape, a surrogate or a neuron whose second derivative is not what it should be.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.objective import evaluation_mode
from ikun.adapters.base import PLAIN, AdapterError, Library, origins
from ikun.adapters.norse import NORSE
from ikun.adapters.snntorch import SNNTORCH
from ikun.adapters.spikingjelly import SPIKINGJELLY
from ikun.adapters.time_loop import OUTPUTS, READOUTS, InTime, TimePlan, clear_state
from ikun.adapters.two_jet import Jet
from ikun.adapters.validation import LEAK, found_functions, run_forward, try_function, try_network, try_neurons
from ikun.surrogate_check import Spike, Verdict, check_surrogate, is_step

LIBRARIES: dict[str, Library] = {
    "spikingjelly": SPIKINGJELLY,
    "snntorch": SNNTORCH,
    "norse": NORSE,
    "none": PLAIN,
}
CURE = "give surrogate=, a spike function that can be differentiated twice, or another surrogate"
INSTEAD = "make it an attribute of its module, named surrogate_function, and give surrogate="


@dataclass(frozen=True)
class Found:
    """A surrogate of the network: where, what, its verdict, and whether another one now stands in its place."""

    name: str
    label: str
    verdict: Verdict
    replaced: bool


@dataclass(frozen=True, eq=False)
class Adapted:
    """model: a copy of the network, [N, ...] -> [N, K], for make_objective(adapted.model, ..., reset=adapted.reset).

    library: one of LIBRARIES. plan: how time is run. surrogates: those found. warnings: a line each.
    """

    model: nn.Module
    reset: Callable[[nn.Module], None] | None
    library: str
    plan: TimePlan
    surrogates: tuple[Found, ...] = ()
    warnings: tuple[str, ...] = ()


def adapt(
    model: nn.Module,
    x: Tensor,
    *,
    library: str | None = None,
    steps: int | None = None,
    sequences: bool = False,
    time_first: bool | None = None,
    output: str = "spikes",
    readout: str = "mean",
    surrogate: Spike | None = None,
    replacement: Spike | None = None,
    steeper: float = 1.0,
    reset: Callable[[nn.Module], None] | None = None,
) -> Adapted:
    """A copy of `model` as a function of batches; the model itself is left as it is.

    x [N, ...] is a sample of its inputs. library: spikingjelly, snntorch, norse or none; found by the classes of the
    layers if not given. steps: None for a model that runs through time by itself; T for one that is to be given x
    T times, or, with `sequences`, the T steps of x [N, T, ...]: step by step, or in one call where its layers want
    that ([T, N, ...]; time_first=False: [N, T, ...]). time_first also says where time is in what a model returns, if
    its shape does not. output: of a tuple, the first (spikes) or the last (membrane). readout: mean (the firing rate),
    sum, last or max over time. surrogate: x = h - threshold -> spikes, takes the place of the derivatives of every
    surrogate found; the spikes stay. replacement: the same, of those alone that could not be used as they are. steeper:
    a f'(a x) in place of f'(x), in the surrogates that stay. reset: clears what the library's own reset does not know
    of.

    Raises AdapterError (a ValueError) for anything that would make the Hessian wrong: one line that says what to do.
    """
    for name, value, known in (("output", output, OUTPUTS), ("readout", readout, READOUTS)):
        if value not in known:
            raise AdapterError(f"{name} must be one of {', '.join(known)}, not '{value}'")
    if steps is not None and steps < 1:
        raise AdapterError(f"steps must be at least 1, not {steps}")
    if sequences and steps is None:
        raise AdapterError("sequences=True needs steps=, the number of steps of a sample")
    if not isinstance(x, Tensor) or x.dim() < 2 or not len(x):
        raise AdapterError("x must be a batch of inputs [N, ...], at least one sample")
    network = _copied(bare(model))
    name, kind = _library(network, library)
    if reset is not None:
        kind = replace(kind, clear=_both(kind.clear, reset))
    kind.prepare(network)
    surrogates = tuple(_settled(network, kind, surrogate, replacement, steeper))
    by_step = steps is not None and time_first is None and kind.by_step(network)
    carries = by_step and name == "norse" and "state" in inspect.signature(network.forward).parameters
    plan = TimePlan(steps, sequences, by_step, time_first is not False, carries, output, None, readout)
    wrapped = InTime(network, plan, kind.clear, None if name == "none" else kind.neurons)
    evaluation_mode(wrapped)
    few = _few(x, network)
    if name != "none" or steps is not None:
        wrapped.plan = plan = replace(plan, time_axis=_time_axis(wrapped, few, time_first))
    if plan.time_axis is None and readout != "mean":
        raise AdapterError(f"readout='{readout}' needs outputs over time, and the network returns one a sample")
    result: nn.Module = wrapped
    clear: Callable[[nn.Module], None] | None = clear_state
    if name == "none" and not surrogates and reset is None and plan == TimePlan():
        result, clear = network, None  # as it is: passes written by hand stay possible
    y = try_network(wrapped, few)
    warnings = [*_hooks(bare(model)), *_tried(kind, wrapped, few, y)]
    return Adapted(result, clear, name, plan, surrogates, tuple(warnings))


def _both(first: Callable[[nn.Module], None], second: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    def clear(module: nn.Module) -> None:
        first(module)
        second(module)

    return clear


def bare(model: nn.Module) -> nn.Module:
    """Without torch.compile and data parallelism around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _copied(model: nn.Module) -> nn.Module:
    """A copy, also of a model whose state hangs on a graph (which copy.deepcopy refuses)."""
    held = (t for module in model.modules() for t in _tensors(vars(module)) if t.grad_fn is not None)
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held})


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(part)


def _library(network: nn.Module, asked: str | None) -> tuple[str, Library]:
    if asked is not None and asked not in LIBRARIES:
        raise AdapterError(f"library must be one of {', '.join(LIBRARIES)}, not '{asked}'")
    packages = {package for module in network.modules() for package in origins(module)}
    found = [name for name, kind in LIBRARIES.items() if kind.package in packages and name != "none"]
    if asked is None and len(found) > 1:
        raise AdapterError(f"the network has layers of {' and '.join(found)}: give library=")
    name = asked or (found[0] if found else "none")
    return name, LIBRARIES[name]


def _settled(
    network: nn.Module, kind: Library, surrogate: Spike | None, replacement: Spike | None, steeper: float
) -> Iterator[Found]:
    """Put every surrogate found into the network as a 2-jet, its own or the one asked for."""
    for name, given in (("surrogate", surrogate), ("replacement", replacement)):
        if given is not None and not (verdict := check_surrogate(given)).exact:
            raise AdapterError(f"{name}= cannot be used: {verdict.reason}")
    slots = list(kind.slots(network))
    if surrogate is not None and not slots:
        raise AdapterError(
            "surrogate= was given, but the network has none that could be replaced: make it an "
            "attribute of its neuron, named surrogate_function or spike_grad"
        )
    verdicts: dict[Any, tuple[Verdict, bool]] = {}
    for slot in slots:
        key = slot.function
        if key not in verdicts:
            verdicts[key] = check_surrogate(slot.function), is_step(slot.function)
        verdict, step = verdicts[key]
        other = replacement if surrogate is None and not verdict.exact else surrogate
        if not verdict.exact and other is None:
            raise AdapterError(f"surrogate {slot.label} ('{slot.name}'): {verdict.reason}; {CURE}")
        if other is not None and not step:
            raise AdapterError(f"surrogate {slot.label} ('{slot.name}') is no step at 0: it cannot be replaced")
        if step:
            slot.put(Jet(slot.function, other, steeper if other is None else 1.0))
        yield Found(slot.name, slot.label, verdict, other is not None)


def _few(x: Tensor, network: nn.Module) -> Tensor:
    """Three samples, repeated if there are fewer, in the dtype of the network."""
    few = x[torch.arange(3) % len(x)]
    like = next((p for p in network.parameters() if p.is_floating_point()), few)
    return few.to(like.device, like.dtype if few.is_floating_point() else few.dtype)


def _time_axis(wrapped: InTime, few: Tensor, time_first: bool | None) -> int | None:
    """Where time is in what the network returns: the axis of the samples is the one that grows with them."""
    shapes = []
    for n in (2, 3):
        wrapped.clear(wrapped.network)
        try:
            with torch.no_grad():
                shapes.append(list(run_forward(wrapped.over_time, few[:n]).shape))
        except AdapterError as error:
            if not shapes:
                raise
            raise AdapterError(f"after 2 samples, 3 do not fit: {LEAK}") from error
    wrapped.clear(wrapped.network)
    two, three = shapes
    axes = [i for i, (a, b) in enumerate(zip(two, three, strict=False)) if (a, b) == (2, 3)]
    if len(two) != len(three) or len(axes) != 1 or axes[0] > 1 or len(three) < 2:
        raise AdapterError(f"3 samples gave outputs of shape {three}: [3, K], [T, 3, K] or [3, T, K] is needed")
    if axes[0] == 1:
        return 0 if len(three) > 2 else _no_classes(three)
    if len(three) == 2:
        return None
    if time_first is False:
        return 1
    raise AdapterError(f"3 samples gave outputs of shape {three}: if the second axis is time, give time_first=False")


def _no_classes(shape: list[int]) -> int:
    raise AdapterError(f"3 samples gave outputs of shape {shape}, which has no axis for classes: [3, K] is needed")


def _hooks(model: nn.Module) -> Iterator[str]:
    named = [name for name, p in model.named_parameters() if p._backward_hooks]
    if named:
        yield f"gradient hooks (of {', '.join(named)}) are not copied: the Hessian is that of the loss without them"


def _tried(kind: Library, wrapped: InTime, few: Tensor, y: Tensor) -> Iterator[str]:
    """A warning for every custom derivative that could not be tried; AdapterError for one that is not right."""
    fine: set[type] = set()
    for call, verdict, functions in try_neurons(kind, wrapped.network, wrapped, few):
        if verdict.exact:
            fine |= functions
        elif verdict.kind != "unknown":
            raise AdapterError(f"neuron '{call.name}' ({type(call.module).__name__}): {verdict.reason}; {CURE}")
    for node in sorted(found_functions(y) - fine, key=lambda node: node.__name__):
        name, verdict = try_function(node, wrapped, few)
        if verdict.kind == "unknown":
            yield f"the second derivative of the autograd function {name} could not be tried: {verdict.reason}"
        elif not verdict.exact:
            raise AdapterError(f"autograd function {name}: {verdict.reason}; {INSTEAD}")
