"""The curvature product of one batch, and the second derivative of its loss by the outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hessian_tools.objective import Loss


@dataclass(frozen=True)
class Linearized:
    """The product v [P] -> A v [P] of one batch.

    Attributes:
        product: The product.
        nbytes: Memory that it holds.
        parallel: Whether it can run in several threads at once, and be captured as a CUDA graph.
        path: How it is computed: "traced", or by "autograd".
        reason: Why the model could not be traced. Empty if it was.
        outputs: For a Gauss-Newton or Fisher matrix, v -> (J v, B J v) [n, ...] with B the second derivative of the
            loss by the outputs, so that v^T A v is their dot product. None if they are not known by themselves.
    """

    product: Callable[[Tensor], Tensor]
    nbytes: int
    parallel: bool = True
    path: str = "traced"
    reason: str = ""
    outputs: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self.product(v)


def output_form(kind: str, loss: Loss, outputs: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """Differentiate the loss of a batch with respect to the outputs.

    Args:
        kind: "hessian", "ggn" or "fisher".
        loss: The loss.
        outputs: Outputs of the batch.
        y: Targets of the batch.

    Returns:
        The gradient go of the loss with respect to the outputs, and the map o' -> go'. The map is H_out o' for the
        Hessian and the Gauss-Newton matrix. For the Fisher matrix it is (g_i . o'_i) g_i / n, where g_i is the gradient
        of sample i's loss and n the number of samples. None if the loss does not depend on the outputs.
    """
    with torch.enable_grad():
        outputs = outputs.detach().requires_grad_()
        value = loss(outputs, y)  # a mean over samples, so that its gradient holds that of every sample's loss
        if not value.requires_grad:
            return None
        (slope,) = torch.autograd.grad(value, outputs, create_graph=kind != "fisher")
    if kind != "fisher":
        return slope.detach(), lambda do: curved(slope, outputs, do)

    def along(do: Tensor) -> Tensor:
        dot = (slope * do).reshape(len(y), -1).sum(1) * len(y)
        return slope * dot.reshape(-1, *(1,) * (slope.dim() - 1))

    return slope, along


def curved(slope: Tensor, outputs: Tensor, do: Tensor) -> Tensor:
    """Return H_out o'. It is zero for a loss that is linear in the outputs."""
    if not slope.requires_grad:
        return torch.zeros_like(do)
    (image,) = torch.autograd.grad(slope, outputs, do, retain_graph=True, allow_unused=True)
    return torch.zeros_like(do) if image is None else image
