"""Outputs that are no tensor, and inputs that are no floating-point numbers."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian
from ikun.adapters import adapt

X, Y = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
Pair = namedtuple("Pair", "logits other")


@dataclass
class Output:
    logits: Tensor
    other: Tensor | None = None


class Returning(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.make = nn.Linear(5, 3), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.fc(x))


def matrix(make: Callable[[Tensor], Any], x: Tensor = X, **options: Any) -> Tensor:
    adapted = adapt(Returning(make), x, **options)
    return dense(
        hessian(make_objective(adapted.model, nn.functional.cross_entropy, (x, Y), reset=adapted.reset, batch_size=4))
    )


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (lambda y: (y, 2 * y), "spikes"),
        (lambda y: (y, {"hidden": None}), "spikes"),
        (lambda y: (2 * y, y), "membrane"),
        (lambda y: (2 * y, y, 3 * y), "1"),
        (lambda y: [2 * y, y], "1"),
        (lambda y: [y], "spikes"),
        (lambda y: {"logits": y}, "spikes"),
        (lambda y: {"logits": y, "loss": None, "names": ["a"]}, "spikes"),
        (lambda y: {"aux": 2 * y, "out": y}, "out"),
        (lambda y: Output(y), "spikes"),
        (lambda y: Output(2 * y, y), "other"),
        (lambda y: Pair(y, 2 * y), "spikes"),
        (lambda y: Pair(2 * y, y), "other"),
    ],
)
def test_the_output_that_is_meant_is_used(make: Callable[[Tensor], Any], output: str) -> None:
    torch.testing.assert_close(matrix(make, output=output), matrix(lambda y: y))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int16, torch.int64])
def test_whole_numbers_are_converted_where_the_network_needs_it(dtype: torch.dtype) -> None:
    x = (X > 0.5).to(dtype)
    torch.testing.assert_close(matrix(lambda y: y, x), matrix(lambda y: y, x.float()))


def test_whole_numbers_stay_where_the_network_takes_them() -> None:
    net = nn.Sequential(nn.Embedding(4, 5), nn.Flatten(), nn.Linear(10, 3))
    adapted = adapt(net, torch.randint(0, 4, (6, 2)))
    assert not adapted.plan.floats
    assert adapted.model is not None
