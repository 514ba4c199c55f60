"""Adapt any torch network for `make_objective`: its state, time, outputs, modes and surrogates.

Everything that could make the Hessian wrong is checked first: state that is not cleared, randomness, outputs of an
unexpected shape, and surrogates or neurons whose second derivative is wrong.
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
from ikun.adapters import choices
from ikun.adapters.base import PLAIN, AdapterError, Library, origins
from ikun.adapters.norse import NORSE
from ikun.adapters.snntorch import SNNTORCH
from ikun.adapters.spikingjelly import SPIKINGJELLY
from ikun.adapters.time_loop import InTime, TimePlan, clear_state
from ikun.adapters.two_jet import Jet
from ikun.adapters.validation import LEAK, found_functions, run_forward, try_function, try_network, try_neurons
from ikun.surrogate_check import Spike, Verdict, check_surrogate, is_step

LIBRARIES: dict[str, Library] = dict(zip(choices.LIBRARIES, (SPIKINGJELLY, SNNTORCH, NORSE, PLAIN), strict=True))
# Templates of messages, whose placeholders are parameters of `adapt`.
CURE = "give {replacement}, a spike function that can be differentiated twice, or {surrogate} to replace all surrogates"
CURES = {"replacement": ..., "surrogate": ...}
INSTEAD = "make it an attribute of its module, named surrogate_function, and give {surrogate}"


@dataclass(frozen=True)
class Found:
    """A surrogate of the network.

    Attributes:
        name: Path of the attribute that holds it.
        label: Its class and constants, in words.
        verdict: Whether its second derivative is right.
        replaced: Whether another surrogate is now used instead.
    """

    name: str
    label: str
    verdict: Verdict
    replaced: bool


@dataclass(frozen=True, eq=False)
class Adapted:
    """A network that is ready for `make_objective(adapted.model, ..., reset=adapted.reset)`.

    Attributes:
        model: A copy of the network that maps inputs [N, ...] to outputs [N, K].
        reset: Clears the state of `model`; None if it has no state.
        library: One of LIBRARIES.
        plan: How the network is run through time.
        surrogates: The surrogates that were found.
        warnings: Warnings, one line each.
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
    """Copy a network as a function of batches that `make_objective` can use. The network itself is not changed.

    Args:
        model: The network.
        x: A few inputs [N, ...] to try the network on.
        library: "spikingjelly", "snntorch", "norse" or "none". None: recognize it by the classes of the layers.
        steps: Number of time steps T to run the network for. None: the network runs through time by itself.
        sequences: Samples are sequences [N, T, ...]. Otherwise the same x is the input at every step.
        time_first: A network whose layers take all steps in one call gets inputs [T, N, ...] if True or None, and
            [N, T, ...] if False. It also says which axis of the outputs is time, if their shape does not.
        output: The element to use if the network returns a tuple: "spikes" (the first) or "membrane" (the last).
        readout: How to reduce the outputs over time: "mean" (the firing rate), "sum", "last" or "max".
        surrogate: A function x = h - threshold -> spikes. Its derivatives replace those of every surrogate of the
            network. The spikes do not change.
        replacement: The same, but only for surrogates that cannot be differentiated twice.
        steeper: Factor a > 0. The surrogates that are not replaced have the derivative a f'(a x) instead of f'(x).
        reset: Clears state of the model that the library's own reset does not clear.

    Returns:
        The adapted network.

    Raises:
        AdapterError: For anything that would make the Hessian wrong, with one line that says what to do.
    """
    for name, value, known in (("output", output, choices.OUTPUTS), ("readout", readout, choices.READOUTS)):
        if value not in known:
            raise AdapterError(f"{{{name}}} is not one of {', '.join(known)}", **{name: value})
    if steps is not None and steps < 1:
        raise AdapterError("{steps}: at least one time step is needed", steps=steps)
    if sequences and steps is None:
        raise AdapterError("{sequences} needs {steps}, the number of time steps of a sample", sequences=True, steps=...)
    if not isinstance(x, Tensor) or x.dim() < 2 or not len(x):
        raise AdapterError("x must be a batch of inputs [N, ...] with at least one sample")
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
        raise AdapterError(
            "{readout} needs outputs over time, but the network returns one output per sample", readout=readout
        )
    result: nn.Module = wrapped
    clear: Callable[[nn.Module], None] | None = clear_state
    if name == "none" and not surrogates and reset is None and plan == TimePlan():
        result, clear = network, None  # unchanged, so that hand-written derivatives remain usable
    y = try_network(wrapped, few)
    warnings = [*_hooks(bare(model)), *_tried(kind, wrapped, few, y)]
    return Adapted(result, clear, name, plan, surrogates, tuple(warnings))


