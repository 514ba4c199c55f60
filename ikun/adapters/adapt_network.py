"""Adapt any torch network for `make_objective`: its state, time, outputs, modes and surrogates.

Everything that could make the Hessian wrong is checked first: state that is not cleared, randomness, outputs of an
unexpected shape, and surrogates or neurons whose second derivative is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools import nested
from hessian_tools.checks import ObjectiveError
from hessian_tools.copy_check import check_copy
from hessian_tools.evaluation import copy_model, differentiable, evaluation_mode
from hessian_tools.function_check import found_functions
from ikun.adapters import choices
from ikun.adapters.base import PLAIN, AdapterError, Library, Slot, origins, run_forward
from ikun.adapters.libraries.norse import NORSE
from ikun.adapters.libraries.sinabs import SINABS
from ikun.adapters.libraries.snntorch import SNNTORCH
from ikun.adapters.libraries.spikingjelly import SPIKINGJELLY
from ikun.adapters.nodes.choices import replace_neurons
from ikun.adapters.time.checks import check_independence, check_steps, time_axis_of
from ikun.adapters.time.loop import InTime, TimePlan, clear_state
from ikun.adapters.time.readout import check_valid, parted
from ikun.adapters.two_jet import Jet, Steeper
from ikun.adapters.validation import (
    detached,
    of_vectors,
    takes_vectors,
    try_function,
    try_network,
    try_neurons,
)
from ikun.surrogate_check import Spike, Verdict, check_surrogate, is_step, trained_parameters

LIBRARIES: dict[str, Library] = dict(
    zip(choices.LIBRARIES, (SPIKINGJELLY, SNNTORCH, NORSE, SINABS, PLAIN), strict=True)
)
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
        nodes: Why a neuron was not replaced by a node of the traced graph, by its path; empty if it was.
    """

    model: nn.Module
    reset: Callable[[nn.Module], None] | None
    library: str
    plan: TimePlan
    surrogates: tuple[Found, ...] = ()
    warnings: tuple[str, ...] = ()
    nodes: dict[str, str] = field(default_factory=dict)


