"""Tests of initializing other libraries' modules: on imitations of their classes, and on the libraries if installed."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from draws import seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from ikun.initializers.catalog import INITIALIZERS, initialize, initialize_module
from ikun.initializers.foreign_neurons import stand_in
from ikun.initializers.module_graph import is_neuron, stages_of_module
from ikun.initializers.probe import Probe, reset_states
from ikun.layer_statistics import derivative_square
from ikun.networks import Network, Spec
from ikun.neurons import Dynamics, Neuron
from ikun.surrogates import Surrogate

STEPS = 4
MODEL = Neuron("if", Dynamics(Surrogate("atan", 2.0)))
MEASURING = ("ikun", "delta_orthogonal", "lsuv", "fluctuation", "firing")


class MemoryModule(nn.Module):
    """As SpikingJelly's: state `v`, reset() and a step mode."""

    def __init__(self) -> None:
        super().__init__()
        self.v: float | Tensor = 0.0
        self.step_mode = "s"

    def reset(self) -> None:
        self.v = 0.0


class BaseNode(MemoryModule):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.once(step) for step in x]) if self.step_mode == "m" else self.once(x)

    def once(self, x: Tensor) -> Tensor:
        h = self.v + x
        s = (h >= 1).to(x.dtype)
        self.v = h * (1 - s)
        return s


class IFNode(BaseNode):
    pass


class SpikingNeuron(nn.Module):
    """Like a neuron of snnTorch: it keeps its state and has a method reset_mem(), but no method reset()."""

    def __init__(self) -> None:
        super().__init__()
        self.reset = self.mem = torch.zeros(())

    def reset_mem(self) -> Tensor:
        self.mem = torch.zeros(())
        return self.mem


class Leaky(SpikingNeuron):
    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor]:
        self.mem = 0.8 * self.mem + input_
        spike = (self.mem >= 1).to(input_)
        self.mem = self.mem - spike
        return spike, self.mem


class RLeaky(SpikingNeuron):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.recurrent = nn.Linear(size, size)
        self.spike = torch.zeros(())

    def reset_mem(self) -> Tensor:
        self.spike = torch.zeros(())
        return super().reset_mem()

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor]:
        self.mem = 0.8 * self.mem + input_ + self.recurrent(self.spike.expand_as(input_))
        self.spike = (self.mem >= 1).to(input_)
        self.mem = self.mem - self.spike
        return self.spike, self.mem


