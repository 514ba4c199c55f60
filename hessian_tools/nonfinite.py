"""Find the first layer whose output, gradient or curvature is NaN or infinite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.evaluation import differentiable, observable
from hessian_tools.objective import Objective


@differentiable
def first_not_finite(objective: Objective) -> str | None:
    """Describe where values stop being finite.

    Returns:
        A phrase that names the layer or parameter, or None if the outputs, the gradient and one Hessian-vector product
        are finite.
    """
    objective = replace(objective, group=None)  # no collective calls: the other processes may not reach this point
    return _output(objective) or _gradient(objective) or _curvature(objective)


def _output(objective: Objective) -> str | None:
    """Check the module outputs in the order of the forward pass, then the loss."""
    found: list[str] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, _: Any, out: Any) -> None:
            if isinstance(out, Tensor) and not torch.isfinite(out).all() and not found:
                found.append(f"the output of layer '{name}' ({type(module).__name__}) is not finite")

        return hook

    leaves = [(name, m) for name, m in observable(objective.model) if name and not list(m.children())]
    handles = [m.register_forward_hook(note(name)) for name, m in leaves]
    try:
        with torch.no_grad():
            for (x, y), _ in objective.weighted_batches():
                loss = objective.loss(objective.outputs(x), y)
                if found:
                    return found[0]
                if not torch.isfinite(loss):
                    return "the loss is not finite although every layer's output is"
    finally:
        for handle in handles:
            handle.remove()
    return None


def _gradient(objective: Objective) -> str | None:
    """Check the gradient of the loss."""
    _, gradient = objective.value_and_gradient()
    name = _last_of(objective, gradient)
    return None if name is None else f"the gradient is not finite from '{name}' backwards"


def _curvature(objective: Objective) -> str | None:
    """Check a Hessian-vector product on each batch."""
    parameters = list(objective.parameters.values())
    for (x, y), _ in objective.weighted_batches():
        loss = objective.loss(objective.outputs(x), y)
        if not loss.requires_grad:
            continue
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        total = torch.stack([g.sum() for g in gradients if g is not None]).sum()
        if total.requires_grad:
            product = objective.flatten(torch.autograd.grad(total, parameters, allow_unused=True))
            if name := _last_of(objective, product):
                return f"second derivatives are not finite from '{name}' backwards"
    return None


def _last_of(objective: Objective, v: Tensor) -> str | None:
    """Return the name of the last parameter whose part of v [P] is not finite, or None.

    Backpropagation carries a NaN to all earlier parameters, so the last one is where it began.
    """
    parts = zip(objective.parameters, objective.split(v), strict=True)
    broken = [name for name, part in parts if not torch.isfinite(part).all()]
    return broken[-1] if broken else None
