"""Replace neurons of other libraries by nodes of the traced graph, with the fused scans over time as derivatives.

A node is the library's own module with another forward pass. It keeps its attributes, its parameters and their names,
its state and how that is cleared. Its values are those of the library's own operations, or of kernels that compute the
same to the last bit. Its derivatives are those of the equations in `ikun.kernels.dispatch`.

A neuron is replaced only if values and both derivatives agree with those of the library's own module, for the inputs
that it gets in a forward pass. All others stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hessian_tools.evaluation import copy_model
from ikun.adapters.base import FAILURES, Library
from ikun.adapters.two_jet import Jet
from ikun.nodes.passes import ScanSpec
from ikun.nodes.rewriting import TRACING
from ikun.surrogate_check import DISTANCES, first_line
from ikun.surrogates import FAMILIES

SAME = 1e-12  # relative difference of f' and f'' to those of a family
CLOSE = 1e-8  # relative difference of derivatives in float64
_classes: dict[tuple[type, type], type] = {}


class UnfitError(Exception):
    """A neuron cannot be a node. The message is one line that says why."""


@dataclass(frozen=True)
class Plan:
    """How a neuron is computed.

    Attributes:
        spec: The parameters of the neurons.
        jet: The function z -> (f'(z), f''(z)); None: the surrogate of `spec`.
        exact: Whether the kernels compute the values. Otherwise the library's own operations do.
        more: What else the node of a library needs.
    """

    spec: ScanSpec
    jet: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    exact: bool = False
    more: Any = None


class LibraryNode(nn.Module):
    """Base of the forward passes that replace those of a library's neurons. The library's class comes after it."""

    tracing = TRACING
    plan: Plan

    def surrogate(self) -> Jet:
        """Return the surrogate."""
        return library_surrogate(self)

    @property
    def rests_at_zero(self) -> bool:
        """Whether zeros are the state at rest."""
        return self.plan.spec.v_reset == 0

    def advance(self, x: Tensor, state: tuple[Tensor | None, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the spikes of one time step for inputs x [N, ...], and the state after it."""
        raise NotImplementedError

    def over_time(self, x: Tensor, steps: int, state: tuple[Tensor | None, ...]) -> Tensor:
        """Return the spikes [T, N, ...] of all time steps for inputs x [T or 1, N, ...]."""
        found = []
        for t in range(steps):
            y, state = self.advance(x[t if len(x) > 1 else 0], state)
            found.append(y)
        return torch.stack(found)

    def heard(self, *args: Any, **kwargs: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """Run the library's forward pass without derivatives.

        Returns:
            What it returns, and the arguments and spikes of all calls of the surrogate.
        """
        surrogate = self.surrogate()
        surrogate.heard = []
        try:
            with torch.no_grad():
                out = super().forward(*args, **kwargs)
            return out, surrogate.heard
        finally:
            surrogate.heard = None


def library_class(module: nn.Module, names: Collection[str], steps: Collection[str]) -> str:
    """Return which of the classes `names` of a library a neuron belongs to.

    Args:
        module: The neuron.
        names: The classes.
        steps: Methods that compute a step, which a class of the user must not replace.

    Raises:
        UnfitError: If it belongs to none of them, or replaces a method.
    """
    classes = type(module).__mro__
    own = next((c for c in classes if c.__name__ in names), None)
    if own is None:
        raise UnfitError("its equations are not those of the kernels")
    if changed := sorted({name for c in classes[: classes.index(own)] for name in vars(c)} & set(steps)):
        raise UnfitError(f"its class replaces {changed[0]} of {own.__name__}")
    return own.__name__


def library_surrogate(module: nn.Module) -> Jet:
    """Return the surrogate of a neuron. Raises UnfitError if it cannot be used in a node."""
    for name in ("surrogate_function", "spike_grad"):
        if isinstance(found := module._modules.get(name), Jet):
            return found
    raise UnfitError("its surrogate is learned, or is not a step at 0")


def surrogate_plan(jet: Jet) -> dict[str, Any]:
    """Return the fields of `ScanSpec` and `Plan` for a surrogate."""
    family = family_of(jet.slopes)
    return {"surrogate": family, "jet": None} if family else {"surrogate": "", "jet": jet.slopes}


def family_of(slopes: Callable[[Tensor], tuple[Tensor, Tensor]]) -> str:
    """Return the family with the same f' and f'' as text; empty if there is none."""
    x = torch.cat([-DISTANCES.flip(0), DISTANCES, DISTANCES / 100, 10 * DISTANCES])
    first, second = slopes(x)
    peak, at = slopes(torch.full((1,), 1e-300, dtype=torch.float64))[0].item(), slopes(torch.ones_like(x[:1]))[0].item()
    for name, family in FAMILIES.items():
        if name in ("superspike", "linear"):
            continue  # other names of families
        if name == "fast_sigmoid":
            p = 1 / math.sqrt(at) - 1 if 0 < at < 1 else 0.0
        else:
            p = peak / family.peak(1.0) if family.slope > 0 else family.peak(1.0) / peak if peak else 0.0
        for parameter in (float(f"{p:.12g}"), p):
            if 1e-3 <= parameter <= 1e3:
                ours = family.first(x, parameter), family.second(x, parameter)
                if all(_near(a, b, SAME) for a, b in zip(ours, (first, second), strict=True)):
                    return f"{name}:{parameter!r}"
    return ""


def _near(a: Tensor, b: Tensor, relative: float) -> bool:
    return bool((a - b).abs().max() <= relative * max(float(b.abs().max()), 1e-30))


# ---------------------------------------------------------------- replacing
Fit = Callable[[nn.Module], tuple[type[LibraryNode], Plan]]  # raises UnfitError


def use_nodes(network: nn.Module, library: Library, fit: Fit, forward: Callable[[], Tensor]) -> dict[str, str]:
    """Replace the neurons of a network whose equations are those of the kernels.

    Args:
        network: The network. Its surrogates are those that its derivatives use.
        library: Its library.
        fit: Returns the node of a neuron.
        forward: Runs the network on a few samples.

    Returns:
        Why a neuron was not replaced, by its path; empty for neurons that were.
    """
    found: dict[str, str] = {}
    plans: dict[str, tuple[nn.Module, type[LibraryNode], Plan]] = {}
    known = {id(m) for m in library.neurons(network)}
    for path, module in network.named_modules():
        if id(module) in known:
            try:
                plans[path] = (module, *fit(module))
                found[path] = ""
            except (UnfitError, *FAILURES) as error:
                found[path] = first_line(error)
    calls = _calls({path: module for path, (module, *_) in plans.items()}, forward)
    for path, (module, base, plan) in list(plans.items()):
        found[path] = _differs(module, base, plan, calls[path], library)
        if found[path]:
            del plans[path]
    if not plans:
        return found
    before = _whole(network, forward)
    for module, base, plan in plans.values():
        _turn(module, base, plan)
    try:
        reason = _compare(before, _whole(network, forward))
    except FAILURES as error:
        reason = first_line(error)
    if reason:
        for path, (module, *_) in plans.items():
            module.__class__ = type(module).__bases__[1]
            del module.plan
            found[path] = f"the network would differ: {reason}"
    return found


def _turn(module: nn.Module, base: type[LibraryNode], plan: Plan) -> None:
    """Give a module the forward pass of a node."""
    own = type(module)
    key = base, own
    if key not in _classes:
        _classes[key] = type(
            own.__name__, (base, own), {"__module__": own.__module__, "__qualname__": own.__qualname__}
        )
    module.__class__ = _classes[key]
    vars(module)["plan"] = plan


@dataclass(frozen=True)
class _Call:
    args: Any
    out: Any


def _calls(modules: Mapping[str, nn.Module], forward: Callable[[], Tensor]) -> dict[str, list[_Call]]:
    """Return the calls of modules in a forward pass."""
    found: dict[str, list[_Call]] = {path: [] for path in modules}

    def note(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, out: found[path].append(_Call((args, kwargs), out))

    handles = [m.register_forward_hook(note(path), with_kwargs=True) for path, m in modules.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _differs(module: nn.Module, base: type[LibraryNode], plan: Plan, calls: list[_Call], library: Library) -> str:
    """Return how a node differs from the library's module; empty if it does not."""
    if not calls:
        return "the network does not call it"
    try:
        for dtype in {_dtype(calls), torch.float64}:
            results = []
            for node in (False, True):
                twin = copy_model(module).to(dtype)
                twin.training = module.training
                if node:
                    _turn(twin, base, plan)
                library.clear(twin)
                results.append(_derivatives(twin, calls, dtype))
            if reason := _compare(results[0], results[1], derivatives=dtype == torch.float64):
                return reason
    except FAILURES as error:
        return first_line(error)
    return ""


def _dtype(calls: list[_Call]) -> torch.dtype:
    return next(t.dtype for t in tree_flatten(calls[0].args)[0] if isinstance(t, Tensor))


def _derivatives(module: nn.Module, calls: list[_Call], dtype: torch.dtype) -> list[list[Tensor]]:
    """Repeat calls. Returns the outputs, and the first and second derivatives of a random sum of them."""
    generator = torch.Generator().manual_seed(0)
    known: dict[int, Tensor] = {}  # outputs of this module by the id of those of the calls
    inputs: dict[int, Tensor] = {}
    outputs: list[Tensor] = []

    def given(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        if id(t) not in known and id(t) not in inputs:
            inputs[id(t)] = t.detach().to(dtype).requires_grad_()
        return known.get(id(t), inputs.get(id(t)))

    with torch.enable_grad():
        for call in calls:
            leaves, structure = tree_flatten(call.args)
            args, kwargs = tree_unflatten([given(t) for t in leaves], structure)
            out = tree_flatten(module(*args, **kwargs))[0]
            for theirs, ours in zip(tree_flatten(call.out)[0], out, strict=True):
                if isinstance(theirs, Tensor):
                    known[id(theirs)] = ours
                    outputs.append(ours)
        total = sum((o * _random(o, generator)).sum() for o in outputs)
        leaves = [*inputs.values(), *(p for p in module.parameters() if p.requires_grad)]
        return [[o.detach() for o in outputs], *_twice(total, leaves, generator)]


def _whole(network: nn.Module, forward: Callable[[], Tensor]) -> list[list[Tensor]]:
    """Return the outputs of a network, and the derivatives of a random sum of them by its parameters."""
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        y = forward()
        leaves = [p for p in network.parameters() if p.requires_grad]
        return [[y.detach()], *_twice((y * _random(y, generator)).sum(), leaves, generator)]


def _twice(total: Any, leaves: list[Any], generator: torch.Generator) -> Iterator[list[Tensor]]:
    first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, first, strict=True)]
    yield [g.detach() for g in filled]
    along = sum((g * _random(g, generator)).sum() for g in filled)
    second: Any = [None] * len(leaves)
    if isinstance(along, Tensor) and along.requires_grad:
        second = torch.autograd.grad(along, leaves, allow_unused=True)
    yield [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, second, strict=True)]


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _compare(theirs: list[list[Tensor]], ours: list[list[Tensor]], derivatives: bool = True) -> str:
    """Return how outputs and derivatives differ; empty if they do not."""
    if any(not torch.equal(a, b) for a, b in zip(theirs[0], ours[0], strict=True)):
        return "its outputs differ"
    if not derivatives:
        return ""
    for name, a, b in zip(("first", "second"), theirs[1:], ours[1:], strict=True):
        most = max([float(t.abs().max()) for t in a if t.numel()], default=0.0)
        close = CLOSE if all(t.dtype == torch.float64 for t in a) else 1e-3
        if any(not _close(s, t, close * most) for s, t in zip(a, b, strict=True)):
            return f"its {name} derivative differs"
    return ""


def _close(a: Tensor, b: Tensor, difference: float) -> bool:
    return not a.numel() or bool((a - b).abs().max() <= difference)