class MultiStep(nn.Module):
    """The paper's network, time first, in the manner of SpikingJelly."""

    def __init__(self, channels: int, norm: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for inputs in (1, channels):
            self.layers.append(nn.Conv2d(inputs, channels, 3, padding=1))
            if norm:
                self.layers.append(nn.BatchNorm2d(channels))
            self.layers.extend([IFNode(), nn.MaxPool2d(2)])
        self.layers.extend([nn.Flatten(), nn.Linear(channels * 4, channels * 16), IFNode()])
        self.layers.extend([nn.Linear(channels * 16, 10), IFNode()])
        for m in self.layers:
            m.step_mode = "m"

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(STEPS, *x.shape)
        for m in self.layers:
            x = m(x) if isinstance(m, BaseNode) else m(x.flatten(0, 1)).unflatten(0, (STEPS, -1))
        return x.mean(0)


class SingleStep(MultiStep):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(())
        for _ in range(STEPS):
            h = x
            for m in self.layers:
                h = m(h)
            out = out + h
        return out / STEPS


def single_step(channels: int) -> SingleStep:
    net = SingleStep(channels, norm=False)
    for m in net.modules():
        if isinstance(m, BaseNode):
            m.step_mode = "s"
    return net


class Recurrent(nn.Module):
    """In the manner of snnTorch, with a recurrent matrix outside of the neurons, one inside, and a bare readout."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(20, 3)  # registered out of order
        self.fc1, self.back, self.lif1 = nn.Linear(6, 30), nn.Linear(30, 30), Leaky()
        self.fc2, self.lif2 = nn.Linear(30, 20), RLeaky(20)

    def forward(self, x: Tensor) -> Tensor:
        again, total = torch.zeros(()), torch.zeros(())
        for _ in range(STEPS):
            spike, _ = self.lif1(input_=self.fc1(x) + again)
            late, _ = self.lif2(self.fc2(spike))
            total, again = total + self.out(late), self.back(spike)
        return total


def images(count: int = 64) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=seeded(9))


def weights(module: nn.Module) -> list[Tensor]:
    return [m.weight.detach() for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("name", [n for n in INITIALIZERS if n not in ("gradient_stable", "two_sided", "relay")])
def test_a_look_alike_of_the_papers_network_gets_the_very_same_weights(name: str) -> None:
    ours, theirs = Network(Spec(channels=6, threshold=1.0)), MultiStep(6)
    found = initialize(ours, name, generator=seeded(3), x=images(), alpha=0.5)
    other = initialize_module(theirs, name, generator=seeded(3), x=images(), alpha=0.5)
    assert other.forward_passes == found.forward_passes + 1
    for a, b in zip(found.solutions, other.solutions, strict=True):
        assert (a.passes, a.variance) == (b.passes, pytest.approx(b.variance, rel=1e-9))
    for v, w in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(v, w, rtol=1e-6, atol=0)
    assert all(torch.equal(theirs.layers[i].weight, ours.get_submodule(f"norm{n}").weight) for i, n in ((1, 1), (5, 2)))
    assert all(m.bias.eq(0).all() for m in theirs.layers if isinstance(m, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize("name", MEASURING)
def test_one_call_a_step_and_one_call_for_all_steps_are_the_same(name: str) -> None:
    ours, theirs = Network(Spec(channels=6, norm="none")), single_step(6)
    initialize(ours, name, generator=seeded(3), x=images())
    initialize_module(theirs, name, generator=seeded(3), x=images())
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=0)  # round-off, stopped by a tolerance of 1%


def test_ikuns_own_network_is_taken_as_it_is() -> None:
    one, two = (Network(Spec(model="rsnn", hidden=(20,))) for _ in range(2))
    initialize(one, "ikun", generator=seeded(), x=images())
    initialize_module(two, "ikun", generator=seeded(), x=images())
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


def test_the_forward_pass_says_what_feeds_what() -> None:
    net, x = Recurrent(), torch.rand(8, 6, generator=seeded())
    found = stages_of_module(net, x, stand_in)
    assert [(s.name, s.neuron, s.recurrent) for s in found] == [
        ("fc1", net.lif1, False),
        ("fc2", net.lif2, False),
        ("lif2.recurrent", net.lif2, True),
        ("out", None, False),
        ("back", net.lif1, True),
    ]
    assert [s.model is None for s in found] == [False, False, False, True, False]
    assert next(s.name for s in stages_of_module(net, None, stand_in)) == "out"
    theirs = MultiStep(2)
    nodes = [m for m in theirs.modules() if isinstance(m, BaseNode)]
    for batch in (None, images()):
        normed = stages_of_module(theirs, batch, stand_in)
        assert [s.neuron for s in normed] == nodes
    assert all(m.v == 0.0 for m in nodes)  # as fresh as before
    assert [type(s.norm).__name__ for s in normed] == ["BatchNorm2d", "BatchNorm2d", "NoneType", "NoneType"]


def test_currents_include_what_comes_back_once() -> None:
    net, x = Recurrent(), torch.rand(16, 6, generator=seeded())
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 1, generator=seeded(1))
    probe = Probe(net, stages_of_module(net, x, stand_in), x)
    reset_states(net)
    mems: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        again = torch.zeros(16, 30)
        for _ in range(STEPS):
            mems[0].append(net.fc1(x) + again)
            spike, _ = net.lif1(mems[0][-1])
            before = net.lif2.spike.expand(16, 20)
            mems[1].append(net.fc2(spike) + net.lif2.recurrent(before))
            net.lif2(net.fc2(spike))
            again = net.back(spike)
    reset_states(net)
    for group, expected in zip(probe.groups(), mems, strict=False):
        seen = probe.look(group)
        torch.testing.assert_close(seen.current, torch.stack(expected))
    assert [len(g) for g in probe.groups()] == [2, 2, 1]


class Two(nn.Module):
    """Two weight layers into the same neurons, as with a convolution in a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.short, self.node = nn.Linear(40, 300), nn.Linear(40, 300), Neuron("if", MODEL.dynamics)

    def forward(self, x: Tensor) -> Tensor:
        return self.node((self.long(x) + self.short(x)).expand(STEPS, -1, -1))


def test_layers_that_feed_the_same_neurons_are_solved_together() -> None:
    net, x = Two(), torch.rand(64, 40, generator=seeded())
    square = float(x.square().mean())
    done = initialize_module(net, "fluctuation", generator=seeded(), x=x)
    constant = sum(t * t for t in range(1, STEPS + 1)) / STEPS
    assert [s.variance for s in done.solutions] == pytest.approx([0.5 / (40 * square * constant)] * 2)
    done = initialize_module(net, "ikun", generator=seeded(), x=x)
    (long, short), seen = done.solutions, Probe(net, stages_of_module(net, x, stand_in), x)
    assert [s.layer for s in done.solutions] == ["long", "short"]
    assert long.variance == short.variance
    slope = seen.look(seen.groups()[0]).derivative_square()
    assert long.variance == pytest.approx(1 / (40 * square * slope), rel=0.02)


def test_a_shared_layer_feeds_its_first_neurons_and_a_norm_of_a_sum_is_nobodys() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn, self.other, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
            self.node1, self.node2 = Leaky(), Leaky()

        def forward(self, x: Tensor) -> Tensor:
            return self.node2(self.norm(self.turn(self.node1(self.turn(x))[0]) + self.other(x)))[0]

    net = Shared()
    found = stages_of_module(net, torch.rand(8, 6), stand_in)
    assert [(s.name, s.neuron, s.norm) for s in found] == [("turn", net.node1, None), ("other", net.node2, None)]


class Shortcut(nn.Module):
    """The shortcut is called before the layer that its sum waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.first, self.second = nn.Linear(40, 60), nn.Linear(40, 50), nn.Linear(50, 60)
        self.node1, self.node2 = (Neuron("if", MODEL.dynamics) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        short = self.short(x)
        return self.node2(self.second(self.node1(self.first(x).expand(STEPS, -1, -1))) + short)


def test_a_layer_comes_when_all_that_it_meets_is_there() -> None:
    net, x = Shortcut(), torch.rand(64, 40, generator=seeded())
    done = initialize_module(net, "firing", generator=seeded(), x=x)
    assert [s.layer for s in done.solutions] == ["first", "short", "second"]
    with torch.no_grad():
        rate = float(net.node1(net.first(x).expand(STEPS, -1, -1)).mean())
    assert done.solutions[2].variance == pytest.approx(1 / (50 * rate))


def test_the_state_a_module_comes_with_does_not_matter() -> None:
    found = []
    for dirty in (False, True):
        net = single_step(4)
        if dirty:
            net(torch.rand(5, 1, 8, 8))
        initialize_module(net, "firing", generator=seeded(), x=images())
        found.append(weights(net))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "name", [n for n in INITIALIZERS if n not in ("gradient_stable", "two_sided", "relay", "tdbn")]
)
def test_every_rule_serves_recurrence_and_a_readout(name: str) -> None:
    net, x = Recurrent(), torch.rand(200, 6, generator=seeded())
    done = initialize_module(net, name, generator=seeded(2), x=x)
    assert all(torch.isfinite(w).all() and w.abs().sum() > 0 for w in weights(net))
    if name in MEASURING:
        assert [s.layer for s in done.solutions] == ["fc1", "back", "fc2", "lif2.recurrent", "out"]
        readout = done.solutions[-1]
        expected = {"lsuv": readout.variance, "delta_orthogonal": 1.0, "fluctuation": 1 / 20}
        assert readout.variance == pytest.approx(expected.get(name, 1 / (20 * readout.input_square)))
    assert all(b.eq(0).all() for n, b in net.named_parameters() if n.endswith("bias"))


def test_a_readout_of_lsuv_has_unit_variance() -> None:
    net, x = Recurrent(), torch.rand(200, 6, generator=seeded())
    initialize_module(net, "lsuv", generator=seeded(2), x=x)
    outs: list[Tensor] = []
    net.out.register_forward_hook(lambda m, a, out: outs.append(out.detach()))
    reset_states(net)
    net(x)
    assert float(torch.stack(outs).var()) == pytest.approx(1, abs=0.1)


def test_the_module_is_left_as_it_was() -> None:
    net = MultiStep(3).train()
    net.layers[1].eval()
    modes = [m.training for m in net.modules()]
    statistics = {k: v.clone() for k, v in net.named_buffers()}
    initialize_module(net, "ikun", generator=seeded(), x=images())
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, statistics[k]) for k, v in net.named_buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(m.v == 0.0 for m in net.modules() if isinstance(m, BaseNode))


def test_threshold_surrogate_and_alpha_reach_the_stand_in() -> None:
    solutions = []
    for options in ({}, {"threshold": 0.5}, {"surrogate": "sigmoid:4"}, {"alpha": 0.5}):
        done = initialize_module(MultiStep(3), "ikun", generator=seeded(), x=images(), **options)
        solutions.append(done.solutions[0].variance)
    assert len({round(v, 6) for v in solutions}) == 4
    net = MultiStep(3)
    initialize_module(net, "tdbn", generator=seeded(), threshold=0.5, alpha=0.5)
    assert net.layers[1].weight.eq(0.25).all()


class Cell(nn.Module):
    """A neuron of nobody's class with a state that only `forget` clears."""

    def __init__(self) -> None:
        super().__init__()
        self.v: float | Tensor = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v + x
        return (self.v >= 1).to(x)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.cell = nn.Conv1d(2, 4, 3, padding=1), Cell()
        self.volume, self.last = nn.Conv3d(1, 2, 3, padding=1), Cell()

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.last(self.volume(self.cell(self.conv(x))[:, None, None])) for _ in range(3)), torch.zeros(()))


