"""Tests of Norse's neurons as nodes: outputs to the last bit, Hessian products against double backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from node_oracle import compare
from torch import Tensor, nn

norse = pytest.importorskip("norse.torch")
reset = pytest.importorskip("norse.torch.functional.reset")
RATES = {name: torch.tensor(v) for name, v in {"alpha": 5.0, "tau_mem_inv": 300.0, "v_th": 0.3}.items()}
LIF = {**RATES, "tau_syn_inv": torch.tensor(200.0)}


class Net(nn.Module):
    """Two layers of neurons over four steps."""

    def __init__(self, cls: Any, p: Any, recurrent: bool, timed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.timed = nn.Linear(5, 6), nn.Linear(6, 3), timed
        self.l1, self.l2 = (cls(*(size, size) if recurrent else (), p) for size in (6, 3))
        with torch.no_grad():
            for fc in (self.fc1, self.fc2):
                fc.weight.mul_(6)

    def forward(self, x: Tensor) -> Tensor:
        if self.timed:
            y, _ = self.l1(self.fc1(x[None].repeat(4, 1, 1)))
            y, state = self.l2(self.fc2(y))
            return y.mean(0) + 0.01 * state.v
        first = second = None
        total: Any = 0
        for _ in range(4):
            y, first = self.l1(self.fc1(x), first)
            y, second = self.l2(self.fc2(y), second)
            total = total + y
        state = second
        return total / 4 + 0.01 * state.v


CASES = {
    "LIFCell": (LIF, False, False),
    "LIF": ({**LIF, "v_leak": torch.tensor(0.05)}, False, True),
    "LIFRecurrentCell": (LIF, True, False),
    "LIFRecurrent": ({**LIF, "v_reset": torch.tensor(-0.1)}, True, True),
    "LIFBoxCell": ({**RATES, "v_leak": torch.tensor(0.05)}, False, False),
    "IAFCell": ({"alpha": torch.tensor(5.0), "v_th": torch.tensor(0.5)}, False, False),
}


@pytest.mark.parametrize("kind", list(CASES))
def test_the_derivatives_are_those_of_the_library(kind: str) -> None:
    settings, recurrent, timed = CASES[kind]
    p = getattr(norse, kind.removesuffix("Cell").removesuffix("Recurrent") + "Parameters")(**settings)
    assert compare(Net(getattr(norse, kind), p, recurrent, timed), steps=None) == {"l1": "", "l2": ""}


def test_a_soft_reset_and_another_surrogate() -> None:
    p = norse.LIFBoxParameters(**RATES, reset_method=reset.reset_subtract, method="tanh")
    assert compare(Net(norse.LIFBoxCell, p, False, False), steps=None) == {"l1": "", "l2": ""}


def test_other_neurons_stay_as_they_are() -> None:
    p = norse.LIFAdExParameters(alpha=torch.tensor(5.0), v_th=torch.tensor(0.3))
    nodes = compare(Net(norse.LIFAdExCell, p, False, False), steps=None, rates=(-1, 2))
    assert set(nodes.values()) == {"its equations are not those of the kernels"}
