"""Networks of snnTorch that are called step by step are traced with their steps stacked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hessian_tools
from hessian_tools.engine.trace import Program
from ikun.adapters import adapt

snn = pytest.importorskip("snntorch")


class Net(nn.Module):
    """Two layers in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(6, 5), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(5, 3), snn.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes = []
        for _ in range(4):
            hidden, one = self.lif1(self.fc1(x), one)
            out, two = self.lif2(self.fc2(hidden), two)
            spikes.append(out)
        return torch.stack(spikes)


def test_steps_are_stacked() -> None:
    torch.manual_seed(0)
    x, y = 3 * torch.rand(7, 6), torch.arange(7) % 3
    adapted = adapt(Net(), x)
    objective = hessian_tools.make_objective(adapted.model, nn.functional.cross_entropy, (x, y), reset=adapted.reset)
    hessian_tools.hessian(objective) @ torch.ones(objective.size)
    programs = [p for p in objective.programs.values() if isinstance(p, Program)]
    assert programs
    assert all(p.folded for p in programs)
