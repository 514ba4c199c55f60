"""Tests that neurons of other libraries are read correctly, against equivalent neurons of ikun."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ikun.initializers.foreign_neurons import SURROGATES, stand_in
from ikun.neurons import Dynamics, Neuron
from ikun.surrogates import Surrogate


def currents(dtype: torch.dtype = torch.float64) -> Tensor:
    return 0.4 + 1.5 * torch.randn(12, 5, 7, dtype=dtype, generator=torch.Generator().manual_seed(3))


def gradient(neuron: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    spikes = neuron(x)
    weights = torch.linspace(-1, 1, spikes.numel(), dtype=x.dtype).view_as(spikes)
    return spikes.detach(), torch.autograd.grad((spikes * weights).sum(), x)[0]


KINDS: dict[str, dict[str, Any]] = {
    "IFNode": {"v_threshold": 0.7},
    "LIFNode": {"tau": 3.0, "decay_input": False, "v_reset": None},
    "LIFNode, of the reset": {"tau": 1.5, "v_reset": -0.2},
    "ParametricLIFNode": {"init_tau": 4.0},
}


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("kind", KINDS)
def test_spikingjelly_fires_and_learns_as_its_stand_in(kind: str, surrogate: str) -> None:
    library, surrogates = (pytest.importorskip(f"spikingjelly.activation_based.{m}") for m in ("neuron", "surrogate"))
    function = getattr(surrogates, surrogate)(1.5)
    neuron = getattr(library, kind.split(",")[0])(surrogate_function=function, step_mode="m", **KINDS[kind])
    (spikes, slope), (ours, our_slope) = (gradient(n.double(), currents()) for n in (neuron, stand_in(neuron)))
    assert torch.equal(spikes, ours)
    torch.testing.assert_close(slope, our_slope, rtol=0, atol=1e-7)  # 1/tau of PLIF is a float32


def test_snntorch_fires_as_its_stand_in() -> None:
    """With its reset at once; at a soft reset it lets the spike's part of the membrane not leak."""
    snntorch = pytest.importorskip("snntorch")
    neuron = snntorch.Leaky(beta=0.5, threshold=0.8, reset_mechanism="zero", reset_delay=False)
    membrane, spikes, x = neuron.init_leaky(), [], currents(torch.float32)
    for step in x:
        spike, membrane = neuron(step, membrane)
        spikes.append(spike)
    assert torch.equal(torch.stack(spikes), stand_in(neuron)(x))


class LIFNode(nn.Module):
    """As SpikingJelly's, where it is not installed."""

    def __init__(self, **own: Any) -> None:
        super().__init__()
        self.tau, self.decay_input, self.v_threshold, self.v_reset = 2.0, True, 1.0, 0.0
        vars(self).update(own)

    def neuronal_charge(self, x: Tensor) -> None: ...


class ParametricLIFNode(LIFNode):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(-math.log(3.0)))

    def neuronal_charge(self, x: Tensor) -> None: ...


class Other(LIFNode):
    """Charged in its own way."""

    def neuronal_charge(self, x: Tensor) -> None: ...


class ATan:
    alpha = 5.0


class Leaky(nn.Module):
    def __init__(self, mechanism: str) -> None:
        super().__init__()
        self.beta, self.threshold = torch.tensor([0.8, 0.9]), torch.tensor(0.3)
        self.reset_mechanism = mechanism


@pytest.mark.parametrize(
    ("neuron", "rates", "dynamics"),
    [
        (LIFNode(), (0.5, 0.5), Dynamics(Surrogate("atan", 2.0))),
        (LIFNode(tau=8.0, decay_input=False), (0.875, 1.0), Dynamics(Surrogate("atan", 2.0))),
        (LIFNode(surrogate_function=ATan(), v_threshold=0.3), (0.5, 0.5), Dynamics(Surrogate("atan", 5.0), 0.3)),
        (LIFNode(v_reset=None), (0.5, 0.5), Dynamics(Surrogate("atan", 2.0), reset="soft")),
        (LIFNode(v_reset=-0.5), (0.5, 0.5), Dynamics(Surrogate("atan", 2.0), v_reset=-0.5)),
        (ParametricLIFNode(), (0.75, 0.25), Dynamics(Surrogate("atan", 2.0))),
        (Other(tau=8.0), (1.0, 1.0), Dynamics(Surrogate("atan", 2.0))),
        (Leaky("subtract"), (0.85, 1.0), Dynamics(Surrogate("atan", 2.0), 0.3, reset="soft")),
        (Leaky("zero"), (0.85, 1.0), Dynamics(Surrogate("atan", 2.0), 0.3)),
        (nn.Threshold(0.2, 0.0), (1.0, 1.0), Dynamics(Surrogate("atan", 2.0), 0.2)),
        (nn.Identity(), (1.0, 1.0), Dynamics(Surrogate("atan", 2.0))),
    ],
    ids=str,
)
def test_the_neurons_parameters_are_read(neuron: nn.Module, rates: tuple[float, float], dynamics: Dynamics) -> None:
    found = stand_in(neuron)
    assert found.rates() == pytest.approx(rates)
    assert found.dynamics.threshold == pytest.approx(dynamics.threshold)
    assert (found.dynamics.surrogate, found.dynamics.reset) == (dynamics.surrogate, dynamics.reset)
    assert found.dynamics.v_reset == dynamics.v_reset


def test_what_is_given_comes_first_and_ikuns_own_stand_for_themselves() -> None:
    found = stand_in(LIFNode(surrogate_function=ATan(), v_threshold=0.3), "sigmoid:4", 2.0).dynamics
    assert (found.surrogate, found.threshold) == (Surrogate("sigmoid", 4.0), 2.0)
    own = Neuron("lif", Dynamics(Surrogate("erf", 2.0)), 3.0)
    assert stand_in(own, "atan:2", 2.0) is own
