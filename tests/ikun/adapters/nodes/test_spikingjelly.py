"""Tests of SpikingJelly's neurons as nodes: outputs to the last bit, Hessian products against double backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from node_oracle import X, compare
from torch import Tensor, nn

from ikun.adapters import adapt
from ikun.adapters.nodes import choices
from ikun.adapters.nodes import spikingjelly as spikingjelly_nodes
from ikun.surrogates import Surrogate, spike

functional, layer, neuron, surrogate, base = (
    pytest.importorskip(f"spikingjelly.activation_based.{name}")
    for name in ("functional", "layer", "neuron", "surrogate", "base")
)
ATAN = surrogate.ATan()


def network(cls: Any, mode: str, **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(5, 8), cls(**settings), layer.Linear(8, 3), cls(**settings))
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(3)
    functional.set_step_mode(net, mode)
    return net


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("IFNode", {"v_reset": None, "surrogate_function": ATAN}),
        ("IFNode", {"v_reset": -0.2, "v_threshold": 0.7}),
        ("IFNode", {"detach_reset": True, "surrogate_function": surrogate.Erf()}),
        ("LIFNode", {"v_reset": 0.1, "tau": 1.7, "v_threshold": 0.4, "surrogate_function": surrogate.SoftSign()}),
        ("LIFNode", {"decay_input": False, "v_reset": None, "v_threshold": 0.6}),
        ("LIFNode", {"decay_input": False, "detach_reset": True, "tau": 3.0, "surrogate_function": surrogate.Rect()}),
        ("LIFNode", {"v_threshold": 0.4, "surrogate_function": surrogate.SuperSpike()}),
        ("ParametricLIFNode", {"v_reset": 0.1, "v_threshold": 0.5}),
        ("ParametricLIFNode", {"decay_input": False, "v_reset": None, "init_tau": 1.5}),
        ("SimpleIFNode", {"v_reset": 0.1}),
        ("SimpleLIFNode", {"tau": 2.5, "decay_input": True, "v_threshold": 0.4}),
    ],
)
def test_the_derivatives_are_those_of_the_library(kind: str, settings: dict[str, Any], mode: str) -> None:
    nodes = compare(network(getattr(neuron, kind), mode, **settings))
    assert nodes == {"1": "", "3": ""}


def test_names_state_and_settings_stay() -> None:
    net = network(neuron.ParametricLIFNode, "m", v_threshold=0.5)
    adapted = adapt(net, X, steps=4)
    assert [name for name, _ in adapted.model.named_parameters()] == [name for name, _ in net.named_parameters()]
    node: Any = adapted.model.get_submodule("1")
    assert isinstance(node, neuron.ParametricLIFNode)
    assert type(net[1]) is neuron.ParametricLIFNode
    node(torch.rand(4, 2, 8))
    assert node.v.shape == (2, 8)
    node.reset()
    assert node.v == 0.0


def test_surrogates_that_were_asked_for_act() -> None:
    ours = Surrogate.parse("sigmoid:5")
    for options in ({"surrogate": lambda h: spike(h, ours)}, {"steeper": 2.0}):
        assert compare(network(neuron.LIFNode, "m", v_threshold=0.4, surrogate_function=ATAN), **options) == {
            "1": "",
            "3": "",
        }
    net = adapt(network(neuron.LIFNode, "m", surrogate_function=ATAN), X, steps=4, steeper=2.0).model
    assert net.get_submodule("1").plan.spec.surrogate == "atan:4.0"


class Clamped(neuron.LIFNode):
    """A user's neuron, with other equations."""

    def single_step_functional_forward(self, inputs: Any, states: Any, **_: Any) -> Any:
        out, (v,) = super().single_step_functional_forward(inputs, states)
        return out, (v.clamp_min(-0.1),)


