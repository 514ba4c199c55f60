"""Sums over time steps are joined: fewer operations, the same product."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessian_tools.engine.linearized import Linearized
from hessian_tools.engine.trace import Program
from hessian_tools.objective import make_objective
from hessian_tools.operators import curvature

STEPS = 6


class Cells(nn.Module):
    """A recurrent cell whose outputs are stacked over time."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.inside, self.outward = nn.Linear(3, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, out = x.new_zeros(len(x), 5), []
        for t in range(STEPS):
            h = torch.tanh(self.inward(x * (t + 1)) + self.inside(h))
            out.append(self.outward(h))
        return torch.stack(out).square().mean(0)


class Steps(nn.Module):
    """A convolution that is used at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, :, None, None].expand(-1, -1, 4, 4)
        for _ in range(STEPS):
            h = torch.tanh(self.layer(h))
        return self.last(h.mean((2, 3)))


def _product(model: nn.Module, kind: str) -> tuple[Tensor, Tensor, Counter[Any]]:
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(4, (7,))
    o = make_objective(model.double(), nn.functional.cross_entropy, (x, y), check=False)
    v = torch.randn(o.size, dtype=torch.float64)
    op = curvature.OPERATORS[kind](o, 1e9)
    mine = op @ v
    assert op.path == "traced"
    autograd = getattr(curvature, f"_autograd_{kind}")(o, o.batches[0])
    (program,) = (p for p in o.programs.values() if isinstance(p, Program))
    calls: Counter[Any] = Counter()
    for part in program.parts[2:]:
        calls.update(n.target for n in part.run.graph.nodes if n.op == "call_function")  # type: ignore[attr-defined]
    return mine, Linearized(autograd, 0)(v), calls


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("make", [Cells, Steps])
def test_the_product_is_that_of_autograd(make: type[nn.Module], kind: str) -> None:
    mine, theirs, _ = _product(make(), kind)
    assert torch.linalg.vector_norm(mine - theirs) <= 1e-13 * torch.linalg.vector_norm(theirs)


def test_the_gradients_of_shared_weights_are_one_product() -> None:
    """A step takes five products for its tangents and two for its adjoints, and a weight takes one for its gradient."""
    *_, calls = _product(Cells(), "ggn")
    assert calls[torch.ops.aten.select_backward.default] == 0
    assert calls[torch.ops.aten.mm.default] <= 7 * STEPS - 2 + 3


def test_the_gradients_of_a_shared_convolution_are_one_call() -> None:
    *_, calls = _product(Steps(), "ggn")
    assert calls[torch.ops.aten.convolution_backward.default] <= STEPS + 2
