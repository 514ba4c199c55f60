"""Check a network before its Hessian is computed: is it deterministic, and is its second derivative right?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools import nested
from hessian_tools.checks import deterministic
from hessian_tools.evaluation import observable
from hessian_tools.function_check import found_functions, function_nodes
from ikun.adapters.base import FAILURES, AdapterError, Library, arguments, run_forward
from ikun.adapters.two_jet import Jet, Steeper
from ikun.surrogate_check import DISTANCES, Spike, Verdict, check_neuron, first_line, trained_parameters

LEAK = "the network keeps state between calls (give {reset}, a function of the model that clears it)"  # a template
MOST_FEATURES = 4096  # larger layers of neurons are checked with one entry per channel


def try_network(model: nn.Module, x: Any, derivatives: bool = True) -> Tensor:
    """Check that outputs and gradients are the same in two passes, and that derivatives exist and are finite.

    Args:
        model: The network.
        x: Inputs.
        derivatives: Whether derivatives are checked.

    Returns:
        The outputs [N, ...] at x.

    Raises:
        AdapterError: If a check fails.
        ObjectiveError: If the model is not deterministic.
    """
    with _refuse_autocast(model):
        deterministic(model, lambda inputs: run_forward(model, inputs), x)
    y, again = run_forward(model, x), run_forward(model, x)
    if not torch.isfinite(y).all():
        raise AdapterError("the network's outputs are not finite")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise AdapterError("the network has no parameter that requires a gradient")
    if derivatives and not y.requires_grad:
        raise AdapterError("the outputs depend on no parameter: is a surrogate switched off, or a tensor detached?")
    if y.is_complex():
        raise AdapterError(f"the network's outputs are complex ({y.dtype}): return real numbers, such as their .abs()")
    if not derivatives:
        return y
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(y.shape, generator=generator).to(y)
    directions = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    first, repeated = (_derivatives((o * weights).sum(), parameters, "first") for o in (y, again))
    if any(_differ(a, b) for a, b in zip(first, repeated, strict=True) if a is not None and b is not None):
        raise AdapterError("two gradients at the same inputs differ: a backward pass draws random numbers")
    along = [(g * v).sum() for g, v in zip(first, directions, strict=True) if g is not None and g.requires_grad]
    if along:
        _derivatives(torch.stack(along).sum(), parameters, "second")
    return y


@contextmanager
def _refuse_autocast(model: nn.Module) -> Iterator[None]:
    """Raise AdapterError if a layer runs in mixed precision, whose rounding hides second derivatives."""

    def hook(module: nn.Module, args: Any) -> None:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                raise AdapterError(
                    f"the forward pass runs in mixed precision (torch.autocast, {torch.get_autocast_dtype(kind)}): "
                    "switch it off for the analysis"
                )

    handles = [m.register_forward_pre_hook(hook) for _, m in observable(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by more than the rounding of sums in another order, as on a GPU."""
    return bool((a - b).abs().max() > 1e-5 * a.abs().max())


def _derivatives(value: Tensor, parameters: list[nn.Parameter], order: str) -> tuple[Tensor | None, ...]:
    """Return the gradients of a value. `order` is "first" or "second", for messages."""
    try:
        found = torch.autograd.grad(value, parameters, create_graph=order == "first", allow_unused=True)
    except RuntimeError as error:
        hint = " (the state must not be written in place)" if "inplace" in str(error) else ""
        raise AdapterError(f"the network's {order} derivative fails: {first_line(error)}{hint}") from error
    if any(g is not None and not torch.isfinite(g).all() for g in found):
        raise AdapterError(f"the network's {order} derivative is not finite")
    return found


# ---------------------------------------------------------------- neurons, one at a time
@dataclass(frozen=True)
class Call:
    """The first call of a module in a forward pass.

    Attributes:
        name: Path of the module in the network.
        module: The module.
        inputs: Its first argument.
        outputs: Its output, or the first element of it.
    """

    name: str
    module: nn.Module
    inputs: Tensor
    outputs: Tensor