@differentiable
def adapt(
    model: nn.Module,
    x: Any,
    *,
    library: str | None = None,
    steps: int | None = None,
    sequences: bool = False,
    time_first: bool | None = None,
    output: str = "spikes",
    readout: str | None = None,
    valid: str | None = None,
    surrogate: Spike | None = None,
    replacement: Spike | None = None,
    steeper: float = 1.0,
    reset: Callable[[nn.Module], None] | None = None,
    forward_only: bool = False,
) -> Adapted:
    """Copy a network as a function of batches that `make_objective` can use. The network itself is not changed.

    Args:
        model: The network.
        x: A few inputs [N, ...] to try the network on: a tensor, or a dict, tuple or list of tensors (see
            `make_objective`) for a network that runs through time by itself or has no time.
        library: "spikingjelly", "snntorch", "norse", "sinabs" or "none". None: recognize it by the
            classes of the layers.
        steps: Number of time steps T to run the network for. None: the network runs through time by itself.
        sequences: Samples are sequences [N, T, ...]. Otherwise the same x is the input at every step.
        time_first: A network whose layers take all steps in one call gets inputs [T, N, ...] if True and [N, T, ...]
            if False. None: as the library has it. It also says which axis of the outputs is time, if their shape
            does not.
        output: What to use if the network returns several outputs: of a tuple "spikes" (the first), "membrane" (the
            last) or a number from 0 as text; of a dict, a dataclass or a namedtuple a name. A dict or dataclass with
            only one tensor needs no name.
        readout: How to reduce the outputs over time: "mean" (the firing rate, the default), "sum", "last" or "max".
            "none": the loss gets the outputs over time, with the samples first, [N, T, K]. Outputs of a network of
            plain torch that runs through time by itself are read out only if this or `time_first` is given.
        valid: For padded sequences: which entry of the inputs is a mask [N, T] of the valid steps, or the lengths [N].
            The key of a dict, or the number from 0, as text, of an entry of a tuple. Only valid steps are read out.
            The network gets the other entries, and this one if it is a named argument of its forward.
        surrogate: A function x = h - threshold -> spikes. Its derivatives replace those of every surrogate of the
            network. The spikes do not change.
        replacement: The same, but only for surrogates that cannot be differentiated twice.
        steeper: Factor a > 0. The surrogates that are not replaced have the derivative a f'(a x) instead of f'(x).
        reset: Clears state of the model that the library's own reset does not clear.
        forward_only: Whether only forward passes will be made. Derivatives are not checked then, and surrogates that
            cannot be differentiated twice are left as they are.

    Returns:
        The adapted network.

    Raises:
        AdapterError: For anything that would make the Hessian wrong, with one line that says what to do.
    """
    if readout is not None and readout not in choices.READOUTS:
        raise AdapterError(f"{{readout}} is not one of {', '.join(choices.READOUTS)}", readout=readout)
    if steps is not None and steps < 1:
        raise AdapterError("{steps}: at least one time step is needed", steps=steps)
    if sequences and steps is None:
        raise AdapterError("{sequences} needs {steps}, the number of time steps of a sample", sequences=True, steps=...)
    network = copy_model(bare(model)).eval()
    _check_inputs(x, parted(x, valid, network)[0], steps)
    check_valid(x, valid, network)
    if valid is not None and readout == "none":
        raise AdapterError(
            "{valid} selects the steps of a readout: with {readout} the loss gets all steps, so mark the padded ones "
            "in the targets",
            valid=...,
            readout=readout,
        )
    name, kind = _library(network, library)
    if reset is not None:
        kind = replace(kind, clear=_both(kind.clear, reset))
    kind.prepare(network)
    first = time_first if kind.time_first or time_first is not None else False
    by_step = steps is not None and first is None and kind.by_step(network)
    carries = by_step and name == "norse" and "state" in inspect.signature(network.forward).parameters
    timed = readout is not None or time_first is not None or valid is not None or name != "none" or steps is not None
    plan = TimePlan(
        steps, sequences, by_step, first is not False, carries, output, None, readout or "mean", valid=valid
    )
    wrapped = InTime(network, plan, kind.clear, None if name == "none" else kind.neurons)
    few = _few(x, network)
    frames, _ = parted(few, valid, network)
    whole = isinstance(frames, Tensor) and not frames.is_floating_point() and not frames.is_complex()
    if whole and _fails(wrapped, few):
        wrapped.plan = plan = replace(plan, floats=True)
        few = wrapped.converted(few)

    def run(tried: nn.Module) -> Tensor:
        return InTime(tried, plan, wrapped.clear, wrapped.live).forward_once(few)

    evaluation_mode(network, run)
    found = _settled(network, kind, surrogate, replacement, steeper, lambda: wrapped.forward_once(few), forward_only)
    surrogates = tuple(found)
    evaluation_mode(network, run)
    if timed:
        wrapped.plan = plan = replace(plan, time_axis=time_axis_of(wrapped, few, first))
    if plan.time_axis is None and (valid is not None or readout not in (None, "mean")):
        given: dict[str, Any] = {"readout": readout} if valid is None else {"valid": valid}
        raise AdapterError(
            f"{{{next(iter(given))}}} needs outputs over time, but the network returns one output per sample", **given
        )
    result: nn.Module = wrapped
    clear: Callable[[nn.Module], None] | None = clear_state
    plain = plan == TimePlan() and isinstance(_raw(network, few), Tensor)
    if name == "none" and not surrogates and reset is None and plain:
        result, clear = network, None  # unchanged, so that hand-written derivatives remain usable
    try:
        check_copy(bare(model), network, lambda: wrapped.forward_once(few))
        y = try_network(wrapped, few, derivatives=not forward_only)
    except ObjectiveError as error:
        raise AdapterError("{}", error) from None
    if any(t.is_floating_point() for t in nested.tensors(few)):
        check_independence(wrapped, wrapped.converted(_few(x, network, 8)), first, by_step or name == "none")
    if steps is None and name != "none":
        check_steps(wrapped, kind, few)
    warnings = [*_hooks(bare(model)), *(() if forward_only else _tried(kind, wrapped, few, y))]
    nodes = {} if forward_only else replace_neurons(name, kind, wrapped, few)
    return Adapted(result, clear, name, plan, surrogates, tuple(warnings), nodes)


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
    network: nn.Module,
    kind: Library,
    surrogate: Spike | None,
    replacement: Spike | None,
    steeper: float,
    forward: Callable[[], object],
    forward_only: bool,
) -> Iterator[Found]:
    """Replace every surrogate in the network with a 2-jet, of its own derivatives or of those that were asked for.

    A surrogate with trained parameters of its own is not replaced by a 2-jet, which holds them constant. For forward
    passes only, one that cannot be differentiated twice stays as it is.
    """
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
        function, trained = _called(slot, forward)
        key: object = slot.name if slot.constants else slot.function
        if function is None:
            continue  # the network does not call it
        if key not in verdicts:
            verdicts[key] = check_surrogate(function, trained), is_step(function)
        verdict, step = verdicts[key]
        other = replacement if surrogate is None and not verdict.exact else surrogate
        if not verdict.exact and other is None and forward_only:
            yield Found(slot.name, slot.label, verdict, False)
            continue
        if not verdict.exact and other is None:
            raise AdapterError("surrogate {} ('{}'): {}; " + CURE, slot.label, slot.name, verdict.reason, **CURES)
        if other is not None and not step:
            raise AdapterError(f"surrogate {slot.label} ('{slot.name}') is not a step at 0, so it cannot be replaced")
        if step and trained and other is None:
            if steeper != 1:
                slot.put(Steeper(slot.function, steeper))
        elif step:
            slot.put(Jet(slot.function, other, steeper if other is None else 1.0))
        yield Found(slot.name, slot.label, verdict, other is not None)


