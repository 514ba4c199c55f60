"""Check the second derivatives of custom autograd functions, wherever a forward pass calls them.

The Hessian is the derivative of what the backward passes compute. If a backward pass detaches what depends on its
inputs, or computes it with another library, that derivative is silently zero. It is compared with finite differences of
the backward pass, which also hold for surrogate gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from hessian_tools.io.errors import ObjectiveError

CALLS = 8  # of each function, at most, that are checked
STEPS = {torch.float64: 1e-4, torch.float32: 3e-3}  # of finite differences, relative to the size of an input
TOLERANCE = {torch.float64: 0.01, torch.float32: 0.1}  # of the second derivative, relative to its size


def _nodes(y: Tensor) -> list[Any]:
    """Return the nodes in the graph of y."""
    seen: set[Any] = set()
    todo: list[Any] = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return list(seen)


def _is_custom(node: Any) -> bool:
    return isinstance(node, BackwardCFunction) or "CppNode" in node.name()


def _is_ours(node: Any) -> bool:
    """Return whether a node is an autograd function of this project, whose second derivative needs no check."""
    function = getattr(node, "_forward_cls", None)
    return function is not None and function.__module__.partition(".")[0] in ("ikun", "hessian_tools")


def function_nodes(y: Tensor, every: bool = False) -> list[Any]:
    """Return the nodes in the graph of y that are custom autograd functions.

    Args:
        y: A tensor with a graph.
        every: Whether those of this project count too.
    """
    return [node for node in _nodes(y) if _is_custom(node) and (every or not _is_ours(node))]


def found_functions(y: Tensor) -> set[type]:
    """Return the classes of the nodes in the graph of y that are custom autograd functions."""
    return {type(node) for node in function_nodes(y)}


def _called_functions(forward: Callable[[], Tensor]) -> set[Any]:
    """Return the custom autograd functions written in Python that a forward pass calls."""
    y = forward() * 1
    nodes = _nodes(y)
    found = {getattr(n, "_forward_cls", None) for n in nodes if _is_custom(n) and not _is_ours(n)} - {None}
    # A graph of many steps is freed from its end: torch frees nodes that Python has seen by recursion.
    leaves = {node for node in nodes if not node.next_functions}
    nodes.sort(key=lambda node: -1 if node in leaves else node._sequence_nr())
    leaves.clear()
    y.detach_()
    while nodes:
        nodes.pop()
    return found


def check_functions(forward: Callable[[], Tensor]) -> None:
    """Check the second derivatives of the autograd functions that a forward pass calls.

    Functions of torch, and those that are not written in Python, are not checked.

    Args:
        forward: Runs a forward pass and returns its outputs with their graph.

    Raises:
        ObjectiveError: If a second derivative is missing or wrong.
    """
    functions = [c for c in _called_functions(forward) if not c.__module__.startswith("torch.")]
    for function in sorted(functions, key=lambda c: str(c.__name__)):
        with _recorded(function) as calls:
            forward()
        for args in calls:
            _check_call(function, args)


@contextmanager
def _recorded(function: Any) -> Iterator[list[tuple[Any, ...]]]:
    """Yield a list that fills with the arguments of the first calls of an autograd function that has a graph."""
    calls: list[tuple[Any, ...]] = []
    forward, defined = function.forward, vars(function).get("forward")
    own_context = function.setup_context is torch.autograd.Function.setup_context

    def noted(*args: Any) -> Any:
        given = args[own_context:]
        if len(calls) < CALLS and any(isinstance(t, Tensor) and t.requires_grad for t in given):
            calls.append(tuple(_copy(t) for t in given))
        return forward(*args)

    function.forward = staticmethod(noted)
    try:
        yield calls
    finally:
        if defined is None:
            del function.forward
        else:
            function.forward = defined


def _copy(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _check_call(function: Any, args: tuple[Any, ...]) -> None:
    """Compare the second derivative of one call with finite differences of its gradient."""
    places = [i for i, t in enumerate(args) if isinstance(t, Tensor) and t.requires_grad]
    dtype = args[places[0]].dtype
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    points = [args[i].detach() for i in places]
    directions = [
        random(x) * (x - x.mean()).square().mean().add(x.square().mean()).sqrt().clamp_min(1e-3) for x in points
    ]
    weights: list[Tensor] = []

    def gradients(step: float) -> tuple[list[Tensor], list[Tensor | None]]:
        leaves = [(x + step * d).requires_grad_() for x, d in zip(points, directions, strict=True)]
        given = list(args)
        for i, leaf in zip(places, leaves, strict=True):
            given[i] = leaf * 1
        with torch.enable_grad():
            out = function.apply(*given)
            outputs = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
            outputs = [t for t in outputs if t.requires_grad]
            weights.extend(random(t) for t in outputs[len(weights) :])
            return leaves, list(torch.autograd.grad(outputs, leaves, weights, create_graph=True, allow_unused=True))

    try:
        leaves, exact = gradients(0.0)
        step = STEPS.get(dtype, 3e-3)
        sides = [[gradients(sign * size)[1] for sign in (1, -1)] for size in (step, step / 8)]
    except Exception:  # the forward pass itself says what fails
        return
    rises = []
    for i, g in enumerate(exact):
        if g is None:
            continue
        wide, narrow = (
            (up[i].detach() - down[i].detach()) / (2 * size)  # type: ignore[union-attr]
            for (up, down), size in zip(sides, (step, step / 8), strict=True)
        )
        # where the two disagree, there is a kink or a jump
        smooth = (wide - narrow).abs() <= 0.02 * (wide.abs() + narrow.abs()) + 1e-3 * narrow.square().mean().sqrt()
        rises.append((g, narrow * smooth, smooth))
    size = float(torch.stack([rise.square().sum() for _, rise, _ in rises]).sum().sqrt()) if rises else 0.0
    scale = float(torch.stack([g.detach().square().sum() for g, _, _ in rises]).sum().sqrt()) if rises else 0.0
    limit = TOLERANCE.get(dtype, 0.1) * size + (1e-6 if dtype == torch.float64 else 1e-2) * scale
    for _ in range(3):
        signs = [torch.sign(random(rise)) * smooth for _, rise, smooth in rises]
        along = [(s * g).sum() for s, (g, _, _) in zip(signs, rises, strict=True) if g.requires_grad]
        found = 0.0
        if along:
            try:
                second = torch.autograd.grad(torch.stack(along).sum(), leaves, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                text = " ".join(str(error).split())
                raise ObjectiveError(
                    f"the autograd function {function.__name__} cannot be differentiated twice: {text}"
                ) from None
            found = sum(float((h * d).sum()) for h, d in zip(second, directions, strict=True) if h is not None)
        wanted = sum(float((s * rise).sum()) for s, (_, rise, _) in zip(signs, rises, strict=True))
        if not abs(found - wanted) <= limit:
            raise ObjectiveError(
                f"the second derivative of the autograd function {function.__name__} is wrong: along a direction, "
                f"autograd gives {found:.3g}, but differences of its backward pass give {wanted:.3g}. Its backward "
                "pass must compute with torch's operations on the saved tensors, without detaching them"
            )