def forget(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, Cell):
            m.v = 0.0


@pytest.mark.parametrize("kinds", [Cell, (Cell, Leaky)])
def test_neurons_and_their_reset_can_be_named(kinds: Any) -> None:
    x = 2 * torch.rand(32, 2, 9, generator=seeded())
    net = Tiny()
    done = initialize_module(net, "firing", generator=seeded(), x=x, neurons=kinds, reset=forget)
    assert [s.layer for s in done.solutions] == ["conv", "volume"]
    rate = float(x.square().mean())
    assert done.solutions[0].variance == pytest.approx(1 / (6 * rate), rel=1e-5)
    assert (net.cell.v, net.last.v) == (0.0, 0.0)
    with torch.no_grad():
        h, spikes = torch.zeros(()), []
        for _ in range(3):
            h = h + net.conv(x)
            spikes.append((h >= 1).float())
    assert done.solutions[1].input_square == pytest.approx(float(torch.stack(spikes).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("module", "name", "part"),
    [
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "kaiming", "calls no convolution and no linear layer"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "ikun", "no spiking neurons found for ikun: pass their class"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "he", "unknown initializer 'he'"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "tdbn", "this network has no norm"),
        (MultiStep(2), "gradient_stable", "this network has none"),
    ],
)
def test_modules_that_do_not_fit_are_refused(module: nn.Module, name: str, part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        initialize_module(module, name, generator=seeded(), x=images(4))
    assert "\n" not in str(caught.value)


def test_a_rule_that_measures_refuses_to_guess_the_batch() -> None:
    with pytest.raises(ValueError, match="the ikun initializer needs a batch"):
        initialize_module(MultiStep(2), "ikun", generator=seeded())


def test_layers_that_the_forward_pass_leaves_out_are_left_out() -> None:
    class Partly(MultiStep):
        def __init__(self) -> None:
            super().__init__(2)
            self.unused = nn.Linear(3, 3)

    net = Partly()
    before = net.unused.weight.clone()
    done = initialize_module(net, "ikun", generator=seeded(), x=images())
    assert torch.equal(net.unused.weight, before)
    assert done.untouched == ("unused.weight",)


class Odd(nn.Module):
    """Weights that no initializer draws, before one that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(5, 4), nn.ConvTranspose1d(1, 2, 3)
        self.rnn, self.pair = nn.GRU(4, 3, batch_first=True), nn.Bilinear(4, 4, 2)
        self.heads, self.lazy = nn.MultiheadAttention(4, 2), nn.LazyLinear(2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.embed.weight.sum() + self.up(x[:, None]).mean() + self.rnn(x[:, None])[0].mean())


def test_all_weights_that_are_not_drawn_are_told() -> None:
    net = Odd()
    done = initialize_module(net, "kaiming", generator=seeded(), x=torch.rand(6, 4))
    assert done.untouched == (
        "embed.weight",
        "up.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "pair.weight",
        "heads.in_proj_weight",
        "heads.out_proj.weight",
        "lazy.weight",
        "lazy.bias",
    )
    assert initialize_module(MultiStep(2), "kaiming", generator=seeded(), x=images()).untouched == ()


def test_frozen_layers_stay_and_are_seen() -> None:
    net, x = Two(), torch.rand(64, 40, generator=seeded())
    net.long.requires_grad_(False)
    net.short.bias.requires_grad_(False)
    kept = {k: v.clone() for k, v in net.state_dict().items() if k != "short.weight"}
    done = initialize_module(net, "ikun", generator=seeded(), x=x)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in kept.items())
    assert done.untouched == ("long.weight",)
    (short,) = done.solutions
    with torch.no_grad():
        m = derivative_square(net.node, (net.long(x) + net.short(x)).expand(STEPS, -1, -1))
    assert short.variance == pytest.approx(1 / (40 * float(x.square().mean()) * m), rel=0.02)


def test_what_waits_for_a_frozen_layer_waits() -> None:
    net, x = Shortcut(), torch.rand(64, 40, generator=seeded())
    net.second.requires_grad_(False)
    done = initialize_module(net, "firing", generator=seeded(), x=x)
    assert [s.layer for s in done.solutions] == ["first", "short"]


@pytest.mark.parametrize("name", ["kaiming", "lsuv"])
@pytest.mark.parametrize(
    "compute",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        pytest.param(weight_norm, marks=pytest.mark.filterwarnings("ignore")),
        lambda m: prune.random_unstructured(m, "weight", 0.5),
        lambda m: prune.random_unstructured(m, "bias", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "pruned", "pruned bias"],
)
def test_computed_weights_are_refused(compute: Any, name: str) -> None:
    net = single_step(2)
    compute(net.layers[0])
    before = {k: v.clone() for k, v in net.state_dict().items() if "weight" in k}
    with pytest.raises(ValueError, match=r"layer layers\.0: its weight is computed \(weight_norm.*remove that first"):
        initialize_module(net, name, generator=seeded(), x=images(8))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items() if not k.endswith(("_u", "_v")))


@pytest.mark.parametrize("name", ["kaiming", "ikun"])
@pytest.mark.parametrize("view", [False, True])
def test_tied_weights_are_refused(name: str, view: bool) -> None:
    net = Two()
    net.short.weight = nn.Parameter(net.long.weight.data) if view else net.long.weight
    with pytest.raises(ValueError, match="layers long and short share one weight"):
        initialize_module(net, name, generator=seeded(), x=torch.rand(8, 40))


class Stateless(nn.Module):
    def forward(self, x: Tensor, v: Tensor | float) -> tuple[Tensor, Tensor]:
        h = v + x
        s = (h >= 1).to(x)
        return s, h * (1 - s)


class Chain(nn.Module):
    """Two layers whose neurons are one module or two."""

    def __init__(self, kind: str, shared: bool, width: int = 40) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(40, width), nn.Linear(width, 40), kind
        make = Stateless if kind == "stateless" else lambda: Neuron("if", MODEL.dynamics)
        self.n = make()
        self.m = self.n if shared else make()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "ikun":
            return self.m(self.b(self.n(self.a(x).expand(STEPS, -1, -1))))
        one, two, total = 0.0, 0.0, torch.zeros(())
        for _ in range(STEPS):
            s, one = self.n(self.a(x), one)
            s, two = self.m(self.b(s), two)
            total = total + s
        return total


@pytest.mark.parametrize("kind", ["stateless", "ikun"])
@pytest.mark.parametrize("width", [40, 30])
def test_neurons_shared_by_two_places_are_refused(kind: str, width: int) -> None:
    kinds = Stateless if kind == "stateless" else None
    x = torch.rand(64, 40, generator=seeded())
    own = initialize_module(Chain(kind, False, width), "ikun", generator=seeded(), x=x, neurons=kinds)
    assert [s.layer for s in own.solutions] == ["a", "b"]
    for name in ("ikun", "lsuv"):
        with pytest.raises(ValueError, match=r"neurons n follow several layers \(a, b\): give each layer its own"):
            initialize_module(Chain(kind, True, width), name, generator=seeded(), x=x, neurons=kinds)


class Late(nn.Module):
    """Recurrence that begins at the second step; with_input: beside a layer, or beside the bare input."""

    def __init__(self, with_input: bool) -> None:
        super().__init__()
        self.fc, self.back, self.node = nn.Linear(40, 40), nn.Linear(40, 40), IFNode()
        self.with_input = with_input

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.node(self.fc(x) if self.with_input else x)
        for _ in range(STEPS):
            spikes = self.node((self.fc(x) if self.with_input else x) + self.back(spikes))
        return spikes


@pytest.mark.parametrize("with_input", [True, False])
def test_recurrence_is_no_sharing(with_input: bool) -> None:
    net = Late(with_input)
    found = stages_of_module(net, torch.rand(8, 40), stand_in)
    assert [(s.name, s.neuron, s.recurrent) for s in found][-1] == ("back", net.node, True)


def test_a_rule_that_does_not_measure_needs_no_statistics_of_the_batch() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), IFNode())
    done = initialize_module(net, "kaiming", generator=seeded(), x=images(1))
    assert (done.forward_passes, net.training, net[2].training) == (1, True, True)
    assert net[1].bias.eq(0).all()


@pytest.mark.parametrize(
    ("make", "options", "part"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), {"x": None}, "layer 1 has no shape yet: give a batch"),
        (lambda: MultiStep(2).double(), {}, "x is torch.float32, the module's parameters are torch.float64"),
        (lambda: MultiStep(2).to("meta"), {}, "the module is on the meta device and has no values yet"),
        (lambda: MultiStep(2).to("meta"), {"x": None}, "the module is on the meta device and has no values yet"),
        (lambda: MultiStep(2), {"threshold": math.nan}, "threshold must be positive and finite, not nan"),
        (lambda: MultiStep(2), {"threshold": 0.0}, "threshold must be positive and finite, not 0.0"),
        (lambda: MultiStep(2).requires_grad_(False), {}, "all weights are frozen"),
    ],
)
def test_modules_that_cannot_be_drawn_are_refused(make: Any, options: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        initialize_module(make(), "kaiming", generator=seeded(), **{"x": images(4), **options})
    assert "\n" not in str(caught.value)


def test_modules_that_count_as_neurons_are_recognized() -> None:
    assert is_neuron(MODEL)
    assert is_neuron(IFNode())
    assert is_neuron(RLeaky(2))
    assert not is_neuron(nn.Linear(1, 1))
    assert not is_neuron(IFNode(), (Cell,))


# ---------------------------------------------------------------- the libraries themselves
@pytest.mark.parametrize("lif", [False, True])
def test_networks_of_spikingjelly_get_our_weights(lif: bool) -> None:
    """Leak, threshold and surrogate are read: the same weights as ours of that kind."""
    base = pytest.importorskip("spikingjelly.activation_based")
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    node = pytest.importorskip("spikingjelly.activation_based.neuron")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    assert base

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            neuron = partial(node.LIFNode, tau=3.0, v_threshold=0.7) if lif else node.IFNode
            parts = [layer.Conv2d(1, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4), neuron()]
            parts += [layer.MaxPool2d(2, 2), layer.Conv2d(4, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4)]
            parts += [neuron(), layer.MaxPool2d(2, 2), layer.Flatten(), layer.Linear(16, 64, bias=False)]
            self.net = nn.Sequential(*parts, neuron(), layer.Linear(64, 10, bias=False), neuron())
            functional.set_step_mode(self.net, "m")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.expand(STEPS, *x.shape)).mean(0)

    dynamics: dict[str, Any] = {"neuron": "lif", "tau": 3.0, "threshold": 0.7} if lif else {}
    for name in ("ikun", "lsuv", "delta_orthogonal", "fluctuation"):
        ours, theirs = Network(Spec(channels=4, surrogate="sigmoid:4", **dynamics)), Theirs()
        initialize(ours, name, generator=seeded(3), x=images())
        initialize_module(theirs, name, generator=seeded(3), x=images())
        for a, b in zip(weights(ours), weights(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=0)


def test_networks_of_snntorch_get_our_weights() -> None:
    snn = pytest.importorskip("snntorch")

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(64, 30), snn.RLeaky(beta=0.5, linear_features=30, all_to_all=True)
            self.fc2, self.lif2, self.out = nn.Linear(30, 20), snn.Leaky(beta=0.5), nn.Linear(20, 10)

        def forward(self, x: Tensor) -> Tensor:
            spike, mem = self.lif1.init_rleaky()
            late, total = self.lif2.init_leaky(), torch.zeros(())
            for _ in range(STEPS):
                spike, mem = self.lif1(self.fc1(x.flatten(1)), spike, mem)
                fired, late = self.lif2(self.fc2(spike), late)
                total = total + self.out(fired)
            return total

    done = initialize_module(Theirs(), "ikun", generator=seeded(), x=images())
    assert [s.layer for s in done.solutions] == ["fc1", "lif1.recurrent", "fc2", "out"]
    assert all(s.converged and math.isfinite(s.variance) for s in done.solutions)