def _called(slot: Slot, forward: Callable[[], object]) -> tuple[Spike | None, list[Tensor]]:
    """Return a surrogate as a function of x with the constants that the network passes, and its trained tensors.

    The function is None if the network does not call it.
    """
    if not slot.constants and takes_vectors(slot.function):
        return slot.function, trained_parameters(slot.function)
    calls: list[tuple[Any, ...]] = []
    function: Callable[..., Tensor] = slot.function
    if isinstance(function, nn.Module):
        handle = function.register_forward_hook(lambda module, args, out: calls.append(args))
        try:
            forward()
        finally:
            handle.remove()
    else:

        def noted(*args: Any) -> Any:
            calls.append(args)
            return function(*args)

        slot.put(noted)
        try:
            forward()
        finally:
            slot.put(slot.function)
    if not calls:
        return None, []
    constants, trained = detached(calls[0][1:])
    spike = of_vectors(lambda x: function(x, *constants), calls[0][0])
    return spike, trained or trained_parameters(spike)


def _check_inputs(x: Any, inputs: Any, steps: int | None) -> None:
    """Raise AdapterError if x is not a batch of inputs, or if those of the network are not one tensor for `steps`."""
    if isinstance(x, Tensor):
        if x.dim() < 2 or not len(x):
            raise AdapterError("x must be a batch of inputs [N, ...] with at least one sample")
        return
    try:
        count = nested.sample_count(x)
    except ValueError as error:
        raise AdapterError("{}", error) from None
    if not count:
        raise AdapterError("x must be a batch of inputs [N, ...] with at least one sample")
    if steps is not None and not isinstance(inputs, Tensor):
        raise AdapterError(
            "{steps} needs inputs that are one tensor: wrap the network in a module that runs its steps and takes all "
            "inputs",
            steps=...,
        )


def _raw(network: nn.Module, x: Any) -> Any:
    """Return what the network returns."""
    with torch.no_grad():
        return run_forward(lambda inputs: nested.call(network, inputs), x)


def _fails(wrapped: InTime, x: Any) -> bool:
    """Whether the network fails on inputs of their dtype but runs on them as floating-point numbers."""
    plan = wrapped.plan
    try:
        wrapped.forward_once(x)
        return False
    except AdapterError:
        wrapped.plan = replace(plan, floats=True)
        try:
            wrapped.forward_once(wrapped.converted(x))
            return True
        except AdapterError:
            return False
        finally:
            wrapped.plan = plan


def _few(x: Any, network: nn.Module, count: int = 3) -> Any:
    """Return `count` samples, with repetitions if there are fewer, in the dtype and on the device of the network."""
    few = nested.selected(x, torch.arange(count) % nested.sample_count(x))
    like = next((p for p in network.parameters() if p.is_floating_point()), None)
    return few if like is None else nested.converted(few, like)


def _hooks(model: nn.Module) -> Iterator[str]:
    """Yield a warning if parameters have gradient hooks."""
    named = [name for name, p in model.named_parameters() if p._backward_hooks]
    if named:
        yield f"gradient hooks (of {', '.join(named)}) are not copied: the Hessian is that of the loss without hooks"


def _tried(kind: Library, wrapped: InTime, few: Any, y: Tensor) -> Iterator[str]:
    """Yield a warning for every custom derivative that could not be checked. Raise AdapterError for a wrong one."""
    fine: set[type] = set()
    for call, verdict, functions in try_neurons(kind, wrapped.network, wrapped, few):
        if verdict.exact:
            fine |= functions
        elif verdict.kind != "unknown":
            neuron = call.name, type(call.module).__name__
            raise AdapterError("neuron '{}' ({}): {}; " + CURE, *neuron, verdict.reason, **CURES)
    checked = {getattr(slot.function, "__self__", None) for slot in kind.slots(wrapped.network)}  # those left in place
    for node in sorted(found_functions(y) - fine, key=lambda node: node.__name__):
        if getattr(node, "_forward_cls", node) in checked:
            continue
        name, verdict = try_function(node, wrapped, few)
        if verdict.kind == "unknown":
            yield f"the second derivative of the autograd function {name} could not be checked: {verdict.reason}"
        elif not verdict.exact:
            raise AdapterError("autograd function {}: {}; " + INSTEAD, name, verdict.reason, surrogate=...)
