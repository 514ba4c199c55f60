"""Compare the Hessian product of an adapted network with the double backward of the library's own modules."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.curvature import hessian
from ikun.adapters import Adapted, adapt, adapt_network
from ikun.losses import LOSSES

STEPS = 4
X = torch.rand(9, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (9,), generator=torch.Generator().manual_seed(0))


def objective(adapted: Adapted, x: Tensor = X, y: Tensor = Y, dtype: torch.dtype = torch.float64) -> Objective:
    return make_objective(adapted.model, LOSSES["mse"], (x, y), dtype=dtype, reset=adapted.reset)


def double_backward(o: Objective, v: Tensor) -> Tensor:
    """The Hessian product by torch alone."""
    x, y = o.batches[0]
    names = list(o.parameters)
    weights = [dict(o.model.named_parameters())[name].requires_grad_() for name in names]
    with torch.enable_grad():
        loss = o.loss(o.model(x), y).double()
        g = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        g = [torch.zeros_like(w) if t is None else t for t, w in zip(g, weights, strict=True)]
        along = sum((a * b).sum() for a, b in zip(g, o.split(v), strict=True))
        h = torch.autograd.grad(along, weights, allow_unused=True)
    return o.flatten([torch.zeros_like(w) if t is None else t for t, w in zip(h, weights, strict=True)])


def plainly(model: nn.Module, x: Tensor = X, **options: Any) -> Adapted:
    """Adapt a network without replacing neurons."""
    with patch.object(adapt_network, "replace_neurons", lambda *_: {}):
        return adapt(model, x, **options)


def compare(
    model: nn.Module,
    x: Tensor = X,
    y: Tensor = Y,
    *,
    rates: tuple[float, float] = (0.02, 0.98),
    error: float = 1e-10,
    **options: Any,
) -> dict[str, str]:
    """Check outputs to the last bit in both precisions, the Hessian product to 1e-10, and that it was traced.

    Args:
        model: The network.
        x: Inputs [N, ...].
        y: Targets [N].
        rates: Bounds of the mean output.
        error: The largest relative error of the product.
        **options: Arguments of `adapt`.

    Returns:
        `Adapted.nodes` of the network.
    """
    options = {"steps": STEPS, **options}
    ours, theirs = adapt(model, x, **options), plainly(model, x, **options)
    for dtype in (torch.float32, torch.float64):
        a, b = objective(ours, x, y, dtype), objective(theirs, x, y, dtype)
        outputs = b.outputs(x.to(dtype))
        assert torch.equal(a.outputs(x.to(dtype)), outputs)
        assert rates[0] < outputs.mean() < rates[1]
    v = torch.randn(a.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, found = double_backward(b, v), hessian(a) @ v
    assert expected.norm() > 0
    assert not (why := [p for p in a.programs.values() if isinstance(p, str)]), why
    assert (found - expected).norm() < error * expected.norm()
    return ours.nodes