def _both(first: Callable[[nn.Module], None], second: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Return a function that calls `first`, then `second`."""

    def clear(module: nn.Module) -> None:
        first(module)
        second(module)

    return clear


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of torch.compile and data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _copied(model: nn.Module) -> nn.Module:
    """Copy a model, even if its state has an autograd graph, which copy.deepcopy does not accept."""
    held = (t for module in model.modules() for t in _tensors(vars(module)) if t.grad_fn is not None)
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held})


def _tensors(thing: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts, lists and tuples."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(part)


def _library(network: nn.Module, asked: str | None) -> tuple[str, Library]:
    """Return the library that was asked for, or the one whose classes the network uses."""
    if asked is not None and asked not in LIBRARIES:
        raise AdapterError(f"{{library}} is not one of {', '.join(LIBRARIES)}", library=asked)
    packages = {package for module in network.modules() for package in origins(module)}
    found = [name for name, kind in LIBRARIES.items() if kind.package in packages and name != "none"]
    if asked is None and len(found) > 1:
        raise AdapterError("the network has layers of {}: give {library}", " and ".join(found), library=...)
    name = asked or (found[0] if found else "none")
    return name, LIBRARIES[name]


def _settled(
    network: nn.Module, kind: Library, surrogate: Spike | None, replacement: Spike | None, steeper: float
) -> Iterator[Found]:
    """Replace every surrogate in the network with a 2-jet, of its own derivatives or of those that were asked for."""
    for name, given in (("surrogate", surrogate), ("replacement", replacement)):
        if given is not None and not (verdict := check_surrogate(given)).exact:
            raise AdapterError(f"{{{name}}} cannot be used: {{}}", verdict.reason, **{name: ...})
    slots = list(kind.slots(network))
    if surrogate is not None and not slots:
        raise AdapterError(
            "{surrogate} was given, but the network has no surrogate that can be replaced: make it an attribute of its "
            "neuron, named surrogate_function or spike_grad",
            surrogate=...,
        )
    verdicts: dict[Any, tuple[Verdict, bool]] = {}
    for slot in slots:
        key = slot.function
        if key not in verdicts:
            verdicts[key] = check_surrogate(slot.function), is_step(slot.function)
        verdict, step = verdicts[key]
        other = replacement if surrogate is None and not verdict.exact else surrogate
        if not verdict.exact and other is None:
            raise AdapterError("surrogate {} ('{}'): {}; " + CURE, slot.label, slot.name, verdict.reason, **CURES)
        if other is not None and not step:
            raise AdapterError(f"surrogate {slot.label} ('{slot.name}') is not a step at 0, so it cannot be replaced")
        if step:
            slot.put(Jet(slot.function, other, steeper if other is None else 1.0))
        yield Found(slot.name, slot.label, verdict, other is not None)


def _few(x: Tensor, network: nn.Module) -> Tensor:
    """Return three samples, with repetitions if there are fewer, in the dtype and on the device of the network."""
    few = x[torch.arange(3) % len(x)]
    like = next((p for p in network.parameters() if p.is_floating_point()), few)
    return few.to(like.device, like.dtype if few.is_floating_point() else few.dtype)


def _time_axis(wrapped: InTime, few: Tensor, time_first: bool | None) -> int | None:
    """Return the time axis of the network's outputs, or None. The axis of the samples is the one that grows with N."""
    shapes = []
    for n in (2, 3):
        wrapped.clear(wrapped.network)
        try:
            with torch.no_grad():
                shapes.append(list(run_forward(wrapped.over_time, few[:n]).shape))
        except AdapterError as error:
            if not shapes:
                raise
            raise AdapterError("the network runs on 2 samples, but not on 3 after that: " + LEAK, reset=...) from error
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
    raise AdapterError(
        "3 samples gave outputs of shape {}: if the second axis is time, give {time_first}", three, time_first=False
    )


def _no_classes(shape: list[int]) -> int:
    """Raise AdapterError for outputs without an axis of classes."""
    raise AdapterError(f"3 samples gave outputs of shape {shape}, which has no axis for classes: [3, K] is needed")


def _hooks(model: nn.Module) -> Iterator[str]:
    """Yield a warning if parameters have gradient hooks."""
    named = [name for name, p in model.named_parameters() if p._backward_hooks]
    if named:
        yield f"gradient hooks (of {', '.join(named)}) are not copied: the Hessian is that of the loss without hooks"


def _tried(kind: Library, wrapped: InTime, few: Tensor, y: Tensor) -> Iterator[str]:
    """Yield a warning for every custom derivative that could not be checked. Raise AdapterError for a wrong one."""
    fine: set[type] = set()
    for call, verdict, functions in try_neurons(kind, wrapped.network, wrapped, few):
        if verdict.exact:
            fine |= functions
        elif verdict.kind != "unknown":
            neuron = call.name, type(call.module).__name__
            raise AdapterError("neuron '{}' ({}): {}; " + CURE, *neuron, verdict.reason, **CURES)
    for node in sorted(found_functions(y) - fine, key=lambda node: node.__name__):
        name, verdict = try_function(node, wrapped, few)
        if verdict.kind == "unknown":
            yield f"the second derivative of the autograd function {name} could not be checked: {verdict.reason}"
        elif not verdict.exact:
            raise AdapterError("autograd function {}: {}; " + INSTEAD, name, verdict.reason, surrogate=...)
