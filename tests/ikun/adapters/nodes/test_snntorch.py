"""Tests of snnTorch's neurons as nodes: outputs to the last bit, Hessian products against double backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from node_oracle import compare
from torch import Tensor, nn

snn, surrogate = pytest.importorskip("snntorch"), pytest.importorskip("snntorch.surrogate")


class Net(nn.Module):
    """Two layers of neurons. Their state is handed on here, or kept by the neurons."""

    def __init__(self, kind: str, handed: bool, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        cls = getattr(snn, kind)
        settings = {"spike_grad": surrogate.fast_sigmoid(slope=5), "init_hidden": not handed, **settings}
        more = [{"linear_features": n} if kind.startswith("R") else {} for n in (6, 3)]
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 3)
        self.lif1, self.lif2 = cls(**settings, **more[0]), cls(**{**settings, "output": not handed}, **more[1])
        self.handed, self.recurrent = handed, kind.startswith("R")
        with torch.no_grad():
            for fc in (self.fc1, self.fc2):
                fc.weight.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        first: Any = ()
        second: Any = ()
        total = torch.zeros(len(x), 3, dtype=x.dtype)
        for _ in range(4):
            if self.handed:
                r, *first = self.lif1(self.fc1(x), *first)
                s, *second = self.lif2(self.fc2(r), *second)
                total = total + s + 0.1 * second[-1]
                if self.recurrent:  # their first state is the spikes
                    first, second = [r, *first], [s, *second]
            else:
                s, *_, m = self.lif2(self.fc2(self.lif1(self.fc1(x))))
                total = total + s + 0.1 * m
        return total / 4


RATES = {"Leaky": {"beta": 0.8}, "Lapicque": {"beta": 0.8}, "RLeaky": {"beta": 0.8}}
RATES |= {name: {"alpha": 0.6, "beta": 0.8} for name in ("Synaptic", "RSynaptic")}


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("kind", list(RATES))
def test_the_derivatives_are_those_of_the_library(kind: str, reset: str) -> None:
    handed = reset != "zero"
    net = Net(kind, handed, reset_mechanism=reset, **RATES[kind])
    nodes = compare(net, steps=None, rates=(-3, 9))
    assert nodes == {"lif1": "", "lif2": ""}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Leaky", {"learn_beta": True, "learn_threshold": True}),
        ("Leaky", {"learn_threshold": True, "reset_mechanism": "zero", "threshold": 0.7}),
        ("Leaky", {"reset_delay": False}),
        ("Leaky", {"reset_delay": False, "reset_mechanism": "zero", "learn_threshold": True}),
        ("Leaky", {"beta": torch.tensor(0.7), "spike_grad": surrogate.atan(), "threshold": 0.5}),
        ("Leaky", {"spike_grad": surrogate.sigmoid(slope=7)}),
        ("Leaky", {"spike_grad": surrogate.SFS(slope=7)}),
        ("Synaptic", {"learn_alpha": True, "learn_beta": True}),
        ("Synaptic", {"reset_delay": False}),
        ("RLeaky", {"learn_beta": True, "learn_recurrent": False}),
    ],
)
def test_what_is_learned_and_set(kind: str, settings: dict[str, Any]) -> None:
    net = Net(kind, False, **{**RATES[kind], **settings})
    assert compare(net, steps=None, rates=(-3, 9)) == {"lif1": "", "lif2": ""}


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("Alpha", {"alpha": 0.8, "beta": 0.6}, "its equations are not those of the kernels"),
        ("Leaky", {"beta": 0.8, "graded_spikes_factor": 0.5}, "its spikes are graded"),
    ],
)
def test_other_neurons_stay_as_they_are(kind: str, settings: dict[str, Any], reason: str) -> None:
    nodes = compare(Net(kind, False, **settings), steps=None, rates=(-9, 9))
    assert nodes == {"lif1": reason, "lif2": reason}