def calls(network: nn.Module, forward: Callable[[Any], Tensor], x: Any) -> list[Call]:
    """Record the first call of every module of a network and of the network itself, in the order in which they end."""
    found: dict[int, Call] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) and out else out
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                found.setdefault(id(module), Call(name, module, args[0].detach(), out.detach()))

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in observable(network)]
    try:
        with torch.no_grad():
            forward(x)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def spiking(made: list[Call]) -> list[Call]:
    """Return the calls of the innermost modules, except torch's own, that map other numbers to zeros and ones."""

    def binary(t: Tensor) -> bool:
        return bool(((t == 0) | (t == 1)).all())

    chosen = [
        call
        for call in made
        if not type(call.module).__module__.startswith("torch.")
        and call.inputs.shape == call.outputs.shape
        and binary(call.outputs)
        and not binary(call.inputs)
    ]
    inner = [{id(m) for m in call.module.modules()} - {id(call.module)} for call in chosen]
    return [c for c, below in zip(chosen, inner, strict=True) if not any(id(o.module) in below for o in chosen)]


def try_neurons(
    library: Library, network: nn.Module, forward: Callable[[Any], Tensor], x: Any
) -> Iterator[tuple[Call, Verdict, set[type]]]:
    """Check the derivatives of every neuron of a network separately.

    Neurons with the same class, settings and input shape are checked once.

    Args:
        library: The library of the network.
        network: The network.
        forward: Runs the network on a batch.
        x: A few inputs [N, ...].

    Yields:
        The neuron's call, the verdict on it, and the autograd functions that it uses.
    """
    made = calls(network, forward, x)
    known = {id(m) for m in library.neurons(network)}
    parts = {id(part) for call in made if id(call.module) in known for part in call.module.modules()}
    chosen = [call for call in made if id(call.module) in known]
    chosen += [call for call in spiking(made) if id(call.module) not in parts]
    seen = set()
    for call in chosen:
        key = (type(call.module), repr(call.module), call.inputs.shape)
        if key not in seen:
            seen.add(key)
            yield call, *_try_neuron(library, call)


def _try_neuron(library: Library, call: Call) -> tuple[Verdict, set[type]]:
    """Check one neuron. Returns the verdict and the autograd functions that it uses."""
    timed = library.takes_time(call.module)
    shape = call.inputs.shape[1 + timed :]
    if shape.numel() > MOST_FEATURES:
        shape = torch.Size([shape[0], *(1 for _ in shape[1:])])
    functions: set[type] = set()
    if reason := _not_one_step(library, call, timed):
        return Verdict("unknown", reason), functions

    def alone(currents: Tensor) -> Tensor:
        inputs = currents.view(-1, *(1 for _ in shape)).expand(-1, *shape)
        library.clear(call.module)
        out: Any = call.module(inputs[None] if timed else inputs)
        out = out[0] if isinstance(out, tuple) else out
        functions.update(found_functions(out))
        found: Tensor = out[0] if timed else out
        return found

    try:
        return check_neuron(alone, call.inputs.dtype, call.inputs.device), functions
    except FAILURES as error:
        return Verdict("unknown", first_line(error)), functions
    finally:
        library.clear(call.module)


def _not_one_step(library: Library, call: Call, timed: bool) -> str:
    """Return why a module is not a layer of unconnected neurons that takes one time step; empty if it is one."""
    if call.inputs.shape != call.outputs.shape:
        return "its outputs have another shape than its inputs"
    uses = [0]

    def count(*_: Any) -> None:
        uses[0] += 1

    handles = [m.register_forward_hook(count) for m in call.module.modules() if isinstance(m, Jet | Steeper)]
    x = call.inputs[:1] if timed else call.inputs
    x = (x.clone() if x.is_floating_point() else x.float()).requires_grad_()
    library.clear(call.module)
    try:
        with torch.enable_grad():
            out: Any = call.module(x * 1)
        out = out[0] if isinstance(out, tuple) else out
        nodes = function_nodes(out, every=True)
        if max(uses[0], *(sum(type(n) is kind for n in nodes) for kind in {type(n) for n in nodes}), 0) > 1:
            return "one call takes several time steps, or has several layers"
        flat = out.reshape(x.shape[0] * x.shape[1] if timed else x.shape[0], -1)
        chosen = torch.zeros_like(flat)
        chosen[:, ::2] = 1
        (g,) = torch.autograd.grad((flat * chosen).sum(), x, allow_unused=True)
        connected = g is not None and bool((g.reshape(flat.shape) * (1 - chosen)).any())
        return "its neurons are connected, or one call takes several time steps" if connected else ""
    except FAILURES as error:
        return first_line(error)
    finally:
        for handle in handles:
            handle.remove()
        library.clear(call.module)