class Learned(nn.Module):
    """A surrogate with a learned width."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        smooth = torch.sigmoid(self.k * x)
        return (x >= 0).to(x) + smooth - smooth.detach()


@pytest.mark.parametrize(
    ("cls", "settings", "reason"),
    [
        (neuron.LIFNode, {"store_v_seq": True}, "it stores its potentials"),
        (Clamped, {}, "its class replaces single_step_functional_forward of LIFNode"),
        (neuron.LIFNode, {"surrogate_function": Learned()}, "its surrogate is learned, or is not a step at 0"),
        (neuron.QIFNode, {}, "its equations are not those of the kernels"),
    ],
)
def test_other_neurons_stay_as_they_are(cls: Any, settings: dict[str, Any], reason: str) -> None:
    nodes = compare(network(cls, "m", **{"v_threshold": 0.4, **settings}))
    assert nodes == {"1": reason, "3": reason}


class MultiStepLIFNode(neuron.BaseNode):
    """As in version 0.0.0.0.12, where such classes take [T, N, ...] and have no step mode."""

    def __init__(self, tau: float = 2.0, decay_input: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.tau, self.decay_input = tau, decay_input

    def forward(self, x_seq: Tensor) -> Tensor:
        spikes, self.v_seq = [], []
        if not isinstance(self.v, Tensor):
            self.v = torch.full_like(x_seq[0], self.v)
        for x in x_seq:
            rest = 0.0 if self.v_reset is None else self.v_reset
            self.v = (
                self.v + (x - (self.v - rest)) / self.tau
                if self.decay_input
                else self.v - (self.v - rest) / self.tau + x
            )
            s = self.surrogate_function(self.v - self.v_threshold)
            z = s.detach() if self.detach_reset else s
            self.v = self.v - z * self.v_threshold if self.v_reset is None else (1 - z) * self.v + z * self.v_reset
            spikes.append(s)
            self.v_seq.append(self.v)
        return torch.stack(spikes)


@pytest.mark.parametrize("settings", [{}, {"v_reset": None, "decay_input": False, "v_threshold": 0.6}])
def test_multi_step_classes_of_old_versions(settings: dict[str, Any]) -> None:
    assert compare(network(MultiStepLIFNode, "m", **{"v_threshold": 0.4, **settings})) == {"1": "", "3": ""}


class Reader(nn.Module):
    """A network that returns the potentials of its neurons."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.layers = network(MultiStepLIFNode, "m", v_threshold=0.4)
        self.keeps = keeps

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        last: Any = self.layers[3]
        return y + 0.1 * (last.v_seq[1] if self.keeps else last.v)


def test_potentials_that_a_network_reads() -> None:
    """The last potential has its derivatives. Those before it have none in a node, so the neurons stay."""
    assert compare(Reader(False)) == {"layers.1": "", "layers.3": ""}
    nodes = compare(Reader(True))
    assert all(reason.startswith("the network would differ") for reason in nodes.values())


def test_pooling_and_one_image_for_all_steps() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                layer.Conv2d(1, 3, 3, padding=1), layer.BatchNorm2d(3), neuron.ParametricLIFNode(v_threshold=0.2),
                layer.MaxPool2d(2), layer.Flatten(), layer.Linear(12, 3), neuron.LIFNode(v_threshold=0.1),
            )  # fmt: skip
            functional.set_step_mode(self, "m")

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.unsqueeze(0).repeat(4, 1, 1, 1, 1)).mean(0)

    images = torch.rand(6, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    assert compare(Net(), images, torch.arange(6) % 3, steps=None) == {"layers.2": "", "layers.6": ""}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"decay": 0.6}, "its first derivative differs"),
        ({"reset": "soft"}, "its first derivative differs"),
        ({"surrogate": "sigmoid:4.1"}, "its first derivative differs"),
        ({"exact": True}, "its outputs differ"),
    ],
)
def test_a_node_with_other_equations_is_not_used(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(module: nn.Module) -> Any:
        base, plan = spikingjelly_nodes.spikingjelly_node(module)
        exact = change.get("exact", False)
        spec = replace(plan.spec, **({"threshold": 0.3} if exact else change))
        return base, replace(plan, spec=spec, exact=exact)

    monkeypatch.setitem(choices.FITS, "spikingjelly", wrong)
    nodes = compare(network(neuron.LIFNode, "m", v_threshold=0.4))
    assert nodes == {"1": reason, "3": reason}