def coupled(model: nn.Module, x: Any) -> bool:
    """Whether an output of a sample has a derivative by the inputs of other samples of its batch.

    This is seen where outputs are alike too, as those of silent neurons.

    Args:
        model: Maps inputs [N, ...] to outputs [N, ...].
        x: Inputs [N, ...]. Those that are not floating-point numbers are constants.
    """
    count = nested.sample_count(x)
    half = count // 2
    x = nested.mapped(lambda t: t.detach().requires_grad_(t.is_floating_point()), x)
    leaves = [t for t in nested.tensors(x) if t.requires_grad]
    y = run_forward(model, nested.mapped(lambda t: t * 1 if t.requires_grad else t, x))
    if not half or not leaves or len(y) != count or not y.requires_grad:
        return False
    for ours, theirs in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        try:
            found = torch.autograd.grad(y[ours].sum(), leaves, retain_graph=True, allow_unused=True)
        except RuntimeError:
            return False  # the tests of the derivatives say what fails
        if any(g is not None and bool((g[theirs].nan_to_num(0.0) != 0).any()) for g in found):
            return True
    return False


# ---------------------------------------------------------------- autograd functions, wherever they are called
def try_function(node: type, forward: Callable[[Any], Tensor], x: Any) -> tuple[str, Verdict]:
    """Check an autograd function, with the constants that the network passes to it.

    Args:
        node: The class of its node in the graph.
        forward: Runs the network on a batch.
        x: A few inputs [N, ...].

    Returns:
        The name of the function and the verdict.
    """
    function: Any = getattr(node, "_forward_cls", None)
    if function is None:
        return node.__name__, Verdict("unknown", "it is not written in Python")
    seen = _arguments(function, forward, x)
    if seen is None and arguments(function) != 1:
        return function.__name__, Verdict("unknown", "it takes more than one argument")
    floating = [t for t in nested.tensors(x) if t.is_floating_point()]
    like = seen[0] if seen else floating[0] if floating else torch.zeros(1)
    tails, trained = detached(seen[1:] if seen else ())
    applied = of_vectors(lambda currents: function.apply(currents, *tails), like)
    return function.__name__, check_neuron(lambda c: applied(c)[:, None], like.dtype, like.device, trained)


def takes_vectors(spike: Spike) -> bool:
    """Whether a surrogate accepts x of any shape. One with a width per channel needs an axis of channels."""
    if not all(_accepts(spike, DISTANCES[:count].float()) for count in (5, 7)):
        return False
    return all(p.numel() == 1 for p in trained_parameters(spike))


def _accepts(spike: Spike, x: Tensor) -> bool:
    """Whether a surrogate and its derivative can be computed at x. Constants may be used in the derivative only."""
    x = x.detach().requires_grad_()
    try:
        with torch.enable_grad():
            torch.autograd.grad(spike(x).sum(), x)
    except FAILURES:
        return False
    return True


def of_vectors(spike: Spike, like: Tensor) -> Spike:
    """Return a surrogate as a function of x [B], for the tests of `ikun.surrogate_check`.

    Args:
        spike: The surrogate.
        like: What the network calls it with, [N, ...]. The surrogate gets x in this shape, the same number for all
            entries of a sample, if it has constants or parameters of more than one entry.

    Returns:
        A function of x [B], which returns the mean over the entries of every sample.
    """
    if takes_vectors(spike) or like.dim() < 2:
        return spike
    inner = like.shape[1:]
    if inner.numel() > MOST_FEATURES:
        few = torch.Size([*inner[:-2], 1, 1])  # one pixel, if the surrogate does not differ between them
        inner = few if _accepts(spike, like.new_zeros(1, *few)) else inner
    return lambda x: (
        spike(x.to(like.device).reshape(-1, *(1 for _ in inner)).expand(-1, *inner)).flatten(1).mean(1).to(x.device)
    )


def detached(constants: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return copies of arguments without their graph, and those of them that are trained."""
    copies = tuple(
        c.detach().clone().requires_grad_(c.requires_grad) if isinstance(c, Tensor) else c for c in constants
    )
    return copies, [c for c in copies if isinstance(c, Tensor) and c.requires_grad]


def _arguments(function: Any, forward: Callable[[Any], Tensor], x: Any) -> tuple[Any, ...] | None:
    """Return the arguments of the first call of an autograd function; None if its calls cannot be observed."""
    calls: list[tuple[Any, ...]] = []
    apply, defined = function.apply, "apply" in vars(function)

    def noted(*args: Any) -> Any:
        calls.append(args)
        return apply(*args)

    function.apply = staticmethod(noted)
    try:
        forward(x)
    finally:
        if defined:
            function.apply = apply
        else:
            del function.apply
    return calls[0] if calls else None
